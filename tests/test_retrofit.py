"""tests/retrofit.py: a rebuilt model is what its name says, and a training leaves what is drawn."""

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


def test_the_control_does_to_heads_what_headnorm_does_to_tokens():
    source, scaled, x = rebuilt("scaled")
    _, normed, _ = rebuilt("headnorm")
    gain = normed.layers[0].self_attn.z_norm.weight
    z = record(source, x, ["0.z"])[1]["0.z"]  # (N, T, H, D)
    factor = scaled.layers[0].self_attn.o_proj.weight / source.layers[0].self_attn.o_proj.weight
    assert torch.allclose(gain, z.square().mean((0, 1, 2)).sqrt())
    assert torch.allclose(factor, factor[:1].expand_as(factor), rtol=1e-3)  # one constant an entry
    lengths = {"headnorm": record(normed, x, ["0.z"])[1]["0.z"] / gain,
               "scaled": z * factor[0].view(4, 8) / gain}
    lengths = {name: v.square().mean(-1).sqrt() for name, v in lengths.items()}  # (N, T, H)
    for length in lengths.values():
        assert torch.allclose(length.mean((0, 1)), torch.ones(4), atol=1e-3)
    assert lengths["headnorm"].std((0, 1)).max() < 1e-3 < 0.05 < lengths["scaled"].std((0, 1)).min()


@pytest.mark.parametrize("which", ["super", "others"])
def test_five_neurons_are_drawn_anew(which):
    source, model, _ = rebuilt(f"{which} redrawn")
    (x,) = retrofit.noise(source, 1)
    post = record(source, x, ["0.mlp_post"])[1]["0.mlp_post"]
    for old, new in zip(source.layers, model.layers):
        old, new = ([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T]
                    for mlp in (old.mlp, new.mlp))
        changed = [(a != b).any(1) for a, b in zip(old, new)]
        assert all(c.sum() == probe.TOP and torch.equal(c, changed[0]) for c in changed)
    changed = (source.layers[0].mlp.up_proj.weight != model.layers[0].mlp.up_proj.weight).any(1)
    first = probe.energy(post, source.layers[0].mlp.down_proj.weight).mean(0)[0]
    strongest = torch.zeros_like(changed).index_fill(0, first.topk(probe.TOP).indices, True)
    assert torch.equal(changed, strongest) == (which == "super")
    assert which == "super" or not (changed & strongest).any()


def test_a_short_training(monkeypatch):
    stream = torch.randint(50, (2000,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(retrofit, "STEPS", 3)
    monkeypatch.setattr(retrofit, "LOOKS", (0, 3))
    monkeypatch.setattr(retrofit.smollm2, "fetch", lambda: None)
    monkeypatch.setattr(retrofit.smollm2, "encoding", lambda folder: None)
    monkeypatch.setattr(retrofit.GPT, "from_llama", lambda folder: tiny_model().eval())
    monkeypatch.setattr(retrofit, "stdlib", lambda _: Corpus("x", 50, 0, None, stream, stream))
    found = {name: retrofit.retrofit(name) for name in retrofit.MODELS}
    assert found["scaled, other batches"]["log"][0] == found["scaled"]["log"][0]
    losses = {name: [retrofit.loss_of(row) for row in run["log"]] for name, run in found.items()}
    assert losses["gated"][0] == losses["softmax"][0] != losses["headnorm"][0]
    assert losses["scaled gated"][0] == pytest.approx(losses["scaled"][0], abs=1e-5)
    assert all(first != last for first, last in losses.values())
    assert len(retrofit.tables(found)["retrofit"].splitlines()) == 2 + len(
        retrofit.CURES + retrofit.AGAIN)
    assert retrofit.draw(found)
