"""Checks of chapter 07."""

import torch
import torch.nn.functional as F

from lesson import TASK, models, windows, written_without
from model import ATTENTIONS, record
import probe


def prediction(answer):
    assert isinstance(answer, list), "Give a list of names."
    names = ", ".join(ATTENTIONS)
    assert set(answer) <= set(ATTENTIONS), f"Names out of {names}."
    assert set(answer) == {"sigmoid", "gated", "logit"}, \
        "Whose dots in the figure are all left of twice the dotted line?"


def head_norm(answer):
    written_without(answer, "RMSNorm", "rms_norm")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, 3, 8, generator=generator)
    z[:, :, 1] *= 100  # a loud head
    gain = torch.linspace(0.5, 2, 8)
    got = answer(z, torch.ones(8))
    assert got is not None, "Return a tensor of the shape of z."
    assert got.shape == z.shape, "The shape must stay (N, T, H, D)."
    cosine = F.cosine_similarity(got, z, dim=-1)
    assert cosine.min() > 0.999, "Only divide: RMSNorm subtracts no mean."
    squares = got.square().mean(-1)
    assert torch.allclose(squares, torch.ones(2, 5, 3), atol=1e-3), \
        "Each head of each token has mean square 1: take the mean over D alone."
    assert torch.allclose(answer(z, gain), got * gain, atol=1e-5), \
        "The gain multiplies the D entries after the division."
    nothing = answer(torch.zeros(1, 1, 1, 4), torch.ones(4))
    assert nothing.abs().max() == 0, "A zero vector stays zero: what is eps for?"
    small = torch.full((1, 1, 1, 4), 1e-3)
    half = answer(small, torch.ones(4), eps=3e-6)
    assert (half - 0.5).abs().max() < 1e-3, "eps is added under the root."


@torch.no_grad()
def mask(answer):
    assert isinstance(answer, torch.Tensor) and answer.dtype == torch.bool, \
        "A tensor of True and False, say torch.ones(16, 16, dtype=torch.bool)."
    assert answer.shape == (16, 16), "A row for each query, a column for each key."
    hidden = torch.ones(16, 16).tril().bool() & ~answer  # later keys are hidden anyhow
    assert not hidden.diagonal().any(), "Each token must go on seeing itself."
    assert hidden.any(0).sum() == 1, "Hide one token from others, and only one."
    model, (x, _) = models("softmax")["softmax"], windows("rest", 256)
    pattern = record(model, x, ["2.pattern"], mask=answer)[1]["2.pattern"]
    weight = probe.sink_score(pattern, 1, TASK.resting(x)).mean().item()
    assert weight > 0.8, \
        f"{weight:.2f} of the attention is on token 1. Who sees only itself?"
