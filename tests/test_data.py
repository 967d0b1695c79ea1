"""data/: text on disk becomes token streams and batches, a task knows its own optimum. What can be
wrong with the reader's text stands in test_errors.py."""
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

import data
from data import UserError, tasks, text, windows

WORDS = ("the cat sat on the mat and the dog sat on the cat while 12 birds sang, "
         "'self' and self.cat = 345\n")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")


@pytest.fixture
def book(tmp_path):
    """A file of about 20,000 characters, every line another."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}: {WORDS}" for i in range(200)))
    return path


# ---------------------------------------------------------------- tokens

@pytest.mark.parametrize("vocab_size", [257, 300])
@pytest.mark.parametrize("prompt", [
    "", "日本語 🙂\0\x7f", "<|bos|><|endoftext|>", "a" * 100_000, " " * 300_000, "\r\n\t x  \n"])
def test_any_text_round_trips(book, vocab_size, prompt):
    corpus = data.load(book, vocab_size=vocab_size)
    ids = corpus.encode(prompt)
    assert corpus.decode(ids) == prompt
    assert corpus.bos not in ids


def test_a_vocabulary_is_learned_once_for_each_text(book, monkeypatch):
    first = data.load(book, vocab_size=30_000)
    assert 257 < first.vocab_size < 1000  # the text supports no more
    assert first.bytes_per_token > 2
    monkeypatch.setattr(text, "learn", None)
    assert torch.equal(data.load(book, vocab_size=30_000).train, first.train)
    book.write_text(WORDS * 99)
    with pytest.raises(TypeError):  # it would be learned anew
        data.load(book, vocab_size=30_000)


def test_the_tokens_of_a_text_never_change(book):
    """Or runs could not be resumed."""
    assert data.load(book).fingerprint() == {
        "vocab_size": 257, "train_tokens": 19151, "val_tokens": 2141,
        "crc32": 3900963330, "val_crc32": 3950360619}


# ---------------------------------------------------------------- texts

def test_the_standard_library_is_split_by_file():
    stdlib = data.load("stdlib")
    root, files = text.stdlib_files()
    assert root / "argparse.py" in files
    assert not any("test" in path.parts for path in files)
    docs = text.documents(root, files, skip_undecodable=True)
    train, val = text.split(docs)
    assert sorted(train + val) == sorted(docs)
    assert stdlib.decode(stdlib.val) == "".join(f"<|bos|>{words}" for _, words in val)
    assert 0.04 < len(stdlib.val) / len(stdlib.train) < 0.12


def test_one_file_is_cut_at_a_line_end(book):
    """And line ends or a byte order mark of Windows change nothing."""
    wanted = book.read_text()
    book.write_bytes(b"\xef\xbb\xbf" + wanted.replace("\n", "\r\n").encode())
    corpus = data.load(book)
    train, val = corpus.decode(corpus.train), corpus.decode(corpus.val)
    assert (train + val).replace("<|bos|>", "") == wanted
    assert train.endswith("\n")
    assert 0.08 < len(val) / len(wanted) < 0.12


def test_a_folder_is_split_by_file(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for i in range(12):
        (folder / "sub" / f"{i}.md").write_text(f"document {i}. {WORDS * 20}<|bos|>")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / ".hidden.txt").write_text("secret")
    corpus = data.load(folder)
    train, val = corpus.decode(corpus.train), corpus.decode(corpus.val)
    for i in range(12):
        assert (f"document {i}." in train) != (f"document {i}." in val)
    assert "document" in val
    assert "secret" not in train + val
    starts = torch.cat([corpus.train, corpus.val]) == corpus.bos
    assert starts.sum() == 12  # where a text says <|bos|>, that is ordinary text


def test_utf16_is_named(book):
    book.write_text(WORDS, encoding="utf-16")
    with pytest.raises(UserError, match="is UTF-16 text; save it as UTF-8"):
        data.load(book)


# ---------------------------------------------------------------- batches

COUNT = torch.cat([torch.tensor([99]), torch.arange(60)])  # a bos, then 0, 1, 2, ...
COUNTING = data.Corpus("counting", vocab_size=100, bos=99, train=COUNT, val=COUNT[:20])


@pytest.mark.parametrize("corpus", [COUNTING, data.load("copy")], ids=["text", "task"])
def test_a_batch_is_windows_and_their_next_tokens_drawn_from_the_generator(corpus):
    for seq_len in (1, 17):
        x, y = corpus.batch(64, seq_len, generator(3))
        assert x.shape == y.shape == (64, seq_len)
        assert torch.equal(x[:, 1:], y[:, :-1])
        torch.rand(3)
        again = corpus.batch(64, seq_len, generator(3))
        assert torch.equal(again[0], x)
        assert torch.equal(again[1], y)
        other = corpus.batch(64, seq_len, generator(4))
        assert not torch.equal(other[1], y)


@pytest.mark.parametrize("split, last", [("train", 58), ("val", 17)])
def test_windows_of_text_start_at_ordinary_tokens_and_reach_the_end(split, last):
    x, y = COUNTING.batch(4000, 8, generator(), split, bos=0)
    assert torch.equal(y, x + 1)
    assert (x.min(), y.max()) == (0, last)


def test_a_share_of_windows_begins_with_bos_and_is_else_the_same():
    x, _ = COUNTING.batch(2000, 8, generator(1), bos=0.25)
    share = (x[:, 0] == 99).float().mean()
    assert abs(share - 0.25) < 0.04
    x0, _ = COUNTING.batch(16, 12, generator(5), bos=0)
    x1, y1 = COUNTING.batch(16, 12, generator(5), bos=1)
    assert (x1[:, 0] == 99).all()
    assert torch.equal(y1, x0)


def test_repeated_windows_show_a_passage_over_and_over():
    x, _ = COUNTING.batch(64, 40, generator(3), bos=0, repeat=1)
    for row in x:
        assert any(torch.equal(row[n:], row[:-n]) for n in range(8, 21))


def test_windows_for_another_model_share_no_token_and_are_dealt_out():
    batches = windows.text_windows(range(1000), 4, 4, 60)
    for x, y in batches:
        assert x.shape == (4, 60)
        assert torch.equal(y, x + 1)
    starts = torch.stack([x[:, 0] for x, _ in batches], 1)  # (windows, batches)
    starts = starts.flatten()
    assert (starts.diff() >= 60).all()
    assert starts[-1] > 900  # the last one is near the end of the text
    with pytest.raises(UserError, match="960 tokens, too few for 16 windows of 60"):
        windows.text_windows(range(960), 4, 4, 60)


# ---------------------------------------------------------------- the copying task

def test_a_window_repeats_a_passage_from_anywhere():
    task = tasks.Copy()
    drawn = task.windows(800, 65, generator())
    assert (drawn[3::4] < task.K).all()  # every fourth one repeats nothing
    shares = []
    for row in drawn[0::4]:
        span = int((row < task.K).sum())
        passage = row[:span].repeat(9)
        copied = row[span:] - task.K
        begins = [b for b in range(span) if torch.equal(passage[b:b + 65 - span], copied)]
        shares.append(begins[0] / span)
    assert 0.4 < np.mean(shares) < 0.5


def all_windows(length):
    """{every window of two letters and all its beginnings: its chance}, passages of 1, 2 or 3."""
    chance = Counter()

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
    return chance


def test_the_bayes_loss_of_the_copying_task_is_exact():
    task, length = tasks.Copy("ab"), 9
    chance = all_windows(length)
    possible = [window for window in chance if len(window) == length]
    loss = task.token_loss(np.array(possible))
    for window, row in zip(possible, loss):
        for t in range(length):
            before, now = chance[window[:t]], chance[window[:t + 1]]
            assert row[t] == pytest.approx(-math.log(now / before), abs=1e-9)
    weights = [chance[window] for window in possible]
    mean = np.average(loss.mean(1), weights=weights)
    assert task.position_loss(length).mean() == pytest.approx(mean, abs=0.02)


def test_the_loss_of_an_impossible_window_is_infinite():
    window = np.array([[0, 1, 2, 1, 0]])
    assert tasks.Copy("ab").token_loss(window)[0, 3] == math.inf


def test_the_optimal_loss_is_that_of_the_windows():
    corpus = data.load("copy")
    sample = corpus.task.windows(4000, 65, generator(9))
    losses = corpus.task.token_loss(sample.numpy())[:, 1:].mean(1)
    error = losses.std() / 4000**0.5
    optimum = corpus.optimal_loss(64, bos=0)
    assert abs(optimum - losses.mean()) < 4 * error
    assert corpus.optimal_loss(64, bos=1) > optimum  # one more letter is new


def test_the_task_encodes_its_symbols():
    corpus = data.load("copy")
    assert corpus.encode("abC") == [0, 1, 18]
    assert corpus.decode([32, 0, 17]) == "<|bos|>aB"
    with pytest.raises(UserError, match="'é' is not a symbol"):
        corpus.encode("aé")


# ---------------------------------------------------------------- the task in which heads rest

def test_what_the_targets_of_rest_are():
    task = data.load("rest").task
    x, y = task.batch(400, 16, generator(3))
    trigger = x >= task.K
    assert not trigger[:, :2].any()
    assert trigger[:, 2:].float().mean() == pytest.approx(0.25, abs=0.03)
    assert (y[:, 0] == -100).all()
    assert torch.equal(y[:, 1:][trigger[:, 1:]], x[:, :-1][trigger[:, 1:]])
    drawn = torch.bincount(y[:, 1:][~trigger[:, 1:]]) / (~trigger[:, 1:]).sum()
    assert drawn.tolist() == pytest.approx([1 / 16] * 16, abs=0.015)  # whatever stands there


def test_resting_queries_are_late_letters():
    task = data.load("rest").task
    x = torch.zeros(1, 8, dtype=torch.long)
    x[0, 5] = task.K
    assert task.resting(x)[0].tolist() == [False, False, True, True, True, False, True, True]


def test_the_optimum_of_rest_is_that_of_who_knows_the_task():
    task = data.load("rest").task
    x, y = task.batch(50, 16, generator(4))
    p = torch.full((*x.shape, 16), 1 / 16)
    before = torch.nn.functional.one_hot(x.roll(1, 1), 16).float()
    p = torch.where((x >= task.K)[..., None], before, p)
    nats = torch.nn.functional.nll_loss(p.log().flatten(0, 1), y.flatten(), ignore_index=-100)
    assert task.optimal_loss(x) == pytest.approx(nats.item(), abs=1e-5)
