"""A synthetic task whose perfect predictor is known: a loss can be read as a distance from it.

Some queries must look back and others have nothing to look for, so that a head must rest. That is
where attention sinks grow within minutes (Guo et al. 2024, arXiv 2410.13835).
"""
import functools

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
    that a model measures from the first token (chapter 07).
    """

    def __init__(self, letters: str = "abcdefghijklmnop"):
        self.symbols = letters + letters.upper()
        self.K = len(letters)

    def _spans(self, length: int) -> np.ndarray:
        """All the lengths that a passage may have, (n,)."""
        return np.arange(max(1, length // 8), max(2, 3 * length // 8 + 1))

    def rest(self, n: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Windows that repeat nothing, so that every query rests, (n, length) int64."""
        return torch.randint(self.K, (n, length), generator=generator)

    def windows(self, n: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Fresh windows of tokens, (n, length) int64; every fourth one repeats nothing."""
        spans = torch.from_numpy(self._spans(length))
        span = spans[torch.randint(len(spans), (n,), generator=generator)]
        span[3::4] = length
        return self._show(span[:, None], length, generator)

    def _show(self, span: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
        """Windows whose passages have these lengths, (n, 1) -> (n, length) int64."""
        passage = self.rest(len(span), length, generator)
        begin = (torch.rand(len(span), 1, generator=generator) * span).long()
        at = torch.arange(length)
        again = at >= span
        return passage.gather(1, torch.where(again, (at + begin) % span, at)) + self.K * again

    def token_loss(self, tokens: np.ndarray) -> np.ndarray:
        """(n, length) nats: -log p(s_t | s_<t) of these windows for somebody who knows the task.

        Bayes' rule over the length L and the place b where the repeats begin:
        `p(s_t | s_<t) = sum_Lb p(L, b | s_<t) p(s_t | L, b)`, the last factor being 1 / K for lower
        case at t < L, 1 for the letter at (t + b) mod L in upper case at t >= L, and else 0.
        """
        n, length = tokens.shape
        spans = self._spans(length)
        span = np.append(np.repeat(spans, spans), length)  # a pair (L, b) each; the last: no repeat
        begin = np.append(np.concatenate([np.arange(L) for L in spans]), 0)
        belief = np.tile(np.append(0.75 / len(spans) / span[:-1], 0.25), (n, 1))
        loss = np.empty((n, length))
        for at in range(length):
            now = tokens[:, at, None]
            copied = tokens[:, np.minimum((at + begin) % span, at)] + self.K == now
            belief = belief * np.where(at < span, (now < self.K) / self.K, copied)
            seen = belief.sum(1, keepdims=True)
            with np.errstate(divide="ignore"):  # infinite, where a window cannot be of the task
                loss[:, at] = -np.log(seen[:, 0])
            belief = belief / np.maximum(seen, 1e-300)
        return loss

    @functools.cache
    def position_loss(self, length: int) -> np.ndarray:
        """(length,) nats: the mean of `token_loss` over a fixed sample with equally many windows of
        each L, as letters that repeat by chance leave no closed form. Its error is below 0.005."""
        spans = self._spans(length)
        spans = np.repeat(spans, 256 // len(spans) + 1)
        span = np.append(spans, [length] * (len(spans) // 3))  # with them a quarter
        fixed = torch.Generator().manual_seed(0)
        tokens = self._show(torch.from_numpy(span)[:, None], length, fixed)
        return self.token_loss(tokens.numpy()).mean(0)

    def encode(self, text: str) -> list[int]:
        """The ids of a string of symbols. UserError names the first character that is none."""
        for symbol in text:
            if symbol not in self.symbols:
                raise UserError(f"{symbol!r} is not a symbol of this task; it has {self.symbols!r}")
        return [self.symbols.index(symbol) for symbol in text]

    def decode(self, ids: list[int]) -> str:
        return "".join([*self.symbols, "<|bos|>"][i] for i in ids)


TASKS = {"copy": Copy}
