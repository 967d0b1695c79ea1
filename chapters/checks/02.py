"""Checks of the exercises of chapter 02."""

import copy

import torch
from lesson import models, windows

import probe
from model import record


def share_agreeing(answer):
    got = answer(1.0)
    assert got is not None, "Return a share, from 0 to 1."
    assert abs(got - 1) < 1e-6, "At tau 1 all pairs agree."
    assert abs(answer(-1.0)) < 1e-6, "At tau -1 none does."
    assert abs(answer(0.32) - 0.66) < 1e-6, \
        "Tau is the share that agrees minus the share that does not."


def prediction(answer):
    assert answer in ("columns", "rows", "both", "none"), \
        'Answer "columns", "rows", "both" or "none".'
    assert answer == "columns", ("The reading by columns uses the spread of z and the "
                                 "lengths of columns. Which of these has changed?")


def turn_values(answer):
    generator = torch.Generator().manual_seed(0)

    def rotation(D):
        return torch.linalg.qr(torch.randn(D, D, generator=generator))[0]

    v = torch.randn(6, 10, generator=generator)
    o = torch.randn(10, 6, generator=generator)
    R = rotation(6)
    got = answer(v, o, R)
    assert torch.allclose(got[0], R @ v, atol=1e-5), "New values are R v x for any x."
    assert torch.allclose(got[1] @ got[0], o @ v, atol=1e-4), \
        "W_O W_V has to stay what it was. The inverse of a rotation is its transpose."

    model = models("text")["text"]
    turned = copy.deepcopy(model)
    D = model.cfg.head_dim
    for block in turned.layers:
        values = block.self_attn.v_proj.weight.data
        output = block.self_attn.o_proj.weight.data
        for at in range(0, len(values), D):
            head = slice(at, at + D)
            new = answer(values[head].clone(), output[:, head].clone(), rotation(D))
            values[head], output[:, head] = new
    x, _ = windows("text", 16)
    taus = []
    with torch.no_grad():
        same = torch.allclose(model(x)[0], turned(x)[0], atol=1e-2)
        assert same, "The logits have changed."
        for m in (model, turned):
            z = record(m, x, ["0.z"])[1]["0.z"]
            W = m.layers[0].self_attn.o_proj.weight
            taus.append(round(probe.wo_alignment(z, W).item(), 2))
    print("same logits; tau of the columns, first layer:", taus[0], "->", taus[1])
