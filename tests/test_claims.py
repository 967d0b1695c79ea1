"""The claims that reproduce (`tests/claims.py`, README), on fresh seeds: directions, with margins that were fixed before.

Not among them: the order in time (Q1). It holds in all five seeds of the default, and failed in a fresh one with half the steps.
"""

import pytest

import probe
import train
from tests import claims
from train import Run

SEEDS = (100, 101, 102)
SHORT = {"tiny": dict(steps=1500, lr=5e-3), "micro": {}}  # text in one minute (README): what is asserted here is there by then


def test_verdicts_follow_the_rule():
    assert claims.judge([3, 4, 5], 3, None) == (3, "reproduced")
    assert claims.judge([3, 1, 5], 3, None) == (2, "partly")
    assert claims.judge([0.1, 0.4, float("nan")], None, 0.2) == (1, "not at this scale")
    assert {claim for claim, *_ in claims.CLAIMS} == set(claims.SAYS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """{size: [{attention: numbers} of a seed]} of models trained here: softmax in both lanes, sigmoid in text."""
    folder = tmp_path_factory.mktemp("claims")
    runs = [Run(attn=attn, size=size, seed=seed, **SHORT[size], out=str(folder / f"{size}-{attn}-{seed}"))
            for size, attn in (("tiny", "softmax"), ("tiny", "sigmoid"), ("micro", "softmax")) for seed in SEEDS]
    train.trained(*runs)
    found = {size: [{"main": main} for _ in SEEDS] for size, main in (("tiny", "bos"), ("micro", "random"))}
    for run in map(train.resolve, runs):
        numbers = claims.measure(("text" if run.size == "tiny" else "micro", run))
        found[run.size][SEEDS.index(run.seed)][run.attn] = numbers
    return found


def every(measured, number, sizes=tuple(SHORT)):
    return [number(r) for size in sizes for r in measured[size]]


@pytest.mark.slow
def test_first_token_is_a_variance_outlier(measured):
    """C1, C2: before any training, and whatever the tokens."""
    assert min(every(measured, claims.at("softmax", "variance_ratio_raw", "untrained", "random"))) > 2
    for size, kind in (("tiny", "ordinary"), ("micro", "copy")):
        assert min(every(measured, claims.at("softmax", "variance_ratio_raw", "untrained", kind), [size])) > 2


@pytest.mark.slow
def test_wo_favours_wide_directions(measured):
    """C3."""
    assert min(every(measured, claims.at("softmax", "wo_tau"))) > 0.1
    assert min(every(measured, claims.at("softmax", "wo_gain"))) > 1.2


@pytest.mark.slow
def test_few_neurons_write_the_first_token(measured):
    """C4."""
    assert min(every(measured, claims.at("softmax", "neuron_share_top5"))) > 0.5
    assert min(every(measured, claims.at("softmax", "neuron_z"))) > 4


@pytest.mark.slow
def test_bos_is_long_locked_on_and_a_sink(measured):
    """C5 and C7 of the text lane, after one minute."""
    text = lambda key: every(measured, claims.at("softmax", key), ["tiny"])
    before = every(measured, claims.at("softmax", "sink_alpha_later", "untrained"), ["tiny"])
    assert all(after > 1.5 * null for after, null in zip(text("sink_alpha_later"), before))
    assert min(text("sink_alpha_max")) > 0.25  # of the five seeds of the recipe none was below 0.39
    assert min(text("norm_ratio")) > 1.5 and min(text("lock_gap")) > 1 and max(text("value_drain")) < 0.8


@pytest.mark.slow
def test_sigmoid_has_no_sink_on_bos_and_a_higher_loss(measured):
    """C10 of the text lane."""
    for r in measured["tiny"]:
        assert r["sigmoid"]["trained"]["bos"]["sink_alpha_later"] < r["softmax"]["trained"]["bos"]["sink_alpha_later"]
        assert r["sigmoid"]["trained"]["bos"]["sink_alpha_later"] < probe.EPS
    assert sum(r["sigmoid"]["val_loss"] - r["softmax"]["val_loss"] for r in measured["tiny"]) > 0
    longer = lambda r, attn: r[attn]["loss_at"][1024] - r[attn]["loss_at"][64]
    assert all(longer(r, "sigmoid") > longer(r, "softmax") for r in measured["tiny"])


@pytest.mark.slow
def test_a_token_that_sees_only_itself_becomes_a_sink_without_bos_and_not_with_it(measured):
    """C8 and Q6. Without <|bos|> there is a sink where copying has been learned, and the mask moves it."""
    blocked = lambda r: (lambda before, after: after / before)(*claims.cut(r, "forge: token 10 sees"))
    learned = [r for r in measured["micro"] if r["softmax"]["val_loss"] < 1]
    assert learned, "no seed has learned to copy"
    assert min(r["softmax"]["trained"]["random"]["sink_alpha_later"] for r in learned) > 0.2
    assert min(map(blocked, learned)) > 2.5 and max(every(measured, blocked, ["tiny"])) < 2.5
