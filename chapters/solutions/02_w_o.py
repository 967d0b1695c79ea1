"""Solutions of chapter 02."""

import torch


def kendall(a, b):
    n = len(a)
    agree = torch.sign(a[:, None] - a) * torch.sign(b[:, None] - b)
    return agree.sum() / (n * (n - 1))  # every pair twice


def direction_gain(weight, direction):
    u = direction / direction.norm()
    return (weight @ u).square().sum() / (weight.square().sum() / weight.shape[1])


def turn_values(v, o, R):
    return R @ v, o @ R.T
