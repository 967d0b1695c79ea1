"""tests/retrofit.py: a rebuilt model is what its name says, and a training can be drawn."""

import pytest
import torch

import probe
from data import Corpus
from model import record
from tests import retrofit
from tests.tiny import tiny_model, tokens


def rebuilt(name):
    source, x = tiny_model().eval(), tokens(8)
    return source, retrofit.rebuilt(source, name, x), x


def test_open_gates_change_nothing():
    source, model, x = rebuilt("gated")
    assert torch.allclose(model(x)[0], source(x)[0], atol=1e-5)


def test_headnorm_brings_tokens_to_one_length_and_its_control_brings_heads():
    source, scaled, x = rebuilt("scaled")
    normed = rebuilt("headnorm")[1]
    gain = normed.layers[0].self_attn.z_norm.weight
    W_O = [model.layers[0].self_attn.o_proj.weight for model in (scaled, source)]
    factor = (W_O[0] / W_O[1])[0].view(4, 8)  # of each entry of z
    z = {"headnorm": record(normed, x, ["0.z"])[1]["0.z"] / gain,
         "scaled": record(source, x, ["0.z"])[1]["0.z"] * factor / gain}
    length = {name: v.square().mean(-1).sqrt() for name, v in z.items()}  # (N, T, H)
    assert torch.allclose(length["headnorm"], torch.ones(8, 24, 4), atol=1e-2)
    assert torch.allclose(length["scaled"].mean((0, 1)), torch.ones(4), atol=1e-3)
    assert length["scaled"].std((0, 1)).min() > 0.05


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


def test_a_short_training(monkeypatch):
    stream = torch.randint(50, (2000,), generator=torch.Generator().manual_seed(0))
    smaller = dict(STEPS=2, LOOKS=(0, 2), B=2, T=32, noise=lambda model, batch: tokens(4))
    for name, value in smaller.items():
        monkeypatch.setattr(retrofit, name, value)
    monkeypatch.setattr(retrofit.smollm2, "fetch", lambda: None)
    monkeypatch.setattr(retrofit.smollm2, "encoding", lambda folder: None)
    monkeypatch.setattr(retrofit.GPT, "from_llama", lambda folder: tiny_model().eval())
    monkeypatch.setattr(retrofit, "stdlib", lambda _: Corpus("x", 50, 0, None, stream, stream))
    names = *retrofit.CURES, *retrofit.NEURONS, "scaled, order 2"
    found = {name: retrofit.retrofit(name) for name in names}
    first, last = ({name: retrofit.loss_of(run["log"][at]) for name, run in found.items()}
                   for at in (0, 1))
    assert first["gated"] == first["softmax"] != first["headnorm"]
    assert first["scaled gated"] == pytest.approx(first["scaled"], abs=1e-5)
    assert first["scaled, order 2"] == first["scaled"]
    assert last["scaled, order 2"] != last["scaled"]
    assert len(retrofit.table(found).splitlines()) == 2 + len(found)
    assert len(retrofit.draw(found).axes) == 6
