"""Checks of chapter 07."""

import torch
import torch.nn.functional as F

from lesson import TASK, models, windows, written_without
from model import ATTENTIONS, make_tap
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


def weights_with_logit(answer):
    scores = torch.tensor([[0.0, 1.0, -2.0], [3.0, 3.0, 3.0]])
    got = answer(scores, 0.5)
    assert got is not None, "Return a tensor of the shape of scores."
    assert got.shape == scores.shape, "One weight for each key that is there."
    total = scores.exp().sum(-1, keepdim=True) + torch.tensor(0.5).exp()
    wanted = scores.exp() / total
    assert torch.allclose(got, wanted, atol=1e-6), \
        "The denominator is exp(b) plus the sum over the keys of one query."
    four = answer(scores.expand(2, 3, 2, 3), 0.5)
    assert torch.allclose(four, wanted.expand(2, 3, 2, 3), atol=1e-6), \
        "Scores may have more axes in front, as in (N, H, T, T)."
    large = answer(torch.tensor([[200.0, 0.0]]), 0.0)
    assert large.isfinite().all(), "exp(200) is too large: append b, then softmax."


@torch.no_grad()
def longer(answer):
    model = models("softmax")["softmax"]
    x, _ = windows("rest", 256)
    resting = TASK.resting(x)

    def excess(times):
        edit = probe.at_token(0, lambda v: times * v[:, 0])
        tap = make_tap(model.cfg, {"2.v": edit})
        log_p = model(x, tap=tap)[0].log_softmax(-1)[..., :len(TASK.symbols)]
        best = torch.tensor(len(TASK.symbols)).log()
        return (-log_p.mean(-1) - best)[resting].mean().item()

    factor = round(excess(16) / excess(8))
    assert answer == factor, "A whole number: excess with 16, divided by excess with 8."
