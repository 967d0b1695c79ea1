"""Checks of chapter 05."""

import torch
import torch.nn.functional as F

from lesson import random_tokens, real, written_without
from model import RMSNorm
import probe


def prediction(answer):
    assert answer in ("fall", "stay", "rise"), 'Answer "fall", "stay" or "rise".'
    assert answer == "rise", \
        "Most queries like this key. What does a longer key do to its logits?"


@torch.no_grad()
def norm_limit(answer):
    gamma = torch.linspace(0.5, 2.0, 12)
    got = answer(gamma, 3, 1)
    assert got is not None, "Return a vector of the shape of gamma."
    assert got.shape == gamma.shape, "One number for each dimension."
    single = (got != 0).sum() == 1 and got[3] != 0
    assert single, "Beside infinity all other dimensions vanish. Which one is left?"
    for c, sign in ((3, 1), (0, -1), (11, -1)):
        norm, state = RMSNorm(12, 1e-5), torch.ones(12)
        norm.weight.copy_(gamma)
        state[c] = sign * 1e6
        assert torch.allclose(answer(gamma, c, sign), norm(state), atol=1e-3), \
            "What is the root mean square of one entry among zeros? And the gain?"


def common_direction(answer):
    written_without(answer, "leading_query")
    generator = torch.Generator().manual_seed(3)
    fixed = F.normalize(torch.randn(8, generator=generator), dim=0)
    q = 3 * fixed + torch.randn(500, 8, generator=generator)
    got = answer(q)
    assert got is not None, "Return the leading right singular vector of q."
    assert got.shape == (8,), "One vector of width D: the right singular vectors."
    assert abs(float(got.norm()) - 1) < 1e-4, "It has to be a unit vector."
    assert abs(float(got @ fixed)) > 0.98, \
        "Take the vector of the largest singular value; do not subtract the mean."
    mixed = torch.cat((-q[:5], q))  # the first query is not on the side of the mean
    turned = got @ fixed > 0 and answer(-q) @ fixed < 0 and answer(mixed) @ fixed > 0
    assert turned, "A singular vector has no sign: turn it towards the mean query."
    few, wanted = q[:5], probe.leading_query(q[:5, None, None])[0]
    assert torch.allclose(answer(few), wanted, atol=1e-4), \
        "Five queries (M < D) have another one. Is yours the mean query?"


def unlock(answer):
    model, _ = real()
    x, _ = random_tokens(4)
    queries = {}

    def tap(name, value):
        layer, _, what = name.rpartition(".")
        if what == "q":
            queries[layer] = value
        if what != "k" or not 12 <= int(layer) < 28:
            return value
        got = answer(value.clone(), queries[layer])
        assert got is not None, "Return the changed keys (N, T, K, D)."
        assert torch.equal(got[:, 1:], value[:, 1:]), "Change the keys of token 0 only."
        before, after = value[:, 0].norm(dim=-1), got[:, 0].norm(dim=-1)
        assert torch.allclose(before, after, rtol=0.01), "They must stay as long."
        return got

    wanted = [probe.metric("sink")]
    sinks = probe.layers(model, x, tap, wanted=wanted)[0][0]["sink"]
    found = sinks[12:28].mean().item()
    assert found < 0.15, (f"Attention to token 0 is {found:.2f}. On which side of the "
                          "queries should the key lie?")
