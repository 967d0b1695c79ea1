"""Checks of the exercises of chapter 00."""

import torch
from lesson import written_without


def sink_score(answer):
    written_without(answer, "sink_score", "uniform_sink")
    pattern = torch.tril(torch.ones(4, 4)) / torch.arange(1, 5)[:, None]  # uniform
    first = (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    assert abs(float(answer(pattern, 0)) - first) < 1e-6, \
        "For k = 0 take the mean of the whole first column."
    assert abs(float(answer(pattern, 2)) - (1 / 3 + 1 / 4) / 2) < 1e-6, \
        ("Queries before k cannot see it: leave them out of the mean, or a late key "
         "could never be a sink.")
    pattern[3] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert abs(float(answer(pattern, 0)) - (1 + 1 / 2 + 1 / 3) / 4) < 1e-6, \
        "A query that sees the key and gives it nothing counts as well."


def hidden(answer):
    mask = answer(6, 2)
    assert mask.shape == (6, 6), "Return a tensor of shape (T, T)."
    assert mask.dtype == torch.bool, "Return a tensor of True and False."
    assert mask.any(-1).all(), "Every query needs a key: token `key` still sees itself."
    assert not mask[3:, 2].any(), "Queries after `key` must not see it."
    rest = [0, 1, 3, 4, 5]
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    same = torch.equal(mask.tril()[:, rest], causal[:, rest])
    assert same, "All other keys stay in sight."
    assert mask[2, 2], "Token `key` itself still sees itself."


def prediction(answer):
    assert type(answer) is int or answer == "nowhere", 'Give a number, or "nowhere".'
    assert answer == 1, ("Look at the scores above. Which token now sees only itself, "
                         "as the first one did?")
