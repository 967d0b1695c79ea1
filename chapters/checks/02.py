"""Checks of the exercises of chapter 02."""

import copy

import torch
from lesson import models, windows, written_without

import probe
from model import record


def kendall(answer):
    written_without(answer, "kendall_tau", "tau", "wo_alignment")
    up = torch.arange(4.0)
    assert abs(float(answer(up, up**3)) - 1) < 1e-6, \
        "Two lists in the same order have tau 1, whatever their values are."
    assert abs(float(answer(up, -up)) + 1) < 1e-6, "Opposite orders have tau -1."
    swapped = torch.tensor([0.0, 2.0, 1.0, 3.0])
    assert abs(float(answer(up, swapped)) - 4 / 6) < 1e-6, \
        "One swapped neighbour: 5 of 6 pairs agree, and 1 does not."
    a, b = torch.randn(2, 30, generator=torch.Generator().manual_seed(2))
    known = probe.kendall_tau(a, b).item()
    assert abs(float(answer(a, b)) - known) < 1e-5, "It is off on 30 random numbers."


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
