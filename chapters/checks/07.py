"""Checks of chapter 07."""

import torch

from lesson import models, windows, written_without
from model import make_tap
import probe


def prediction(answer):
    names = ("softmax", "sigmoid", "headnorm", "gated")
    assert set(answer) <= set(names), f"Names out of {', '.join(names)}."
    assert set(answer) == {"softmax", "headnorm", "gated"}, \
        "Read the first number of each line: who is above 0.3?"


def head_norm(answer):
    written_without(answer, "RMSNorm", "rms_norm")
    z = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    z[:, :, 1] *= 100  # a loud head
    gain = torch.linspace(0.5, 2, 8)
    got = answer(z, torch.ones(8))
    assert got is not None, "Return a tensor of the shape of z."
    assert got.shape == z.shape, "The shape must stay (B, T, H, D)."
    assert torch.allclose(got.square().mean(-1), torch.ones(2, 5, 3), atol=1e-3), \
        "Each head of each token has mean square 1: take the mean over D alone."
    assert torch.allclose(answer(z, gain), got * gain, atol=1e-5), \
        "The gain multiplies the D entries after the division."
    assert answer(torch.zeros(1, 1, 1, 4), torch.ones(4)).abs().max() == 0, \
        "A zero vector stays zero: what is eps for?"
    small = answer(torch.full((1, 1, 1, 4), 1e-3), torch.ones(4), eps=3e-6)
    assert small[0, 0, 0, 0].sub(0.5).abs() < 1e-3, "eps is added under the root."


@torch.no_grad()
def longer(answer):
    assert answer in (2, 5, 10, 20), "One of 2, 5, 10, 20."
    model, (x, y) = models("tiny-softmax")["tiny-softmax"], windows("bos")
    untouched = model(x, y)[1].item()
    for times in (2, 5, 10, 20):
        edit = probe.at_token(0, lambda v, times=times: times * v[:, 0])
        edits = {f"{i}.v": edit for i in range(len(model.layers))}
        if model(x, y, tap=make_tap(model.cfg, edits))[1].item() > untouched + 0.1:
            break
    assert answer == times, "Measure the loss with each of them."
