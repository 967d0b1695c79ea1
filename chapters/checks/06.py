"""Checks of chapter 06."""

import torch
import torch.nn.functional as F

from lesson import random_tokens, real
from model import make_tap
import probe


def prediction(answer):
    names = ("variance", "W_O", "neurons", "disparity", "direction", "lock")
    assert set(answer) <= set(names), f"Use only these names: {', '.join(names)}."
    assert "W_O" not in answer, \
        "`W_O` keeps the direction of z_0, and that is enough for the neurons."
    missing = set(names) - {"W_O"} - set(answer)
    assert not missing, f"Look at the bars: {', '.join(sorted(missing))} as well."


def mean_square(z):
    return z.square().sum(1).mean().item()


def shift_to(answer):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 6, generator=generator)
    z += torch.tensor([2.0, 0, 0, -1, 0, 0])
    got = answer(z, 40.0)
    assert got is not None, "Return the shifted vectors, (N, D)."
    assert got.shape == z.shape, "As many vectors as before, of the same width."
    assert torch.allclose(got - got.mean(0), z - z.mean(0), atol=1e-4), \
        "Deviations have changed: add one vector to every window, do not multiply."
    assert abs(mean_square(got) - 40) < 0.01, \
        "Mean squared length is that of the mean plus the variance of all dimensions."
    along = F.cosine_similarity(got.mean(0), z.mean(0), dim=0)
    assert along > 0.999, "Shift along the mean, not against it."
    same = answer(z, mean_square(z))
    assert torch.allclose(same, z, atol=1e-3), "It has that length already."


def alone_mask(answer):
    got = answer(6, [2, 4])
    assert got is not None, "Return a boolean tensor of shape (T, T)."
    right = got.dtype == torch.bool and got.shape == (6, 6)
    assert right, "The model takes a boolean mask of shape (T, T)."
    wanted = torch.ones(6, 6, dtype=torch.bool)
    wanted[[2, 4]] = torch.eye(6, dtype=torch.bool)[[2, 4]]
    assert torch.equal(got[[2, 4]], wanted[[2, 4]]), \
        "Row t says what query t may look at."
    assert torch.equal(got, wanted), "The others may still look at all tokens."
    assert answer(5, []).all(), "If no token is alone, everything is allowed."


def first_layer(answer):
    """A mask in the layers before the answer is too little; with it, it is enough."""
    assert type(answer) is int and 0 <= answer < 30, "A layer, from 0 to 29."
    model, _ = real()
    x, _ = random_tokens(4)
    k, wanted = 10, [probe.metric("sink")]

    def attention(last):
        """(L - 1, H) to token 0 and to token k, alone in the layers up to `last`."""
        def alone(scores):
            return probe.see_only_itself(scores, k, None, None)

        edit = probe.at_token(k, alone, 2)
        tap = make_tap(model.cfg, {f"{i}.scores": edit for i in range(last + 1)})
        both = probe.layers(model, x, tap, ks=(0, k), wanted=wanted)[0]
        return [probe.later(found["sink"]) for found in both]

    first, tenth = attention(-1)
    resting = probe.has_sink(first)
    usual = tenth[resting].mean().item()
    uniform = probe.uniform_sink(x.shape[1])

    def share(last):
        """Of the two sinks, how much token k has."""
        first, tenth = attention(last)
        gain = max(tenth[resting].mean().item() - usual, 0)
        left = max(first[resting].mean().item() - uniform, 0)
        return gain / (gain + left)

    assert share(answer) >= 0.4, "That is not enough: mask more layers."
    assert answer == 0 or share(answer - 1) < 0.4, "Fewer layers do as well."
