"""data/: text on disk becomes token streams and batches, a task knows its own optimum, downloads
are checked. What can be wrong with the reader's text stands in test_errors.py."""
import contextlib
import hashlib
import http.server
import itertools
import math
import os
import re
import threading

import numpy as np
import pytest
import torch

import data
from data import UserError, border, bpe, download, tasks, text, windows

WORDS = ("the cat sat on the mat and the dog sat on the cat while 12 birds sang, "
         "'self' and self.cat = 345\n")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def book(tmp_path):
    """A file of about 20,000 characters, every line another, and a folder for the cache."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}: {WORDS}" for i in range(200)))
    return path, tmp_path / "cache"


@pytest.fixture(scope="session")
def stdlib():
    return data.load("stdlib")  # seconds the first time, from data/cache afterwards


# ---------------------------------------------------------------- the tokenizer

def slow_encode(word, tokens):
    """The definition: of all neighbours that form a token, merge those of lowest rank."""
    rank = {token: i for i, token in enumerate(tokens)}
    parts = [bytes([byte]) for byte in word.encode()]
    while True:
        joined = [a + b for a, b in zip(parts, parts[1:])]
        found = [(rank[token], i) for i, token in enumerate(joined) if token in rank]
        if not found:
            return [rank[part] for part in parts]
        _, i = min(found)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def slow_train(texts, merges):
    """The textbook trainer: recount everything after each merge."""
    import regex
    words = [[bytes([b]) for b in w.encode()] for t in texts for w in regex.findall(bpe.PATTERN, t)]
    tokens = [bytes([b]) for b in range(256)]
    for _ in range(merges):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        most = max(counts.values())
        frequent = [pair for pair in counts if counts[pair] == most]
        a, b = min(frequent, key=lambda pair: [tokens.index(t) for t in pair])
        tokens.append(a + b)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == (a, b):
                    word[i:i + 2] = [a + b]
                i += 1
    return tokens


def test_trainer_equals_textbook():
    """And the order of texts and ties do not matter."""
    texts = [WORDS * 2, "aaaa aaa aaaaa ababab bababa naïve naïveté\n        if x:\n        y\n"]
    assert bpe.train(texts, 257 + 50) == slow_train(texts, 50)
    a, b = "ab!cd!ab!cd", "xy!xy!zw!zw"
    assert bpe.train([a, b], 300) == bpe.train([b, a], 300)
    assert bpe.train([a, b], 258)[256] == b"ab"  # as often as "cd": the smaller ids win


def test_tiktoken_encodes_as_the_definition(stdlib):
    tokens = [stdlib.encoding.decode_single_token_bytes(i) for i in range(stdlib.bos)]
    words = ["self", " return", "\n        ", "naïve", "日本語", " 🙂", "____", "xyzzy" * 20, " in"]
    for word in words:
        assert stdlib.encode(word) == slow_encode(word, tokens)


@pytest.mark.parametrize("prompt", [
    "", "import ", "日本語 🙂\0\x7f", "<|bos|><|endoftext|>", "a" * 100_000, " " * 300_000,
    "\r\n\t x  \n", "é" * 3])
def test_any_text_round_trips(stdlib, prompt):
    ids = stdlib.encode(prompt)
    assert stdlib.decode(ids) == prompt and stdlib.bos not in ids
    assert stdlib.encode("a\udc80b")  # half a surrogate pair is no text, and no crash


@pytest.mark.parametrize("sample", [
    WORDS * 30, "a  b\n\n\tc " * 200, "x" * 999 + " y", " \n" * 500])
def test_pieces_are_cut_between_words(stdlib, sample):
    parts = list(bpe.pieces(sample, 50))
    assert "".join(parts) == sample and (len(parts) > 5 or sample.isspace())
    if "x" not in sample:  # a word that is longer than a piece is cut
        assert [t for part in parts for t in stdlib.encode(part)] == stdlib.encode(sample)


def test_ranks_file_round_trips_and_refuses_nonsense():
    tokens = bpe.train([WORDS * 3], 300)
    saved = bpe.to_text(tokens)
    assert bpe.from_text(saved) == tokens
    for broken in [saved[5:], saved.replace(" 260\n", " 261\n"), "hello", saved + "\n", "!!!! 0\n",
                   saved + saved.splitlines()[0].replace(" 0", f" {len(tokens)}\n")]:
        with pytest.raises(ValueError):
            bpe.from_text(broken)


def test_vocabulary_stops_where_the_text_has_no_pairs(book):
    corpus = data.load(book[0], cache=book[1], vocab_size=30_000)
    assert 257 < corpus.vocab_size < 1000
    assert corpus.bos == corpus.vocab_size - 1 == corpus.encoding.n_vocab - 1
    assert corpus.decode(torch.tensor([corpus.bos])) == "<|bos|>"


# ---------------------------------------------------------------- the standard library

def test_stdlib_is_real_and_split_by_file(stdlib):
    root, files = text.stdlib_files()
    names = [f.relative_to(root).as_posix() for f in files]
    assert "argparse.py" in names and names == sorted(names)
    assert not any(part in text.NOT_LIBRARY for name in names for part in name.split("/"))
    docs = text.documents(root, files, skip_undecodable=True)
    train, val = text.split(docs)
    assert sorted(train + val) == sorted(docs) and not set(train) & set(val)
    characters = [sum(len(t) for _, t in part) for part in (train, val)]
    assert sum(characters) > 8e6 and 0.04 < characters[1] / sum(characters) < 0.12
    assert (stdlib.val == stdlib.bos).sum() == len(val)
    assert (stdlib.train == stdlib.bos).sum() == len(train)
    size = sum(len(t.encode()) for _, t in val)
    assert stdlib.bytes_per_token == pytest.approx(size / (len(stdlib.val) - len(val)))
    assert 2.3 < stdlib.bytes_per_token < 4
    first = stdlib.val[1:stdlib.val[1:].tolist().index(stdlib.bos) + 1]
    assert stdlib.decode(first) == val[0][1]


def test_stdlib_loads_from_the_cache(stdlib, monkeypatch):
    assert stdlib.vocab_size == 1024
    monkeypatch.setattr(text, "read", lambda path: pytest.fail(f"read {path} again"))
    again = data.load("stdlib")
    assert torch.equal(again.train, stdlib.train) and again.train.dtype == torch.int16


# ---------------------------------------------------------------- the reader's own text

def test_one_file_is_cut_at_a_line_end(book):
    path, cache = book
    corpus = data.load(path, cache=cache, vocab_size=300)
    train, val = corpus.decode(corpus.train), corpus.decode(corpus.val)
    assert (train + val).replace("<|bos|>", "") == path.read_text()
    assert train.endswith("\n") and 0.08 < len(val) / path.stat().st_size < 0.12


def test_folder_is_split_by_file(tmp_path):
    folder = tmp_path / "f"
    for i in range(12):
        (folder / f"sub{i % 2}").mkdir(parents=True, exist_ok=True)
        (folder / f"sub{i % 2}" / f"{i}.md").write_text(f"document {i}. {WORDS * 20}<|bos|>")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / ".hidden.txt").write_text("secret")
    corpus = data.load(folder, cache=tmp_path / "c", vocab_size=300)
    train, val = corpus.decode(corpus.train), corpus.decode(corpus.val)
    found = [set(map(int, re.findall(r"<\|bos\|>document (\d+)\.", side))) for side in (train, val)]
    assert found[0] | found[1] == set(range(12)) and not found[0] & found[1] and found[1]
    assert "secret" not in train + val
    assert (corpus.train == corpus.bos).sum() + (corpus.val == corpus.bos).sum() == 12  # no text is


def test_windows_line_ends_and_byte_order_mark(book):
    path, cache = book
    plain = data.load(path, cache=cache)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert torch.equal(data.load(path, cache=cache).train, plain.train)


# ---------------------------------------------------------------- the cache

def test_cache_is_never_stale(book):
    path, cache = book
    first = data.load(path, cache=cache)
    path.write_text(path.read_text().replace("cat", "cow"))  # the size stays
    os.utime(path, ns=(1, 1))
    second = data.load(path, cache=cache)
    assert "cow" in second.decode(second.train) and "cow" not in first.decode(first.train)
    assert data.load(path, cache=cache, vocab_size=280).vocab_size == 280


@pytest.mark.parametrize("suffix", [".npz", ".tiktoken"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other", "gone"])
def test_damaged_cache_is_built_again(book, suffix, damage):
    path, cache = book
    first = data.load(path, cache=cache, vocab_size=300)
    target = next(cache.glob(f"*{suffix}"))
    raw = bytearray(target.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged = {"cut": raw[:len(raw) // 2], "flip": raw, "empty": b"", "other": b"\x80\x04hello"}
    if damage == "gone":
        target.unlink()
    else:
        target.write_bytes(damaged[damage])
    again = data.load(path, cache=cache, vocab_size=300)
    assert torch.equal(first.train, again.train) and first.encode(WORDS) == again.encode(WORDS)
    assert not list(cache.glob("*.part"))


def test_full_disk_costs_only_the_cache(book, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(text.os, "replace", full)
    path, cache = book
    assert data.load(path, cache=cache).vocab_size > 257
    assert "No space left" in capsys.readouterr().err and not list(cache.iterdir())


# ---------------------------------------------------------------- batches

@pytest.mark.parametrize("name", ["book", "copy"])
def test_batch_contract(name, book):
    corpus = data.load(book[0], cache=book[1]) if name == "book" else data.load(name)
    for seq_len in (1, 17):
        x, y = corpus.batch(64, seq_len, generator(3))
        assert x.shape == y.shape == (64, seq_len) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert 0 <= x.min() and x.max() < corpus.vocab_size
        state = torch.get_rng_state()
        again = corpus.batch(64, seq_len, generator(3))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(again[0], x) and torch.equal(again[1], y)
        assert not torch.equal(corpus.batch(64, seq_len, generator(4))[1], y)
    share = [(corpus.batch(2000, 8, generator(1), bos=bos)[0][:, 0] == corpus.bos).float().mean()
             for bos in (0, 0.25, 1)]
    assert share[0] == 0 and abs(share[1] - 0.25) < 0.04 and share[2] == 1


def test_bos_only_shifts_the_window(book):
    """With the same draws, a window with bos is the window without, one token later."""
    corpus = data.load(book[0], cache=book[1])
    x0, y0 = corpus.batch(16, 12, generator(5), bos=0)
    x1, y1 = corpus.batch(16, 12, generator(5), bos=1)
    assert torch.equal(x1[:, 1:], x0[:, :-1]) and torch.equal(y1, x0)


def test_repeated_windows(book):
    """repeat=1: every window is a passage of 8 .. T/2 tokens over and over; repeat=0: none is."""
    corpus = data.load(book[0], cache=book[1])
    x, y = corpus.batch(64, 40, generator(3), bos=0.0, repeat=1.0)
    for row in torch.cat([x, y[:, -1:]], 1).tolist():
        assert any(all(row[i] == row[i - n] for i in range(n, len(row))) for n in range(8, 22))
    plain, none = (corpus.batch(64, 40, generator(3), **kw)[0] for kw in ({}, {"repeat": 0.0}))
    assert torch.equal(plain, none)


def test_text_windows_lie_in_the_stream_and_reach_its_end(tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text(WORDS * 3)
    corpus = data.load(path, cache=tmp_path / "c", seq_len=4, vocab_size=257)
    stream = corpus.val.tolist()
    seen = set()
    x, y = corpus.batch(4000, 4, generator(), split="val", bos=0)
    for window in torch.cat([x, y[:, -1:]], 1).tolist():
        seen.add(next(i for i in range(len(stream)) if stream[i:i + 5] == window))
    assert min(seen) == 1 and max(seen) == len(stream) - 6 and corpus.bos not in x[:, 0]


@pytest.mark.parametrize("call, message", [
    (dict(bos=1.5), "bos is 1.5"), (dict(repeat=2), "repeat is 2"),
    (dict(split="test"), "'train' and 'val'"), (dict(seq_len=10**6), "too short")])
def test_bad_batch(book, call, message):
    corpus = data.load(book[0], cache=book[1])
    with pytest.raises(UserError, match=message):
        corpus.batch(**{"batch_size": 2, "seq_len": 8, "generator": generator(), **call})


def test_windows_of_a_text_for_another_model():
    """No two share a token of x, y is the next token, and each batch has some of all parts."""
    for length, starts in ((1000, range(0, 1000, 61)), (16 * 60 + 1, range(0, 960, 60))):
        batches = windows.text_windows(range(length), 4, 4, 60)
        for x, y in batches:
            assert x.shape == (4, 60) and torch.equal(y, x + 1) and y.max() < length
        found = torch.stack([x for x, _ in batches], 1).flatten(0, 1)
        assert len(found.unique()) == 16 * 60 and (found[:, 0].diff() > 0).all()
        assert (found[:, 0] - torch.tensor(starts[:16])).abs().max() < 25
    with pytest.raises(UserError, match="960 tokens, too few for 16 windows of 60"):
        windows.text_windows(range(960), 4, 4, 60)


# ---------------------------------------------------------------- the copying task

def test_optimal_loss_is_known_for_the_task_only(book):
    assert data.load(book[0], cache=book[1]).optimal_loss(16) is None
    assert data.load("copy").optimal_loss(16) > 0
    assert data.load("copy").optimal_loss(10_000) is None  # would take minutes


def test_a_window_repeats_a_passage_from_anywhere():
    task = tasks.Copy()
    tokens, spans, begins = task.windows(800, 65, generator()), [], []
    for i, row in enumerate(tokens.tolist()):
        span = next((t for t, token in enumerate(row) if token >= task.K), 65)
        if i % 4 == 3:
            assert span == 65
            continue
        copied = [token - task.K for token in row[span:]]
        shown = [b for b in range(span)
                 if copied == [row[(t + b) % span] for t in range(span, 65)]]
        spans.append(span)
        begins.append(shown[0] / span)  # raises where it is no repeat
    assert set(spans) == set(range(8, 25))
    assert 0.4 < sum(begins) / len(begins) < 0.5  # of all places, and not the first one
    fresh = torch.bincount(tokens[:, :8].flatten(), minlength=16) / (8 * 800)
    assert len(fresh) == 16 and (fresh - 1 / 16).abs().max() < 0.015
    rest = task.rest(99, 7, generator())
    assert rest.shape == (99, 7) and rest.max() == 15


def test_copy_filter_is_exact():
    task, length = tasks.Copy("ab"), 9  # passages of 1, 2 or 3 letters
    chance = {}

    def add(window, p):
        for t in range(length + 1):
            chance[window[:t]] = chance.get(window[:t], 0) + p

    for span in (1, 2, 3):
        for passage in itertools.product(range(2), repeat=span):
            for begin in range(span):
                again = (passage[begin:] + passage[:begin]) * length
                window = passage + tuple(2 + token for token in again)
                add(window[:length], 0.75 / 3 / span / 2**span)
    for window in itertools.product(range(2), repeat=length):
        add(window, 0.25 / 2**length)
    assert chance[()] == pytest.approx(1)
    possible = [w for w in chance if len(w) == length]
    loss = task.token_loss(np.array(possible))
    for window, row in zip(possible, loss):
        for t in range(length):
            wanted = -math.log(chance[window[:t + 1]] / chance[window[:t]])
            assert row[t] == pytest.approx(wanted, abs=1e-9)
    exact = sum(chance[w] * l for w, l in zip(possible, loss))
    assert task.position_loss(length).mean() == pytest.approx(exact.mean(), abs=0.02)
    assert task.token_loss(np.array([[0, 1, 2, 1, 0, 1, 0, 0, 0]]))[0, 3] == math.inf


def test_copy_optimum_lies_between_oracle_and_uniform():
    corpus = data.load("copy")
    optimum = corpus.optimal_loss(64, bos=0)
    fresh = 0.75 * 15 / 64 + 0.25  # of the 64 targets; a passage has 8 .. 24 letters
    oracle = fresh * math.log(16)  # who is told when and where the repeats begin
    assert oracle < optimum < oracle + 0.75 * (math.log(17) + 2 * math.log(24)) / 64 + 0.25 / 10
    assert corpus.optimal_loss(64, bos=1) > optimum  # its first target is a fresh letter
    tokens = corpus.task.windows(4000, 65, generator(9))
    sample = corpus.task.token_loss(tokens.numpy())[:, 1:].mean(1)
    assert abs(sample.mean() - optimum) < 4 * sample.std() / 4000**0.5


def test_task_encodes_its_symbols():
    corpus = data.load("copy")
    assert corpus.encode("abC") == [0, 1, 18] and corpus.decode([32, 0, 17]) == "<|bos|>aB"
    with pytest.raises(UserError, match="'é' is not a symbol"):
        corpus.encode("aé")


# ---------------------------------------------------------------- downloads, from our own server

BODY = ("Once upon a time. " + WORDS * 20 + "\n<|endoftext|>\n").encode() * 30


@contextlib.contextmanager
def server(body=BODY, send=None, status=200):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:send])

        def log_message(self, *_):
            pass
    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    serve = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    serve.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/stories.txt"
    finally:
        httpd.shutdown()
        httpd.server_close()


def remote(url, body=BODY):
    return download.File(url, len(body), hashlib.sha256(body).hexdigest(), "<|endoftext|>")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_a_good_file_is_fetched_once_and_a_damaged_one_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(border, "watched", lambda stream: True)  # as in a terminal
    with server() as url:
        monkeypatch.setitem(download.FILES, "tinystories", remote(url))
        corpus = data.load("tinystories", cache=tmp_path, vocab_size=300)
        assert "data: tinystories:   0%|" in capsys.readouterr().err
        path = next(tmp_path.glob("*.txt"))
        path.write_bytes(BODY[:-1] + b"x")
        download.fetch("tinystories", remote(url), tmp_path)
        assert path.read_bytes() == BODY
    assert (corpus.train == corpus.bos).sum() + (corpus.val == corpus.bos).sum() == 30
    assert "<|endoftext|>" not in corpus.decode(corpus.train)
    again = data.load("tinystories", cache=tmp_path, vocab_size=300)  # the server is gone
    assert torch.equal(again.val, corpus.val)


BROKEN = {  # what the server does -> words of the line
    "wrong hash": (dict(body=BODY[:-1] + b"x"), "another SHA-256"),
    "cut": (dict(send=30_000), "cut at"), "longer": (dict(body=BODY * 2), "another SHA-256"),
    "missing": (dict(status=404), "Not Found"), "offline": (None, "cannot download")}


@pytest.mark.parametrize("does, message", BROKEN.values(), ids=BROKEN)
def test_failed_download_leaves_nothing_and_can_be_repeated(tmp_path, does, message):
    with server(**does or {}) as url:
        there = url if does else "http://127.0.0.1:9/nobody"  # listens at that port
        with pytest.raises(UserError, match=message) as caught:
            download.fetch("stories", remote(there), tmp_path, timeout=5)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with server() as url:
        assert download.fetch("stories", remote(url), tmp_path).read_bytes() == BODY
        with pytest.raises(UserError, match="could not write .*file/cache"):
            download.fetch("stories", remote(url), tmp_path / "file" / "cache")


def test_named_downloads_are_pinned():
    for file in download.FILES.values():
        assert file.url.startswith("https://") and len(file.sha256) == 64 and file.size > 10**6
        assert any(len(part) == 40 for part in file.url.split("/")), "a branch can change under us"
