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


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A file of about 20,000 characters, every line another; and a cache for each test."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}: {WORDS}" for i in range(200)))
    return path


# ---------------------------------------------------------------- tokens

@pytest.mark.parametrize("vocab_size", [257, 300])
@pytest.mark.parametrize("prompt", ["", "日本語 🙂\0\x7f\r\n\t x  \n", "<|bos|>", " " * 999])
def test_any_text_round_trips(book, vocab_size, prompt):
    corpus = data.load(book, vocab_size=vocab_size)
    ids = corpus.encode(prompt)
    assert corpus.decode(ids) == prompt
    assert corpus.bos not in ids


def test_a_vocabulary_is_learned_once(book, monkeypatch):
    first = data.load(book, vocab_size=30_000)
    assert 257 < first.vocab_size < 1000  # the text supports no more
    monkeypatch.setattr(text, "learn", None)
    assert torch.equal(data.load(book, vocab_size=30_000).train, first.train)


def test_the_tokens_of_a_text_never_change(book):
    """Or runs could not be resumed."""
    assert data.load(book).fingerprint() == {
        "vocab_size": 257,
        "train_tokens": 19151,
        "val_tokens": 2141,
        "crc32": 3900963330,
        "val_crc32": 3950360619}


# ---------------------------------------------------------------- texts

def test_the_standard_library_is_read_without_its_tests():
    root, files = text.stdlib_files()
    assert root / "argparse.py" in files
    assert not any("test" in path.parts for path in files)


def test_one_file_is_cut_at_a_line_end(book):
    """And line ends or a byte order mark of Windows change nothing."""
    wanted = book.read_text()
    book.write_bytes(b"\xef\xbb\xbf" + wanted.replace("\n", "\r\n").encode())
    corpus = data.load(book)
    train, val = corpus.decode(corpus.train), corpus.decode(corpus.val)
    assert (train + val).replace("<|bos|>", "") == wanted
    assert train.endswith("\n")


def test_a_very_long_line_is_cut():
    [(_, train)], [(_, val)] = text.split([("name", "title\n" + "x" * 994)])
    assert (len(train), len(val)) == (900, 100)


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
    assert "secret" not in train + val
    starts = torch.cat([corpus.train, corpus.val]) == corpus.bos
    assert starts.sum() == 12  # where a text says <|bos|>, that is ordinary text


# ---------------------------------------------------------------- batches

COUNT = torch.cat([torch.tensor([99]), torch.arange(60)])  # a bos, then 0, 1, 2, ...
COUNTING = data.Corpus("counting", vocab_size=100, bos=99, train=COUNT, val=COUNT[:20])


@pytest.mark.parametrize("corpus", [COUNTING, data.load("copy")], ids=["text", "task"])
def test_a_batch_is_windows_and_their_next_tokens_drawn_from_the_generator(corpus):
    x, y = corpus.batch(64, 17, generator(3))
    assert x.shape == y.shape == (64, 17)
    assert torch.equal(x[:, 1:], y[:, :-1])
    torch.rand(3)  # of another generator
    again, _ = corpus.batch(64, 17, generator(3))
    assert torch.equal(again, x)


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
    assert (starts.flatten().diff() >= 60).all()
    with pytest.raises(UserError, match="too few for 16 windows of 60"):
        windows.text_windows(range(960), 4, 4, 60)


# ---------------------------------------------------------------- the copying task

def all_windows(length):
    """{a window of two letters, or the beginning of one: its chance}, passages of 1, 2 or 3."""
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
    corpus = data.Corpus("ab", vocab_size=5, bos=4, task=task)
    for bos, seen in ((0, loss[:, 1:]), (1, loss[:, :-1])):
        mean = np.average(seen.mean(1), weights=weights)
        assert corpus.optimal_loss(length - 1, bos) == pytest.approx(mean, abs=0.02)


def test_windows_of_the_copying_task_are_as_frequent_as_said():
    drawn = Counter()
    for window in tasks.Copy("ab").windows(20_000, 9, generator()).tolist():
        drawn[tuple(window)] += 1
    chance = all_windows(9)
    for window in drawn:
        assert drawn[window] / 20_000 == pytest.approx(chance[window], abs=0.01)


# ---------------------------------------------------------------- the task in which heads rest

def test_what_the_targets_of_rest_are():
    task = data.load("rest").task
    x, y = task.batch(400, 16, generator(3))
    trigger = x >= task.K
    assert not trigger[:, :2].any()
    assert trigger[:, 2:].float().mean() == pytest.approx(0.25, abs=0.03)
    assert (y[:, 0] == -100).all()
    trigger, before, target = trigger[:, 1:], x[:, :-1], y[:, 1:]
    assert torch.equal(target[trigger], before[trigger])
    count = torch.bincount(target[~trigger])
    share = count / count.sum()
    assert share.tolist() == pytest.approx([1 / 16] * 16, abs=0.015)  # whatever stands there


def test_resting_queries_are_late_letters_and_only_letters_cost():
    task = data.load("rest").task
    x = torch.zeros(1, 8, dtype=torch.long)
    x[0, 5] = task.K
    assert task.resting(x)[0].nonzero().flatten().tolist() == [2, 3, 4, 6, 7]
    assert task.optimal_loss(x) == pytest.approx(6 / 7 * math.log(16))  # the first has no target
