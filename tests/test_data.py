"""data/: text on disk becomes token streams and batches, a task knows its own optimum, downloads
are checked. What can be wrong with the reader's text stands in test_errors.py."""
import hashlib
import itertools
import math
import os
from collections import Counter

import numpy as np
import pytest
import regex
import torch

import data
from data import UserError, bpe, download, tasks, text, windows

WORDS = ("the cat sat on the mat and the dog sat on the cat while 12 birds sang, "
         "'self' and self.cat = 345\n")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def load(tmp_path):
    """`data.load` with a cache of its own."""
    return lambda name, **options: data.load(name, cache=tmp_path / "cache", **options)


@pytest.fixture
def book(tmp_path):
    """A file of about 20,000 characters, every line another."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}: {WORDS}" for i in range(200)))
    return path


@pytest.fixture(scope="session")
def stdlib():
    return data.load("stdlib")  # seconds the first time, from data/cache afterwards


# ---------------------------------------------------------------- the tokenizer

def test_each_token_is_the_most_frequent_pair_of_those_before():
    """In whatever order the texts come."""
    texts = [WORDS * 2, "aaaa aaa aaaaa ababab bababa naïve naïveté\n        if x:\n        y\n"]
    tokens, words = bpe.train(texts, 257 + 50), regex.findall(bpe.PATTERN, "".join(texts))
    assert bpe.train(texts[::-1], 257 + 50) == tokens
    for n in range(256, 256 + 50):
        encoding, pairs = bpe.encoding(tokens[:n]), Counter()
        for word in words:
            ids = encoding.encode_ordinary(word)
            pairs.update(zip(ids, ids[1:]))
        most = max(pairs.values())
        left, right = min(pair for pair in pairs if pairs[pair] == most)
        assert tokens[n] == tokens[left] + tokens[right]


@pytest.mark.parametrize("prompt", [
    "", "日本語 🙂\0\x7f", "<|bos|><|endoftext|>", "a" * 100_000, " " * 300_000, "\r\n\t x  \n"])
def test_any_text_round_trips(stdlib, prompt):
    ids = stdlib.encode(prompt)
    assert stdlib.decode(ids) == prompt and stdlib.bos not in ids


def test_a_long_text_is_encoded_in_pieces_as_in_one(stdlib):
    for sample in (WORDS * 30, "a  b\n\n\tc " * 200, " \n" * 500):
        ids = [stdlib.encode(piece) for piece in bpe.pieces(sample, 50)]
        assert sum(ids, []) == stdlib.encode(sample)
    assert len(list(bpe.pieces("x" * 999, 50))) > 5  # here a word itself is cut


# ---------------------------------------------------------------- texts

def test_the_standard_library_is_split_by_file(stdlib):
    root, files = text.stdlib_files()
    assert root / "argparse.py" in files and not any("test" in path.parts for path in files)
    docs = text.documents(root, files, skip_undecodable=True)
    train, val = text.split(docs)
    assert sorted(train + val) == sorted(docs) and not set(train) & set(val)
    characters = [sum(len(t) for _, t in part) for part in (train, val)]
    assert 0.04 < characters[1] / sum(characters) < 0.12
    assert stdlib.decode(stdlib.val) == "".join(f"<|bos|>{t}" for _, t in val)
    size = sum(len(t.encode()) for _, t in val)
    assert stdlib.bytes_per_token == pytest.approx(size / (len(stdlib.val) - len(val)))


def test_one_file_is_cut_at_a_line_end(book, load):
    """And line ends or a byte order mark of Windows change nothing."""
    wanted = book.read_text()
    book.write_bytes(b"\xef\xbb\xbf" + wanted.replace("\n", "\r\n").encode())
    corpus = load(book, vocab_size=30_000)
    train, val = corpus.decode(corpus.train), corpus.decode(corpus.val)
    assert (train + val).replace("<|bos|>", "") == wanted
    assert train.endswith("\n") and 0.08 < len(val) / len(wanted) < 0.12
    assert 257 < corpus.vocab_size < 1000  # the text supports no more


def test_a_folder_is_split_by_file(tmp_path, load):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for i in range(12):
        (folder / "sub" / f"{i}.md").write_text(f"document {i}. {WORDS * 20}<|bos|>")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / ".hidden.txt").write_text("secret")
    corpus = load(folder, vocab_size=300)
    train, val = corpus.decode(corpus.train), corpus.decode(corpus.val)
    for i in range(12):
        assert (f"document {i}." in train) != (f"document {i}." in val)
    assert "document" in val and "secret" not in train + val
    starts = [(stream == corpus.bos).sum() for stream in (corpus.train, corpus.val)]
    assert sum(starts) == 12  # what a text calls <|bos|> is none


# ---------------------------------------------------------------- the cache

def test_the_cache_is_used_and_never_stale(book, load, monkeypatch):
    first = load(book)
    with monkeypatch.context() as patch:
        patch.setattr(text, "read", None)
        assert torch.equal(load(book).train, first.train)
    book.write_text(book.read_text().replace("cat", "cow"))  # the size stays
    os.utime(book, ns=(1, 1))
    assert "cow" in load(book).decode(load(book).train)
    assert load(book, vocab_size=280).vocab_size == 280


@pytest.mark.parametrize("suffix", [".npz", ".tiktoken"])
def test_a_damaged_cache_is_built_again(book, load, tmp_path, suffix):
    first = load(book)
    target = next(tmp_path.glob(f"cache/*{suffix}"))
    good = target.read_bytes()
    middle, last_line = len(good) // 2, good.rindex(b"\n", 0, -1) + 1
    for damaged in (b"", good[:last_line], good[:middle] + b"?" + good[middle + 1:]):
        target.write_bytes(damaged)
        again = load(book)
        assert torch.equal(first.train, again.train) and first.encode(WORDS) == again.encode(WORDS)
        assert target.read_bytes() == good


def test_a_full_disk_costs_only_the_cache(book, load, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(text.os, "replace", full)
    assert load(book).vocab_size > 257
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.glob("cache/*"))


# ---------------------------------------------------------------- batches

COUNT = torch.cat([torch.tensor([99]), torch.arange(60)])  # a bos, then 0, 1, 2, ...
COUNTING = data.Corpus("counting", vocab_size=100, bos=99, train=COUNT, val=COUNT[:20])


@pytest.mark.parametrize("corpus", [COUNTING, data.load("copy")], ids=["text", "task"])
def test_a_batch_is_windows_and_their_next_tokens_drawn_from_the_generator(corpus):
    for seq_len in (1, 17):
        x, y = corpus.batch(64, seq_len, generator(3))
        assert x.shape == y.shape == (64, seq_len) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        torch.rand(3)
        again = corpus.batch(64, seq_len, generator(3))
        assert torch.equal(again[0], x) and torch.equal(again[1], y)
        assert not torch.equal(corpus.batch(64, seq_len, generator(4))[1], y)


@pytest.mark.parametrize("split, last", [("train", 58), ("val", 17)])
def test_windows_of_text_start_at_ordinary_tokens_and_reach_the_end(split, last):
    x, y = COUNTING.batch(4000, 8, generator(), split, bos=0)
    assert torch.equal(y, x + 1) and (x.min(), y.max()) == (0, last)


def test_a_share_of_windows_begins_with_bos_and_is_else_the_same():
    x, _ = COUNTING.batch(2000, 8, generator(1), bos=0.25)
    assert abs((x[:, 0] == 99).float().mean() - 0.25) < 0.04
    x0, _ = COUNTING.batch(16, 12, generator(5), bos=0)
    x1, y1 = COUNTING.batch(16, 12, generator(5), bos=1)
    assert (x1[:, 0] == 99).all() and torch.equal(x1[:, 1:], x0[:, :-1]) and torch.equal(y1, x0)


def test_repeated_windows_show_a_passage_over_and_over():
    x, _ = COUNTING.batch(64, 40, generator(3), bos=0, repeat=1)
    for row in x:
        assert any(torch.equal(row[n:], row[:-n]) for n in range(8, 21))


@pytest.mark.parametrize("call, message", [
    (dict(bos=1.5), "bos is 1.5"), (dict(split="test"), "'train' and 'val'"),
    (dict(seq_len=60), "too short")])
def test_a_bad_batch_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        COUNTING.batch(**{"batch_size": 2, "seq_len": 8, "generator": generator(), **call})


def test_windows_for_another_model_share_no_token_and_are_dealt_out():
    batches = windows.text_windows(range(1000), 4, 4, 60)
    for x, y in batches:
        assert x.shape == (4, 60) and torch.equal(y, x + 1) and y.max() < 1000
    starts = torch.stack([x[:, 0] for x, _ in batches], 1).flatten()
    assert (starts.diff() >= 60).all() and starts[-1] > 900  # each batch has all parts
    with pytest.raises(UserError, match="960 tokens, too few for 16 windows of 60"):
        windows.text_windows(range(960), 4, 4, 60)


# ---------------------------------------------------------------- the copying task

def test_a_window_repeats_a_passage_from_anywhere():
    task, spans, shares = tasks.Copy(), set(), []
    for i, row in enumerate(task.windows(800, 65, generator()).tolist()):
        span = next((t for t, token in enumerate(row) if token >= task.K), 65)
        if i % 4 == 3:
            assert span == 65  # lower case only
            continue
        copied, passage = [token - task.K for token in row[span:]], row[:span] * 9
        begin = next(b for b in range(span) if passage[b:b + 65 - span] == copied)
        spans.add(span)
        shares.append(begin / span)
    assert spans == set(range(8, 25)) and 0.4 < np.mean(shares) < 0.5


def test_the_bayes_loss_of_the_copying_task_is_exact():
    """Against the chance of every possible window, for passages of 1, 2 or 3 letters."""
    task, length, chance = tasks.Copy("ab"), 9, Counter()

    def add(window, p):
        for t in range(length + 1):
            chance[window[:t]] += p

    for span in (1, 2, 3):
        for passage in itertools.product(range(2), repeat=span):
            for begin in range(span):
                again = (passage[begin:] + passage[:begin]) * length
                window = passage + tuple(2 + token for token in again)
                add(window[:length], 0.75 / 3 / span / 2**span)
    for window in itertools.product(range(2), repeat=length):
        add(window, 0.25 / 2**length)
    possible = [window for window in chance if len(window) == length]
    loss = task.token_loss(np.array(possible))
    for window, row in zip(possible, loss):
        for t in range(length):
            wanted = -math.log(chance[window[:t + 1]] / chance[window[:t]])
            assert row[t] == pytest.approx(wanted, abs=1e-9)
    mean = np.average(loss.mean(1), weights=[chance[window] for window in possible])
    assert task.position_loss(length).mean() == pytest.approx(mean, abs=0.02)
    assert task.token_loss(np.array([[0, 1, 2, 1, 0, 1, 0, 0, 0]]))[0, 3] == math.inf


def test_the_optimal_loss_is_that_of_the_windows_and_known_for_the_task_only():
    corpus = data.load("copy")
    sample = corpus.task.token_loss(corpus.task.windows(4000, 65, generator(9)).numpy())
    mean, error = sample[:, 1:].mean(), sample[:, 1:].mean(1).std() / 4000**0.5
    assert abs(corpus.optimal_loss(64, bos=0) - mean) < 4 * error
    assert corpus.optimal_loss(64, bos=1) > corpus.optimal_loss(64, bos=0)  # one letter is new
    assert corpus.optimal_loss(10_000) is COUNTING.optimal_loss(64) is None


def test_the_task_encodes_its_symbols():
    corpus = data.load("copy")
    assert corpus.encode("abC") == [0, 1, 18] and corpus.decode([32, 0, 17]) == "<|bos|>aB"
    with pytest.raises(UserError, match="'é' is not a symbol"):
        corpus.encode("aé")


# ---------------------------------------------------------------- downloads

BODY = ("Once upon a time. " + WORDS * 20 + "\n<|endoftext|>\n").encode() * 30


@pytest.fixture
def remote(tmp_path):
    """A file of stories by its address, file://..."""
    path = tmp_path / "remote.txt"
    path.write_bytes(BODY)
    sha256 = hashlib.sha256(BODY).hexdigest()
    return path, download.File(path.as_uri(), len(BODY), sha256, "<|endoftext|>")


