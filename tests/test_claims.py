"""The claims: the rule that judges, the committed numbers, and a real Llama measured afresh."""

import csv

import pytest
import torch

import probe
from data.common import read_json
from data.windows import random_windows
from model import GPT
from tests import claims, real
from tests.tiny import near, tiny_model, tokens


@pytest.mark.parametrize("values, kind, margin, verdict", [
    ([3, 4, 5], "at least", 3, (3, "shown")),
    ([3, 1, 5], "at least", 3, (2, "partly")),
    ([0.1, 0.4, float("nan")], "at most", 0.2, (1, "not here"))])
def test_verdict_of_a_row(values, kind, margin, verdict):
    assert claims.judge(values, kind, margin) == verdict


@pytest.mark.parametrize("words, verdict", [
    (["shown", "shown"], "shown"), (["shown", "not here"], "partly"),
    (["partly", "not here"], "partly"), (["not here", "not here"], "not here")])
def test_verdict_of_a_claim(words, verdict):
    assert claims.word_of([{"word": word} for word in words]) == verdict


def test_value_at():
    unit = {"softmax": {"a": {"b": [1, 6]}, "c": 4}, "sigmoid": {"c": 2}}
    assert claims.value_at(unit, "a.b.1 over sigmoid.c") == 3
    assert claims.value_at(unit, "c minus sigmoid.c") == 2


def test_every_unit_is_there():
    rows = claims.tests_of(read_json(claims.FILE))
    with claims.HYPOTHESES.open(encoding="utf-8") as file:
        assert len(rows) == sum(len(row["lanes"].split()) for row in csv.DictReader(file))
    for row in rows:
        whole = claims.LANES[row["lane"]]
        if row["lane"] == "SmolLM2":
            assert len(row["values"]) in (whole / 2, whole), row["measure"]
        else:
            assert len(row["values"]) == whole, row["measure"]


def test_a_spread_is_of_batches_or_of_seeds():
    values = [1.0, 2.0, 3.0]
    assert claims.in_words(values, "SmolLM2") == "2.00 ± 1.00"
    assert claims.in_words(values, "text") == "2.00 ± 2.48"  # 4.303 / sqrt 3
    assert claims.in_words(values[:1], "text") == "1.00"


def test_numbers_are_of_the_token_that_they_name():
    model, x = tiny_model(), tokens(6, 16)
    found = claims.numbers(model, x, x)
    assert near(found["ordinary"]["sink"], probe.chain(model, x, k=8)["sink"])
    row, *_ = probe.cuts(model, x, x, k=5, names=("forge variance",))
    forged = claims.effects(model, x, x, k=5, names=("forge variance",))["forge variance"]
    for when in ("before", "after"):
        assert forged[when] == row[when][1]["sink"]


@torch.no_grad()
def test_rows_that_write():
    """W_O has its long rows where the state is wide, and its long columns elsewhere."""
    model, wide = tiny_model(num_hidden_layers=1), torch.linspace(1, 4, 32)
    model.embed_tokens.weight.mul_(wide)
    model.layers[0].self_attn.o_proj.weight.copy_(torch.diag(wide).roll(9, 1))
    assert claims.rows_that_write(model, tokens(8)) > 0.7


@pytest.mark.slow
def test_smollm2_on_fresh_windows():
    """The core of the chain, on windows that no committed number rests on."""
    model = GPT.from_llama(real.folder()).eval()
    windows = random_windows(8, claims.T, model.cfg.vocab_size, seed=1000)
    first = claims.numbers(model, *windows)["first"]
    assert first["sink"] > 0.8
    assert first["sink_rate"] > 0.5
    assert first["norm_ratio"] > 100
    names = ("cut neurons", "cut lock", "forge variance", "forge W_O")
    for name, effect in claims.effects(model, *windows, names=names).items():
        whole = probe.WHOLE[name.split()[0]]
        assert effect["share"] > whole > 2 * max(effect["controls"]), (name, effect)
