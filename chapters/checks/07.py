"""Checks of chapter 07."""

import torch

from lesson import TASK, models, windows
from model import ATTENTIONS, record
import probe


def prediction(answer):
    assert isinstance(answer, list), "Give a list of names."
    names = ", ".join(ATTENTIONS)
    assert set(answer) <= set(ATTENTIONS), f"Names out of {names}."
    assert set(answer) == {"sigmoid", "gated", "logit"}, \
        "Whose dots in the figure are all left of twice the dotted line?"


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
