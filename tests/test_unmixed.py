"""tests/unmixed.py: each edit sets the mean and the deviation that its name says."""

import pytest
import torch
from torch.nn.functional import normalize

import probe
from tests import unmixed
from tests.tiny import activation, near, tiny_model, tokens

K = 5
MODEL, X = tiny_model(num_hidden_layers=4).eval(), tokens(6)
MEAN = unmixed.mean_alone(MODEL, torch.arange(50))
Z = activation(MODEL, X, "0.z")
KNOWN = unmixed.Alone(MEAN, unmixed.alone(MODEL, X[:, K]))
OWN = KNOWN.own[0] - MEAN[0]  # the deviation of each token
USUAL = Z[:, [t for t in range(24) if t != K]].mean((0, 1))


def test_the_first_token_sees_only_itself():
    first = unmixed.alone(MODEL, X[:, 0])
    assert near(Z[:, 0], first[0])
    assert near(MEAN[0], unmixed.alone(MODEL, torch.arange(50))[0].mean(0))


@pytest.mark.parametrize("name, wanted", [
    ("mean only", MEAN[0]), ("deviation only", USUAL + OWN), ("both", MEAN[0] + OWN),
    ("neither", USUAL)])
def test_forgery(name, wanted):
    assert near(unmixed.FORGERIES[name](Z, K, KNOWN, 0), wanted)


def test_shrunk():
    deviation = unmixed.shrunk(Z, K, KNOWN, 0) - MEAN[0]
    by_token = probe.variance(Z)
    usual = torch.cat([by_token[:K], by_token[K + 1:]]).mean()
    factor = (usual / by_token[K]).sqrt().clamp(max=1)
    assert near(deviation, factor * OWN)


def test_a_random_move_goes_as_far():
    moved = unmixed.random_forgery(Z, K, KNOWN, 0) - Z[:, K]
    assert near(length(moved), length(MEAN[0] - Z[:, K]))


def test_mu_is_taken_apart():
    parts = unmixed.along(Z, K, KNOWN, 0) + unmixed.across(Z, K, KNOWN, 0) - USUAL
    assert near(parts, MEAN[0])


def length(x):
    """(N,)"""
    return x.flatten(1).norm(dim=1)


def test_a_turned_write_keeps_its_length():
    top = probe.targets(MODEL, X)[0].neurons
    before = activation(MODEL, X, "0.mlp_out")
    after = activation(MODEL, X, "0.mlp_out", unmixed.turn_write(MODEL, top))
    write = MODEL.layers[0].mlp.down_proj.weight[:, top[0]]
    written = activation(MODEL, X, "0.mlp_post")[:, 0, top[0]] @ write.T
    turned = after[:, 0] - before[:, 0] + written
    assert near(length(turned), length(written))
    direction = normalize(turned)
    assert near(direction, direction[0])
    assert torch.equal(after[:, 1:], before[:, 1:])


def test_both_parts_forge_what_seeing_only_itself_forges():
    asked = torch.arange(24).expand(6, -1) != K  # token k looks at nothing but itself
    row, *_ = probe.cuts(MODEL, X, X, K, names=("forge variance",), queries=asked)
    shares = unmixed.shares(MODEL, X, MEAN, K, asked)
    assert near(shares["forge, every: both"], probe.share(row, 24))


def test_another_first_token_is_that_of_another_window():
    shares = unmixed.shares(MODEL, X[:1].expand(6, -1), MEAN, K)
    assert near(shares["cut, every: another first token"], 0)


def test_neurons_answer_at_token_k():
    """As they do at token 0, where it is the same token and both its parts are forged."""
    x = X.clone()
    x[:, K] = x[:, 0]
    found = unmixed.answers(MODEL, x, MEAN, K)
    assert near(found["both"], 1, 1e-3)
    assert not near(found["neither"], 1, 0.1)


def test_how_many_neurons_are_silent(monkeypatch):
    post = activation(MODEL, X, "0.mlp_post")

    def count(self, kind, tap):
        return (tap("0.mlp_post", post)[:, 0] == 0).all(0).sum().item()
    monkeypatch.setattr(unmixed.Sinks, "share", count)
    found = unmixed.neurons_at_0(MODEL, X, K)
    assert [found[name] for name in ("6 to 10", "all others", "turned")] == [5, 35, 0]
