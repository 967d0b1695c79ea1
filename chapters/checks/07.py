"""Checks of chapter 07."""

import torch
import torch.nn.functional as F

from lesson import models, windows, written_without
from model import make_tap
import probe


def prediction(answer):
    names = ("softmax", "sigmoid", "headnorm", "gated")
    assert set(answer) <= set(names), f"Names out of {', '.join(names)}."
    assert set(answer) - {"gated"} == {"softmax", "headnorm"}, \
        ("Read the first number of each line: who is above 0.3? (Gated lies near it: "
         "both answers count.)")


def head_norm(answer):
    written_without(answer, "RMSNorm", "rms_norm")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, 3, 8, generator=generator)
    z[:, :, 1] *= 100  # a loud head
    gain = torch.linspace(0.5, 2, 8)
    got = answer(z, torch.ones(8))
    assert got is not None, "Return a tensor of the shape of z."
    assert got.shape == z.shape, "The shape must stay (B, T, H, D)."
    squares = got.square().mean(-1)
    assert torch.allclose(squares, torch.ones(2, 5, 3), atol=1e-3), \
        "Each head of each token has mean square 1: take the mean over D alone."
    cosine = F.cosine_similarity(got, z, dim=-1)
    assert cosine.min() > 0.999, "Only divide: RMSNorm subtracts no mean."
    assert torch.allclose(answer(z, gain), got * gain, atol=1e-5), \
        "The gain multiplies the D entries after the division."
    nothing = answer(torch.zeros(1, 1, 1, 4), torch.ones(4))
    assert nothing.abs().max() == 0, "A zero vector stays zero: what is eps for?"
    small = torch.full((1, 1, 1, 4), 1e-3)
    half = answer(small, torch.ones(4), eps=3e-6)
    assert (half - 0.5).abs().max() < 1e-3, "eps is added under the root."


@torch.no_grad()
def longer(answer):
    assert answer in (2, 5, 10, 20), "One of 2, 5, 10, 20."
    model = models("tiny-softmax")["tiny-softmax"]
    x, y = windows("bos")

    def loss(times):
        edit = probe.at_token(0, lambda v: times * v[:, 0])
        edits = {f"{i}.v": edit for i in range(len(model.layers))}
        tap = make_tap(model.cfg, edits)
        return model(x, y, tap=tap)[1].item()

    costly = [times for times in (2, 5, 10, 20) if loss(times) > loss(1) + 0.1]
    assert answer == costly[0], "Measure the loss with each of them."
