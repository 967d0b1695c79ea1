"""Checks of chapter 06."""

import torch

from lesson import random_tokens, real
from model import make_tap
import probe


def prediction(answer):
    names = ("variance", "W_O", "neurons", "disparity", "direction", "lock")
    assert set(answer) <= set(names), f"Names out of {', '.join(names)}."
    assert "W_O" not in answer, "A usual length takes nothing: RMSNorm forgets it."
    missing = {"variance", "neurons", "direction", "lock"} - set(answer)
    assert not missing, f"Look at the bars: {', '.join(sorted(missing))} as well."


def shift_to(answer):
    z = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    z += torch.tensor([2.0, 0, 0, -1, 0, 0])
    got = answer(z, 40.0)
    assert got is not None, "Return the shifted vectors, (N, D)."
    assert got.shape == z.shape, "As many vectors as before, of the same width."
    assert torch.allclose(got - got.mean(0), z - z.mean(0), atol=1e-4), \
        "Deviations have changed: add one vector to every window, do not multiply."
    assert abs(got.square().sum(1).mean().item() - 40) < 0.01, \
        "Mean squared length is that of the mean plus the variance of all dimensions."
    along = got.mean(0) @ z.mean(0) / got.mean(0).norm() / z.mean(0).norm()
    assert along > 0.999, "Shift along the mean, not against it."
    now = z.square().sum(1).mean().item()
    assert torch.allclose(answer(z, now), z, atol=1e-3), "It has that length already."


def alone_mask(answer):
    got = answer(6, [2, 4])
    assert got is not None, "Return a boolean tensor of shape (T, T)."
    right = got.dtype == torch.bool and got.shape == (6, 6)
    assert right, "The model takes a boolean mask of shape (T, T)."
    assert got[2].tolist() == [s == 2 for s in range(6)], "Rows are queries."
    assert got[[0, 1, 3, 5], 2].all(), "The others may still look at token 2."
    assert answer(5, []).all(), "Nobody alone: everything is allowed."


def first_layer(answer):
    """Layers before the answer are too few, layers up to it enough."""
    assert type(answer) is int and 0 <= answer < 30, "A layer, from 0 to 29."
    (model, _), (x, _), k = real(), random_tokens(4), 10
    wanted = [probe.metric("sink")]

    def attention(last):
        edit = probe.at_token(k, lambda s: probe.see_only_itself(s, k, None, None), 2)
        tap = make_tap(model.cfg, {f"{i}.scores": edit for i in range(last + 1)})
        both = probe.layers(model, x, tap, ks=(0, k), wanted=wanted)[0]
        return [probe.later(found["sink"]) for found in both]

    free = attention(-1)
    resting, uniform = free[0] > probe.SINK, probe.uniform_sink(x.shape[1])

    def share(last):
        first, tenth = (a[resting].mean().item() for a in attention(last))
        gain = max(tenth - free[1][resting].mean().item(), 0)
        return gain / (gain + max(first - uniform, 0))

    assert share(answer) >= 0.4, "That is not enough: mask more layers."
    assert answer == 0 or share(answer - 1) < 0.4, "Fewer layers do as well."
