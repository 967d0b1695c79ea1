"""Synthetic tasks whose perfect predictor is known, so that a loss can be read as a distance from it.

In both, some queries must look back and others have nothing to copy, so that a head must rest. That is
where attention sinks grow within minutes (Guo et al. 2024, arXiv 2410.13835).

A task makes windows of symbols. Besides the tokens it tells, for each one, whether it is a copy
that somebody who knows the task could have foreseen.
"""
import functools

import numpy as np
import torch

from . import text
from .errors import DataError


class Task:
    """A source of windows over the ids 0 .. K-1, one character of `symbols` each; <|bos|> is id K."""
    symbols: str

    def windows(self, n: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Fresh windows: tokens (n, length) int64 and copied (n, length) bool."""
        raise NotImplementedError

    def token_loss(self, tokens: np.ndarray) -> np.ndarray:
        """(n, length) nats: -log p(s_t | s_<t) of these windows for somebody who knows the task."""
        raise NotImplementedError

    def position_loss(self, length: int) -> np.ndarray:
        """(length,) nats: what `token_loss` is on average over all windows, position by position."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """The ids of a string of symbols. DataError names the first character that is none."""
        for symbol in text:
            if symbol not in self.symbols:
                raise DataError(f"{symbol!r} is not a symbol of this task; it has {self.symbols!r}")
        return [self.symbols.index(symbol) for symbol in text]

    def decode(self, ids: list[int]) -> str:
        return "".join("<|bos|>" if i == len(self.symbols) else self.symbols[i] for i in ids)


class Copy(Task):
    """In-context copying: a window shows one random passage over and over, as an induction head likes it.

    Its length L is uniform from an eighth to three eighths of the window, its symbols are uniform. `copied`
    is true from the second showing on. While the first lasts there is nothing to copy: heads must rest.
    """

    def __init__(self, symbols: str = "abcdefghijklmnopqrstuvwx"):
        self.symbols = symbols

    def _spans(self, length):
        """All the lengths that a passage may have, (n,)."""
        return np.arange(max(1, length // 8), max(2, 3 * length // 8 + 1))

    def windows(self, n, length, generator):
        spans = torch.from_numpy(self._spans(length))
        span = spans[torch.randint(len(spans), (n,), generator=generator)][:, None]
        passage = torch.randint(len(self.symbols), (n, length), generator=generator)
        at = torch.arange(length)
        return passage.gather(1, at % span), at >= span

    def token_loss(self, tokens):
        """Bayes' rule over L: `p(s_t | s_<t) = sum_L p(L | s_<t) p(s_t | L)`, the last factor being 1 or 0 after
        the first showing, and 1 / K within it."""
        n, length = tokens.shape
        spans = self._spans(length)
        belief = np.full((n, len(spans)), 1 / len(spans))
        loss = np.empty((n, length))
        for at in range(length):
            again = tokens[:, np.maximum(at - spans, 0)] == tokens[:, at, None]
            belief = belief * np.where(at < spans, 1 / len(self.symbols), again)
            seen = belief.sum(1, keepdims=True)
            with np.errstate(divide="ignore"):  # infinite, from where a window cannot be one of the task
                loss[:, at], belief = -np.log(seen[:, 0]), belief / np.maximum(seen, 1e-300)
        return loss

    @functools.cache
    def position_loss(self, length):
        """The mean of `token_loss` over a fixed sample with equally many windows of each L, as chance repeats
        leave no closed form. The error is below 0.001 nats."""
        spans = self._spans(length)
        spans = np.repeat(spans, 2048 // len(spans) + 1)[:, None]
        passage = torch.randint(len(self.symbols), (len(spans), length), generator=torch.Generator().manual_seed(0)).numpy()
        return self.token_loss(np.take_along_axis(passage, np.arange(length) % spans, 1)).mean(0)


class Bigram(Task):
    """Bigram-Backcopy (Guo et al. 2024, arXiv 2410.13835): a Markov chain with trigger symbols.

    The next symbol depends on the last one by a table, except after a trigger: then it is the symbol
    that stood before the trigger. A window starts with a symbol that is no trigger, so there always
    is one to copy, and two triggers never meet. `copied` is true after a trigger.

    The table holds the frequencies of character pairs in the standard library, of its 64 most common
    characters, in units of 1/4096 (so sampling is one look-up, and the task is the same rounded
    table). The triggers are its three most common letters.
    """
    UNIT = 4096

    def __init__(self):
        self.symbols, counts = _pair_counts()
        letters = sorted(filter(str.isalpha, self.symbols), key=lambda s: -counts[self.symbols.index(s)].sum())
        self.triggers = [self.symbols.index(s) for s in letters[:3]]
        first = counts.sum(1)
        first[self.triggers] = 0
        # (K + 1, K) probabilities of the next symbol; the last row, that of <|bos|>, is for the first.
        self.table = np.stack([_round(row, self.UNIT) for row in [*counts, first]])
        # (K + 1, UNIT) the same as a list to draw from: symbol k stands there UNIT * table[., k] times.
        self._draw = np.stack([np.repeat(np.arange(len(self.symbols)), row) for row in self.table])
        self.table = self.table / self.UNIT

    def windows(self, n, length, generator):
        chances = torch.randint(self.UNIT, (length, n), generator=generator).numpy()
        trigger = np.zeros(len(self.symbols) + 1, bool)
        trigger[self.triggers] = True
        tokens = np.empty((length, n), np.int64)
        before, last = None, np.full(n, len(self.symbols))
        for at in range(length):
            tokens[at] = self._draw[last, chances[at]]
            if at:
                np.copyto(tokens[at], before, where=trigger[last])
            before, last = last, tokens[at]
        copied = np.zeros((length, n), bool)
        copied[1:] = trigger[tokens[:-1]]
        return torch.from_numpy(tokens.T.copy()), torch.from_numpy(copied.T.copy())

    def token_loss(self, tokens):
        after = np.pad(tokens, ((0, 0), (1, 0)), constant_values=len(self.symbols))[:, :-1]
        with np.errstate(divide="ignore"):
            loss = -np.log(self.table[after, tokens])
        return np.where(np.isin(after, self.triggers), 0, loss)

    def position_loss(self, length):
        """Exact: the probability of each pair of neighbours, carried from position to position.

        After a trigger the loss is 0, after any other symbol the entropy of its row.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.nansum(self.table * np.log(self.table), axis=1)  # (K + 1,)
        entropy[self.triggers] = 0
        loss = [entropy[-1]]
        table, last = self.table[:-1], self.table[-1]  # last (K,): how probable is each last symbol
        pair = np.zeros_like(table)  # (before, last); empty at first, as no trigger can be last then
        for _ in range(length - 1):
            loss.append(last @ entropy[:-1])
            following = last[:, None] * table  # (last, next)
            following[self.triggers] = pair.T[self.triggers]  # next = before
            pair, last = following, following.sum(0)
        return np.array(loss)


@functools.cache
def _pair_counts() -> tuple[str, np.ndarray]:
    """The 64 most common characters of the standard library and (64, 64) counts of their pairs."""
    whole = "\n".join(t for _, t in text.documents(*text.stdlib_files(), skip_undecodable=True))
    raw = np.frombuffer(whole.encode("ascii", "replace"), np.uint8)
    common = np.argsort(-np.bincount(raw, minlength=256), kind="stable")[:64]
    index = np.full(256, 64)
    index[common] = np.arange(64)
    ids = index[raw]
    pairs = np.bincount(ids[:-1] * 65 + ids[1:], minlength=65 * 65).reshape(65, 65)[:64, :64]
    return "".join(map(chr, common)), pairs.astype(float)


def _round(weights: np.ndarray, unit: int) -> np.ndarray:
    """Integers in proportion to the weights that add up to `unit`, by largest remainders."""
    exact = weights / weights.sum() * unit
    parts = np.floor(exact).astype(int)
    parts[np.argsort(parts - exact, kind="stable")[:unit - parts.sum()]] += 1
    return parts


TASKS = {"copy": Copy, "bigram": Bigram}
