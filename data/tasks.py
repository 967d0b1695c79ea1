"""A synthetic task whose perfect predictor is known: a loss can be read as a distance from it.

Some queries must look back and others have nothing to copy, so that a head must rest. That is where
attention sinks grow within minutes (Guo et al. 2024, arXiv 2410.13835).
"""
import functools

import numpy as np
import torch

from .border import UserError


class Copy:
    """In-context copying: a window shows one random passage over and over, as an induction head
    likes it. Token ids are 0 .. K-1, one character of `symbols` each; <|bos|> is id K.

    The passage's length L is uniform from an eighth to three eighths of the window, its symbols are
    uniform. While the first showing lasts there is nothing to copy: heads must rest.
    """

    def __init__(self, symbols: str = "abcdefghijklmnopqrstuvwx"):
        self.symbols = symbols

    def _spans(self, length: int) -> np.ndarray:
        """All the lengths that a passage may have, (n,)."""
        return np.arange(max(1, length // 8), max(2, 3 * length // 8 + 1))

    def windows(self, n: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Fresh windows of tokens, (n, length) int64."""
        spans = torch.from_numpy(self._spans(length))
        span = spans[torch.randint(len(spans), (n,), generator=generator)][:, None]
        passage = torch.randint(len(self.symbols), (n, length), generator=generator)
        return passage.gather(1, torch.arange(length) % span)

    def token_loss(self, tokens: np.ndarray) -> np.ndarray:
        """(n, length) nats: -log p(s_t | s_<t) of these windows for somebody who knows the task.

        Bayes' rule over L: `p(s_t | s_<t) = sum_L p(L | s_<t) p(s_t | L)`, the last factor being 1
        or 0 after the first showing, and 1 / K within it.
        """
        n, length = tokens.shape
        spans = self._spans(length)
        belief = np.full((n, len(spans)), 1 / len(spans))
        loss = np.empty((n, length))
        for at in range(length):
            again = tokens[:, np.maximum(at - spans, 0)] == tokens[:, at, None]
            belief = belief * np.where(at < spans, 1 / len(self.symbols), again)
            seen = belief.sum(1, keepdims=True)
            with np.errstate(divide="ignore"):  # infinite, where a window cannot be of the task
                loss[:, at] = -np.log(seen[:, 0])
            belief = belief / np.maximum(seen, 1e-300)
        return loss

    @functools.cache
    def position_loss(self, length: int) -> np.ndarray:
        """(length,) nats: the mean of `token_loss` over a fixed sample with equally many windows of
        each L, as chance repeats leave no closed form. The error is below 0.001 nats."""
        spans = self._spans(length)
        spans = np.repeat(spans, 2048 // len(spans) + 1)[:, None]
        fixed = torch.Generator().manual_seed(0)
        passage = torch.randint(len(self.symbols), (len(spans), length), generator=fixed).numpy()
        return self.token_loss(np.take_along_axis(passage, np.arange(length) % spans, 1)).mean(0)

    def encode(self, text: str) -> list[int]:
        """The ids of a string of symbols. UserError names the first character that is none."""
        for symbol in text:
            if symbol not in self.symbols:
                raise UserError(f"{symbol!r} is not a symbol of this task; it has {self.symbols!r}")
        return [self.symbols.index(symbol) for symbol in text]

    def decode(self, ids: list[int]) -> str:
        return "".join([*self.symbols, "<|bos|>"][i] for i in ids)


TASKS = {"copy": Copy}
