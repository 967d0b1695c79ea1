"""Solutions of chapter 07."""

import torch

import probe
from lesson import models, windows
from model import make_tap

prediction = ["softmax", "headnorm", "gated"]


def head_norm(z, gain, eps=1e-5):
    # Over D alone, so that each head of each token has its own length.
    return gain * z / (z.square().mean(-1, keepdim=True) + eps).sqrt()


@torch.no_grad()
def first_cost():
    model = models("tiny-softmax")["tiny-softmax"]
    x, y = windows("bos")

    def loss(times):
        edit = probe.at_token(0, lambda v: times * v[:, 0])
        edits = {f"{i}.v": edit for i in range(len(model.layers))}
        tap = make_tap(model.cfg, edits)
        return model(x, y, tap=tap)[1].item()

    for times in (2, 5, 10, 20):
        if loss(times) > loss(1) + 0.1:
            return times


longer = first_cost()
