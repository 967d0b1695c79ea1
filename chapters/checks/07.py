"""Checks of chapter 07."""

import torch

from lesson import models, windows, written_without
from model import make_tap, record
import probe


def prediction(answer):
    names = ("softmax", "sigmoid", "headnorm", "gated")
    assert set(answer) <= set(names), f"Names out of {', '.join(names)}."
    assert set(answer) == {"softmax", "headnorm", "gated"}, \
        "Read the first row of the table: who is above 0.3?"


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


def attention_needed(answer):
    got = answer(0.5**0.5, 1.0)
    assert got is not None, "Return a between 0 and 1."
    assert abs(float(got) - 0.5) < 1e-6, "At 45 degrees both parts are equally long."
    assert abs(float(answer(0.0, 2.0))) < 1e-9, "No attention, no part along v_0."
    for cosine, d in ((0.9, 3.0), (0.9, 0.2), (0.99, 1.0)):
        a = float(answer(cosine, d))
        z = torch.tensor([a * d, 1 - a])
        assert abs(z[0] / z.norm() - cosine) < 1e-4, \
            "Divide both parts by 1 - a: what is the tangent of the angle?"


def raw_weight(answer):
    model, x = models("sigmoid")["sigmoid"], windows("rest")[0]
    names = [f"{i}.pattern" for i in range(1, len(model.layers))]
    patterns = torch.stack(list(record(model, x, names)[1].values()))
    scores = torch.stack([probe.sink_score(p, 0).mean(0) for p in patterns])
    layer, head = divmod(scores.argmax().item(), scores.shape[1])
    wanted = patterns[layer, :, head, 1:, 0].mean().item()
    share = scores[layer, head].item()
    assert abs(float(answer) - share) > 1e-3, "That is a share, of rows that sum to 1."
    assert abs(float(answer) - wanted) < 1e-3, "Mean over windows and queries 1 to 63."


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
