"""Synthetic tasks whose perfect predictor is known, so that a loss can be read as a distance from it.

In both, most queries have nothing to copy and a head must rest, while some must look back. That is
where attention sinks grow within a minute (Guo et al. 2024, arXiv 2410.13835).

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
    """In-context copying: a chain of segments, each fresh or a copy, as an induction head likes it.

    Heads or tails: a fresh segment, L ~ U{4..12} uniform symbols; or, from 4 tokens on, a copy of an
    earlier stretch, which starts at a uniformly drawn earlier position p that leaves at least 4
    tokens and has L ~ U{4..min(12, tokens from p on)}. The window's end cuts the last segment.

    `copied` is true from the second token of a copy on: nothing foretells the first.
    """
    SHORTEST, LONGEST = 4, 12

    def __init__(self, symbols: str = "abcdefghijklmnopqrstuvwx"):
        self.symbols = symbols

    def windows(self, n, length, generator):
        # Drawn at once, spent one by one: plain Python beats array tricks at this size.
        tokens = torch.randint(len(self.symbols), (n, length), generator=generator).tolist()
        draws = torch.rand(n, length // self.SHORTEST + 1, 3, generator=generator).tolist()
        copied = np.zeros((n, length), bool)
        for row, (window, chances) in enumerate(zip(tokens, draws)):
            at = 0
            for coin, place, size in chances:
                if at >= length:
                    break
                longest = self.LONGEST
                if copy := coin < 0.5 and at >= self.SHORTEST:
                    source = int(place * (at - self.SHORTEST + 1))
                    longest = min(longest, at - source)
                size = self.SHORTEST + int(size * (longest - self.SHORTEST + 1))
                size = min(size, length - at)
                if copy:
                    window[at:at + size] = window[source:source + size]
                    copied[row, at + 1:at + size] = True
                at += size
        return torch.from_numpy(np.array(tokens)), torch.from_numpy(copied)

    def token_loss(self, tokens):
        """Bayes' rule over the hidden state.

        The hidden state is "fresh, r symbols to come" or "copying, position p is next, r to come".
        We keep its exact probability given the tokens so far, fresh (n, r) and copy (n, p, r).
        """
        n, length = tokens.shape
        short, long = self.SHORTEST, self.LONGEST
        fresh = np.zeros((n, long + 1))
        copy = np.zeros((n, length + 1, long + 1))
        ended = np.ones(n)  # the probability that a new segment starts here
        new_fresh = np.zeros(long + 1)
        new_fresh[short:] = 1 / (long - short + 1)
        loss = np.empty((n, length))
        for at in range(length):
            new_copy = self._new_copy(at)  # (p, r)
            chance = 0.5 if at >= short else 0.0
            fresh += ended[:, None] * (1 - chance) * new_fresh
            copy[:, :at] += (ended * chance)[:, None, None] * new_copy
            # How probable is the token that came, in each state?
            fresh /= len(self.symbols)
            copy[:, :at] *= (tokens[:, :at] == tokens[:, at:at + 1])[:, :, None]
            seen = fresh.sum(1) + copy[:, :at].sum((1, 2))
            loss[:, at] = -np.log(seen)
            fresh /= seen[:, None]
            copy[:, :at] /= seen[:, None, None]
            # One symbol fewer to come, and one position further in the source.
            ended = fresh[:, 1] + copy[:, :at, 1].sum(1)
            fresh[:, 1:-1], fresh[:, -1] = fresh[:, 2:], 0
            copy[:, 1:at + 1, 1:-1] = copy[:, :at, 2:]
            copy[:, 0], copy[:, :, -1] = 0, 0
        return loss

    def _new_copy(self, at: int) -> np.ndarray:
        """(at, r) the probability that a copy which starts at token `at` has source p and length r."""
        start = np.zeros((at, self.LONGEST + 1))
        sources = at - self.SHORTEST + 1
        for p in range(sources):
            longest = min(self.LONGEST, at - p)
            start[p, self.SHORTEST:longest + 1] = 1 / sources / (longest - self.SHORTEST + 1)
        return start

    def copied_share(self, length: int) -> np.ndarray:
        """(length,) the exact probability that a token is `copied`, by following the segments."""
        short, long = self.SHORTEST, self.LONGEST
        starts, share = np.zeros(length + long + 1), np.zeros(length + long + 1)
        starts[0] = 1
        for at in range(length):
            chance = 0.5 if at >= short else 0.0
            sizes = self._new_copy(at).sum(0)
            for size in range(short, long + 1):
                copy = chance * sizes[size]
                share[at + 1:at + size] += starts[at] * copy
                starts[at + size] += starts[at] * (copy + (1 - chance) / (long - short + 1))
        return share[:length]

    @functools.cache
    def position_loss(self, length):
        """The mean of `token_loss` over a fixed sample, as there is no closed form.

        How much a window copies explains nearly all of the spread of its loss, and the expected
        amount is known. Taking out what the sample has too much of it (a control variate) leaves an
        error of about 0.002 nats instead of 0.013.
        """
        tokens, copied = self.windows(1024, length, torch.Generator().manual_seed(0))
        loss, share = self.token_loss(tokens.numpy()), copied.numpy().mean(1)
        excess = share - share.mean()
        slope = excess @ loss / (excess @ excess)  # (length,) nats per unit of share
        return loss.mean(0) - slope * (share.mean() - self.copied_share(length).mean())


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
