"""Solutions of chapter 02."""

import torch


def kendall(a, b):
    n = len(a)
    agree = torch.sign(a[:, None] - a) * torch.sign(b[:, None] - b)
    return agree.sum() / (n * (n - 1))  # every pair twice


prediction = "columns"  # it uses the lengths of columns, and the spread of z


def turn_values(v, o, R):
    return R @ v, o @ R.T
