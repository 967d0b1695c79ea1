"""Checks of chapter 04."""

import math

import torch

from lesson import english, real
from model import make_tap


def prediction(answer):
    wanted = "zero", "mean", "both", "neither"
    assert answer in wanted, 'Answer "zero", "mean", "both" or "neither".'
    assert answer == "mean", "Compare the three losses above: a constant does as well."


def spike_for(answer):
    got = answer(1.0, 64)
    assert got is not None, "Return s. The mean is (s + width - 1) / width."
    assert abs(got - 1) < 1e-6, "All dimensions alike have DomRatio 1."
    for ratio, width in ((10.0, 64), (3.5, 8), (262.9, 4096)):
        state = torch.ones(width, dtype=torch.float64)
        state[-1] = answer(ratio, width)
        found = (state.max() / state.mean()).item()
        assert abs(found - ratio) < 0.01, \
            f"Your s gives DomRatio {found:.1f}, not {ratio}, for {width} dimensions."
    assert answer(64.0, 64) == answer(262.9, 64) == math.inf, \
        "DomRatio never reaches the width while the other dimensions are not 0."


@torch.no_grad()
def shorten(answer):
    model, _ = real()
    x, y = english(4)

    def change(state):
        got = answer(state.clone())
        assert got is not None, "Return the changed state (N, T, C)."
        assert torch.equal(got[:, 1:], state[:, 1:]), "Change token 0 only."
        part = (got[:, 0].norm(dim=-1) / state[:, 0].norm(dim=-1)).max().item()
        assert part < 0.101, f"Its length is still {part:.2f} of what it was."
        return got

    tap = make_tap(model.cfg, {"12.resid_pre": change})
    loss, whole = model(x, y, tap)[1].item(), model(x, y)[1].item()
    assert loss < whole + 0.3, (f"The loss is {loss:.2f}, untouched {whole:.2f}. What "
                                "does the RMSNorm before every layer keep of a state?")