def test_a_good_file_is_fetched_once_and_a_damaged_one_again(remote, load, tmp_path, monkeypatch):
    path, file = remote
    monkeypatch.setitem(download.FILES, "tinystories", file)
    corpus = load("tinystories")
    assert (corpus.train == corpus.bos).sum() + (corpus.val == corpus.bos).sum() == 30
    assert "<|endoftext|>" not in corpus.decode(corpus.train)
    kept = next(tmp_path.glob("cache/*.txt"))
    kept.write_bytes(BODY[:-1] + b"x")
    assert download.fetch("tinystories", file, kept.parent).read_bytes() == BODY
    path.unlink()
    assert torch.equal(load("tinystories").val, corpus.val)


@pytest.mark.parametrize("content, message", [
    (BODY[:-1] + b"x", "another SHA-256"), (BODY[:30_000], "cut at 30000"),
    (BODY * 2, "another SHA-256"), (None, "cannot download")],
    ids=["other bytes", "cut", "longer", "offline"])
def test_a_failed_download_leaves_nothing_and_can_be_repeated(remote, tmp_path, content, message):
    path, file = remote
    path.write_bytes(content) if content else path.unlink()
    with pytest.raises(UserError, match=message) as caught:
        download.fetch("stories", file, tmp_path / "cache")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("cache/*"))
    path.write_bytes(BODY)
    assert download.fetch("stories", file, tmp_path / "cache").read_bytes() == BODY


def test_downloads_are_pinned():
    for file in download.FILES.values():
        assert file.url.startswith("https://") and len(file.sha256) == 64
        assert any(len(part) == 40 for part in file.url.split("/")), "a branch can change under us"
