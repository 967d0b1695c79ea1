"""Checks of chapter 03."""

import torch

from lesson import english, random_tokens, real
from model import make_tap, record

PAIR = [1229, 1487]  # layer 11 of SmolLM2
DIMENSION = 507  # where they write


def prediction(answer):
    assert answer in ("untouched", "silent"), 'Answer "untouched" or "silent".'
    assert answer == "untouched", \
        "Look at the last text. At which token do the two neurons write at all?"


def twin(answer):
    model, _ = real()
    given = random_tokens(2, 12, seed=3)[0]
    got = answer(given.clone())
    assert got is not None, "Return windows (N, T)."
    assert got.shape == given.shape, "Return windows of the same shape."
    assert (got[:, 0] == given[:, 0]).all(), "Leave the first token as it is."
    assert (got != given).sum(1).max() <= 1, "Change one token of a window, no more."
    post = record(model, got, ["11.mlp_post"])[1]["11.mlp_post"][..., PAIR]
    assert torch.allclose(post[:, 1], post[:, 0], rtol=0.01, atol=0.01), \
        "Token 1 averages its own value with that of token 0. When is that no change?"


@torch.no_grad()
def rescue(answer):
    model, _ = real()
    x, y = english(2)

    def silence(a):
        a = a.clone()
        a[..., PAIR] = 0
        return a

    written = []

    def change(out):
        got = answer(out.clone())
        assert got is not None, "Return the changed tensor (N, T, C)."
        changed = (got != out).flatten(1).sum(1)
        most = int(changed.max())
        assert most <= 1, f"You changed {most} numbers of a window."
        written.append(got)
        return got

    tap = make_tap(model.cfg, {"11.mlp_post": silence, "11.mlp_out": change})
    loss, whole = model(x, y, tap)[1].item(), model(x, y)[1].item()
    assert loss < whole + 0.3, (f"The loss is {loss:.2f}, untouched {whole:.2f}. Which "
                                "number do the two neurons make large, and how large?")
    usual = record(model, x, ["11.mlp_out"])[1]["11.mlp_out"]
    share = written[0][:, 0, DIMENSION] / usual[:, 0, DIMENSION]
    assert (share - 1).abs().max() < 0.1, \
        ("The loss is back, but a guess does that too: your number is "
         f"{share.mean():.0%} of what the untouched MLP adds. Measure with `record` "
         "what the two neurons wrote, and come within a tenth of it.")
