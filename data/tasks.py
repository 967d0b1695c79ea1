"""Synthetic tasks whose perfect predictor is known: a loss can be read as a distance from it.

Some queries must look back and others have nothing to look for, so that a head must rest. That is
where attention sinks grow within minutes (Guo et al. 2024, arXiv 2410.13835).
"""
import functools
import math

import numpy as np
import torch

from .common import UserError


class Copy:
    """In-context copying: a window shows a random passage once in lower case, then over and over in
    upper case, beginning anywhere in it; a quarter of the windows shows lower case only.

        hbnkeamdjcKEAMDJCHBNKEAMDJCHBNKE...   ogfjbkdnaimhpcelbdjkagfinemo...

    Token ids: 0 .. K-1 lower case, K .. 2K-1 upper case, then <|bos|>. The passage's length L is
    uniform from an eighth to three eighths of the window, its letters and the place where the
    repeats begin are uniform too.

    The case tells a query whether there is something to look for: a gate that sees nothing but its
    query can know when to close. The repeats begin anywhere, because where they begin with the
    first token, heads look at it to read it. Its letter is of no use here. Its place is: how long
    the passage has lasted tells whether it may end, and rotary positions tell only distances, so
    that a model measures from the first token (chapter 08).
    """

    def __init__(self, letters: str = "abcdefghijklmnop"):
        self.symbols = letters + letters.upper()
        self.K = len(letters)

    def spans(self, length: int) -> np.ndarray:
        """All the lengths that a passage may have in a window of this length, (n,)."""
        shortest = max(1, length // 8)
        longest = max(1, 3 * length // 8)
        return np.arange(shortest, longest + 1)

    def rest(self, n: int, length: int, generator) -> torch.Tensor:
        """Windows that repeat nothing, so that every query rests, (n, length) int64."""
        return torch.randint(self.K, (n, length), generator=generator)

    def windows(self, n: int, length: int, generator) -> torch.Tensor:
        """Fresh windows of tokens, (n, length) int64; every fourth one repeats nothing."""
        spans = self.spans(length)
        chosen = torch.randint(len(spans), (n,), generator=generator)
        span = torch.from_numpy(spans)[chosen]
        span[3::4] = length
        return self.copies(span, length, generator)

    def copies(self, span: torch.Tensor, length: int, generator) -> torch.Tensor:
        """Windows whose passages have these lengths, (n,) -> (n, length) int64."""
        n = len(span)
        span = span[:, None]
        passage = self.rest(n, length, generator)
        share = torch.rand(n, 1, generator=generator)
        begin = (share * span).long()
        at = torch.arange(length)
        again = at >= span  # (n, length)
        source = torch.where(again, (at + begin) % span, at)
        letters = passage.gather(1, source)
        return letters + self.K * again  # upper case where it repeats

    def token_loss(self, tokens: np.ndarray) -> np.ndarray:
        """(n, length) nats: -log p(s_t | s_<t) of these windows for somebody who knows the task.

        Bayes' rule over the length L and the place b where the repeats begin:
        `p(s_t | s_<t) = sum_Lb p(L, b | s_<t) p(s_t | L, b)`, the last factor being 1 / K for lower
        case at t < L, 1 for the letter at (t + b) mod L in upper case at t >= L, and else 0.
        """
        n, length = tokens.shape
        spans = self.spans(length)
        hypotheses = [(L, b) for L in spans for b in range(L)]
        hypotheses.append((length, 0))  # nothing is repeated
        span, begin = np.array(hypotheses).T
        belief = 0.75 / len(spans) / span  # (hypotheses,), soon (n, hypotheses)
        belief[-1] = 0.25
        loss = np.empty((n, length))
        for at in range(length):
            now = tokens[:, at, None]
            source = np.minimum((at + begin) % span, at)
            letter = tokens[:, source]
            copied = letter + self.K == now
            fresh = (now < self.K) / self.K
            belief = belief * np.where(at < span, fresh, copied)
            likelihood = belief.sum(1)
            loss[:, at] = -np.log(likelihood)
            belief = belief / likelihood[:, None]
        return loss

    @functools.cache
    def position_loss(self, length: int) -> np.ndarray:
        """(length,) nats: the mean of `token_loss` over a fixed sample with equally many windows of
        each L, as letters that repeat by chance leave no closed form. Its error is below 0.005."""
        spans = self.spans(length)
        times = 256 // len(spans) + 1
        span = torch.from_numpy(spans).repeat_interleave(times)
        n = len(span) // 3  # a quarter of all, then
        unrepeated = torch.full((n,), length)
        span = torch.cat([span, unrepeated])
        fixed = torch.Generator().manual_seed(0)
        tokens = self.copies(span, length, fixed)
        return self.token_loss(tokens.numpy()).mean(0)

    def encode(self, text: str) -> list[int]:
        """The ids of a string of symbols. UserError names a character that is none."""
        unknown = set(text) - set(self.symbols)
        if unknown:
            raise UserError(f"{min(unknown)!r} is not a symbol of this task; it has "
                            f"{self.symbols!r}")
        return [self.symbols.index(symbol) for symbol in text]

    def decode(self, ids: list[int]) -> str:
        symbols = [*self.symbols, "<|bos|>"]
        return "".join(symbols[i] for i in ids)


class Rest:
    """A head must rest: at a trigger the target is the symbol before it, elsewhere it is random.

        tokens    g a W c l X h ...
        targets   - ? a ? ? l ? ...      (?: drawn anew, so that targets are no next tokens)

    Token ids: 0 .. K-1 letters, then the triggers, then <|bos|>, which is never shown. Tokens are
    independent and uniform, but for the first two, which are letters. So the first token is an
    ordinary one, its letter tells nothing and its place is of no use. Where the target is random
    the best answer is a constant, and a head has nothing to look for: it must rest. The first query
    has no target, because it sees nothing but itself.
    """

    def __init__(self, letters: str = "abcdefghijkl", triggers: str = "WXYZ"):
        self.symbols = letters + triggers
        self.K = len(letters)

    def batch(self, n: int, length: int, generator):
        """Fresh windows and their targets, x and y (n, length) int64; -100 stands for no target."""
        V = len(self.symbols)
        x = torch.randint(V, (n, length), generator=generator)
        x[:, :2] = torch.randint(self.K, (n, 2), generator=generator)
        y = torch.randint(V, (n, length), generator=generator)
        before = x.roll(1, dims=1)
        y = torch.where(x >= self.K, before, y)
        y[:, 0] = -100
        return x, y

    def resting(self, x: torch.Tensor) -> torch.Tensor:
        """(n, length) bool: queries that rest, letters from a quarter of the window on. Earlier
        ones have few keys to choose from."""
        late = torch.arange(x.shape[1], device=x.device) >= x.shape[1] // 4
        return (x < self.K) & late

    encode, decode = Copy.encode, Copy.decode  # letters and ids, by self.symbols
    rest = Copy.rest  # windows without a trigger

    def optimal_loss(self, x: torch.Tensor) -> float:
        """Nats per target of a perfect predictor in windows x: 0 at a trigger, ln V elsewhere."""
        letters = (x[:, 1:] < self.K).float()  # the first query has no target
        return letters.mean().item() * math.log(len(self.symbols))


TASKS = {"rest": Rest, "copy": Copy}
