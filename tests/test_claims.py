"""The claims: the rule that judges, the committed numbers, and a real Llama measured afresh."""

import math

import pytest
import torch

import probe
from data.common import read_json
from data.windows import random_windows
from model import GPT
from tests import claims, real
from tests.tiny import tiny_model

FOUND = read_json(claims.FILE)


def test_verdicts_follow_the_rule():
    assert claims.judge([3, 4, 5], 3, None) == (3, "shown")
    assert claims.judge([3, 1, 5], 3, None) == (2, "partly")
    assert claims.judge([0.1, 0.4, float("nan")], None, 0.2) == (1, "not here")
    words = [{"word": w} for w in ("shown", "partly", "not here")]
    assert [claims.word_of(w) for w in (words[:1], words[1:], words[2:])] == [
        "shown", "partly", "not here"]
    assert {claim for claim, *_ in claims.CLAIMS} == set(claims.SAYS)


def test_every_unit_is_there():
    for lane, count in claims.UNITS.items():
        units = claims.units(FOUND, lane)
        assert len(units) == count
        attentions = {"softmax"} if lane == "SmolLM2" else set(claims.ATTENTIONS)
        assert all(set(unit) == attentions for unit in units)
    for row in claims.tests_of(FOUND):
        assert len(row["values"]) == claims.UNITS[row["lane"]], row["what"]


def test_agreement_keeps_mean_and_variance():
    """Both forms of Q7 have one mean and variance, head by head; only one keeps heads together."""
    x = torch.randint(50, (64, 16), generator=torch.Generator().manual_seed(0))
    seen = {}
    model = tiny_model().eval()
    make_tap = probe.make_tap

    def spy(cfg, edits):
        seen[len(seen)] = edits["0.z"](torch.zeros(64, 16, 4, 8))[:, 10]
        return make_tap(cfg, edits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "make_tap", spy)
        found = claims.agreement(model, x)
    one, apart = seen.values()
    assert torch.allclose(one.mean(0), apart.mean(0), atol=1e-5)
    assert torch.allclose(one.var(0), apart.var(0), atol=1e-4) and not torch.equal(one, apart)
    assert all(math.isfinite(v) for v in found.values())


@pytest.mark.slow
def test_smollm2_on_fresh_windows():
    """The core of the chain, on windows that no committed number rests on."""
    model = GPT.from_llama(real.folder()).eval()
    x, y = random_windows(8, claims.T, model.cfg.vocab_size, seed=1000)
    numbers = claims.numbers(model, x, y)["first"]
    assert numbers["sink"] > 0.8 and numbers["sink_rate"] > 0.5 and numbers["norm_ratio"] > 100
    names = ("cut neurons", "cut lock", "forge variance", "forge W_O")
    found = claims.effects(model, x, y, names=names)
    for name in names:
        whole = 0.5 if name.startswith("cut") else 0.25
        assert found[name]["share"] > whole > 2 * max(found[name]["controls"]), (name, found[name])
