"""Solutions of chapter 07."""

import torch

import probe
from lesson import models, windows
from model import make_tap

prediction = ["softmax", "headnorm", "gated"]


def head_norm(z, gain, eps=1e-5):
    return gain * z / (z.square().mean(-1, keepdim=True) + eps).sqrt()


@torch.no_grad()
def first_cost():
    model, (x, y) = models("tiny-softmax")["tiny-softmax"], windows("bos")
    untouched = model(x, y)[1].item()
    for times in (2, 5, 10, 20):
        edit = probe.at_token(0, lambda v, times=times: times * v[:, 0])
        tap = make_tap(model.cfg, {f"{i}.v": edit for i in range(len(model.layers))})
        if model(x, y, tap=tap)[1].item() > untouched + 0.1:
            return times


longer = first_cost()
