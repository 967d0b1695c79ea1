"""tests/retrofit.py: a rebuilt model is what its name says, and a training can be drawn."""

from pathlib import Path

import pytest
import torch

import probe
from data import Corpus
from data.common import read_json
from tests import retrofit
from tests.tiny import activation, near, tiny_model, tokens


def rebuilt(name):
    source, x = tiny_model().eval(), tokens(8)
    return source, retrofit.rebuilt(source, name, x), x


def test_open_gates_change_nothing():
    source, model, x = rebuilt("gated")
    assert near(model(x)[0], source(x)[0])


def lengths(z):
    """(N, T, H): the root mean square of every head."""
    return z.square().mean(-1).sqrt()


def test_headnorm_brings_tokens_to_one_length():
    _, model, x = rebuilt("headnorm")
    gain = model.layers[0].self_attn.z_norm.weight
    z = activation(model, x, "0.z")
    assert near(lengths(z / gain), 1, tol=1e-2)


def test_its_control_brings_heads_to_one_mean_length():
    source, model, x = rebuilt("scaled")
    z = activation(source, x, "0.z")
    gain = z.square().mean((0, 1, 2)).sqrt()
    before, after = (m.layers[0].self_attn.o_proj.weight[0] for m in (source, model))
    factor = (after / before).view(4, 8)  # of each entry of z
    found = lengths(z * factor / gain)
    assert near(found.mean((0, 1)), 1, tol=1e-3)
    assert found.std((0, 1)).min() > 0.05


@pytest.mark.parametrize("which", ["super", "others"])
def test_five_neurons_are_drawn_anew(which):
    source, model, _ = rebuilt(f"{which} redrawn")
    strongest = probe.targets(source, retrofit.noise(source, 0))[0].neurons
    for i, (old, new) in enumerate(zip(source.layers, model.layers)):
        changed = (old.mlp.up_proj.weight != new.mlp.up_proj.weight).any(1)
        assert changed.sum() == probe.TOP
        columns = (old.mlp.down_proj.weight != new.mlp.down_proj.weight).any(0)
        assert torch.equal(columns, changed)
        if i == 0:  # later layers read what an earlier one has changed
            assert changed[strongest[0]].sum() == (probe.TOP if which == "super" else 0)


def test_a_pair_is_a_head_in_one_window(monkeypatch):
    model, x = tiny_model(num_hidden_layers=1), tokens(8)
    score = probe.sink_score(activation(model, x, "0.pattern"), 0)  # (N, H)
    monkeypatch.setattr(probe, "SINK", score.flatten().topk(2).values[1].item())
    assert retrofit.pairs(model, x) == pytest.approx(1 / score.numel())


def test_a_short_training(monkeypatch):
    smaller = dict(STEPS=2, LOOKS=(0, 2), B=2, T=32)
    for name, value in smaller.items():
        monkeypatch.setattr(retrofit, name, value)
    monkeypatch.setattr(retrofit, "noise", lambda model, batch: tokens(4))
    stream = tokens(1, 2000)[0]
    monkeypatch.setattr(retrofit.smollm2, "fetch", lambda: None)
    monkeypatch.setattr(retrofit.smollm2, "encoding", lambda folder: None)
    monkeypatch.setattr(retrofit.GPT, "from_llama", lambda folder: tiny_model().eval())
    monkeypatch.setattr(retrofit, "stdlib", lambda _: Corpus("x", 50, 0, None, stream, stream))
    found, first, last = {}, {}, {}
    for name in (*retrofit.CURES, *retrofit.NEURONS, "scaled, order 2"):
        found[name] = retrofit.retrofit(name)
        first[name] = retrofit.loss_of(found[name]["log"][0])
        last[name] = retrofit.loss_of(found[name]["end"])
    assert first["gated"] == first["softmax"] != first["headnorm"]
    assert near(first["scaled gated"], first["scaled"])
    assert first["scaled, order 2"] == first["scaled"]
    assert last["scaled, order 2"] != last["scaled"]
    assert len(retrofit.table(found).splitlines()) == 2 + len(found)
    assert len(retrofit.draw(found).axes) == 6


def ended(share, loss):
    looks = {"losses": [loss], "random": [{"share": share}], "text": [{"share": share}]}
    return {"end": looks}


@pytest.mark.parametrize("share, loss, control, verdict", [
    (0.16, 3.4, 0.5, "works"), (0.17, 3.4, 0.5, "is undecided"), (0.4, 3.4, 0.5, "fails"),
    (0.1, 3.6, 0.5, "has not healed"), (0.1, 3.4, 0.49, "cannot be told")])
def test_a_cure_is_judged_beside_the_control_of_its_order(share, loss, control, verdict):
    found = {"softmax": ended(0.8, 3.0), "headnorm, order 2": ended(share, loss),
             "scaled, order 2": ended(control, 3.0), "scaled": ended(0.7, 3.0)}
    assert retrofit.verdict(found, "headnorm, order 2", "random") == verdict


def test_first_orders_share_their_control():
    found = {"softmax": ended(0.8, 3), "scaled": ended(0.4, 3), "logit, order 1": ended(0, 3)}
    assert retrofit.verdict(found, "logit, order 1", "text") == "cannot be told"


@pytest.mark.parametrize("name", ["softmax", "headnorm", "scaled", "sigmoid", "gated", "logit"])
def test_chapter_07_tells_what_was_measured(name):
    found = read_json(retrofit.FILE)
    orders = str(len(retrofit.in_orders(found, name)))
    row = (name, orders, retrofit.shares(found, name), retrofit.shares(found, name, "text"),
           retrofit.prices(found, name))
    chapter = Path(retrofit.__file__).parent.parent / "chapters/07_cures.py"
    assert f"# | {' | '.join(row)} |\n" in chapter.read_text("utf-8")
