"""tests/rest.py and tests/why.py: their criteria, and the models in which one thing is changed; and
what tests/cures.py measures."""

import math

import pytest
import torch

import probe
import train
from data.tasks import Rest
from tests import cures, rest, why
from tests.conftest import same
from tests.tiny import activation, near, tiny_model, tokens

UNIFORM = rest.uniform()


def run(weight, loss=0.0):
    """One seed whose heads give token 0 this weight."""
    weights = {"reaching": [weight] * 4}
    return {"weights": weights, "letters only": weights, "val_loss": loss,
            "loss": {"rest": loss, "trigger": 0.0}}


def seeds(weights, loss=0.0, first=10):
    return {str(first + i): run(weight, loss) for i, weight in enumerate(weights)}


@pytest.mark.parametrize("weights, loss, word", [
    ([0.0, 0.1, 2 * UNIFORM - 0.01], 0, "ends it"),
    ([0.0, 0.0, 0.5], 0, "takes most of it"),
    ([0.0, 0.0, 0.6], 0, "takes a part"),
    ([0.0, 0.0, 0.9], 0, "does not take it"),
    ([0.0, 0.0, 0.0], 0.02, "has not learned"),
])
def test_the_criteria_of_rest(weights, loss, word):
    grid = {"softmax": {"0.005": seeds([0.95] * 3)}, "gated": {"0.005": seeds(weights, loss)}}
    assert rest.verdict({"grid": grid}, "gated") == word


def test_windows_of_letters_only_count_as_well():
    gated = seeds([0.3] * 3)
    gated["10"]["letters only"] = {"reaching": [0.9] * 4}
    grid = {"softmax": {"0.005": seeds([0.95] * 3)}, "gated": {"0.005": gated}}
    assert rest.verdict({"grid": grid}, "gated") == "does not take it"


@pytest.mark.parametrize("weights, word", [
    ([0.0] * 8 + [0.95] * 2, "takes"),
    ([0.0] * 7 + [0.95] * 3, "the seeds disagree"),
    ([0.95] * 8 + [0.0] * 2, "leaves"),
    ([0.95] * 7, "too few seeds have learned"),
])
def test_the_criteria_of_why(weights, word, monkeypatch):
    monkeypatch.setattr(why, "read_json", lambda file: {"grid": {}})
    found = {"runs": {"softmax": seeds([0.97] * 10), "a variant": seeds(weights)}}
    assert why.verdict(found, "a variant") == word


class Perfect(torch.nn.Module):
    """Names the symbol before a trigger, and elsewhere all symbols alike."""

    def forward(self, x):
        logits = torch.zeros(*x.shape, 17)
        logits[..., 16] = -math.inf  # <|bos|> is never shown
        before = torch.nn.functional.one_hot(x.roll(1, dims=1), 17).bool()
        trigger = (x >= 12)[..., None]
        return logits.masked_fill(trigger & ~before, -math.inf), None


def test_a_perfect_predictor_has_no_loss_above_itself():
    task = Rest()
    x, y = task.batch(64, 16, torch.Generator().manual_seed(0))
    losses = rest.losses(Perfect(), task, x, y)
    assert losses["trigger"] == 0
    assert abs(losses["rest"]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name, least, most", [
    ("softmax", 5, 9), ("norm in layer 0", 1, 2.5), ("levelled", 0.8, 1.2)])
def test_what_a_variant_does_to_the_variance(name, least, most):
    """Of z in layer 0 before training, at token 0 over the median."""
    _, model, corpus = why.build(why.VARIANTS[name], seed=3)
    x = tokens(512, 16, vocab_size=corpus.task.K)
    z = activation(model, x, "0.z")
    assert least < probe.over_median(probe.variance(z), 0) < most


@torch.no_grad()
def test_a_levelled_value_that_is_nothing_stays_nothing():
    _, model, _ = why.build(why.VARIANTS["levelled"], seed=3)
    for block in model.layers:
        block.self_attn.v_proj.weight.zero_()
    assert activation(model, tokens(2, 16, vocab_size=12), "2.z").abs().max() == 0


def test_a_norm_stands_in_the_layers_that_are_named():
    _, model, _ = why.build(why.VARIANTS["norm in layers 0 and 2"], seed=3)
    assert [block.self_attn.attn for block in model.layers] == ["headnorm", "softmax", "headnorm"]


def test_why_trains_as_train_does(tmp_path, tiny_run, monkeypatch):
    """The same weights, in a run of two steps."""
    monkeypatch.setitem(train.SIZES["rest"], "steps", 2)
    monkeypatch.setattr(rest, "measure", lambda model, task: {"weights": model.state_dict()})
    found = why.train_and_measure("softmax", 10)["weights"]
    run = train.Run(seed=10, evals=0, out=str(tmp_path))
    assert same(found, train.train(run, say=lambda line: None).model.state_dict())


@torch.no_grad()
def test_windows_of_letters_only_have_no_triggers():
    """And where a head attends to all keys alike, its largest weight is that on token 0."""
    model = tiny_model(num_hidden_layers=1, vocab_size=17)
    model.layers[0].self_attn.q_proj.weight.zero_()
    found = rest.measure(model, Rest())
    assert all(found["weights"]["triggers"])
    assert not any(found["letters only"]["triggers"])
    for name in ("reaching", "largest"):
        assert near(found["letters only"][name], UNIFORM)
    assert near(sum(found["letters only"]["by key"]), 1)
    assert found["letters only"]["two symbols"] == [pytest.approx(2 / 12, abs=0.02)] * 4


# ---------------------------------------------------------------- tests/cures.py

def test_later_tokens_do_not_see_a_hidden_one():
    assert cures.hide(1, 3).int().tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 1]]


def test_a_ruler_that_begins_at_token_0(monkeypatch):
    """Hiding token 0 moves the curve by one place, and hiding another token does nothing."""
    free = torch.arange(9.0) ** 2
    curves = {None: free, 0: free.roll(1), 5: free}
    monkeypatch.setattr(cures, "ends", lambda model, x, hidden=None: curves[hidden])
    found = cures.ruler(None, None)
    assert found["hidden"] > found["hidden, moved by one"] == found["token 5 hidden"] == 0


@torch.no_grad()
def test_the_rank_of_states_that_have_a_dimension_each():
    model = tiny_model(num_hidden_layers=1, vocab_size=32)
    model.embed_tokens.weight.copy_(torch.eye(32))
    for writes in (model.layers[0].self_attn.o_proj, model.layers[0].mlp.down_proj):
        writes.weight.zero_()
    assert near(cures.rank(model, torch.arange(32).view(2, 16)), 32)
