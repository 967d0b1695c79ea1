"""Solutions of chapter 03."""

import torch


def mean_answer(gate, up, cov):
    return gate @ cov @ up / 2


def spent_first(energy):
    total = energy.sum((0, 1))
    return torch.where(total > 0, energy[:, 0].sum(0) / total.clamp_min(1e-30), 0.0)


def twin(x):
    x = x.clone()
    x[:, 1] = x[:, 0]
    return x
