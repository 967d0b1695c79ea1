"""Solutions of chapter 02."""

import torch


def kendall(a, b):
    # A pair agrees if both lists put it in the same order: the signs have product 1.
    n = len(a)
    agree = torch.sign(a[:, None] - a) * torch.sign(b[:, None] - b)
    return agree.sum() / (n * (n - 1))  # every pair twice


prediction = "columns"  # it uses the lengths of columns, and the spread of z


def turn_values(v, o, R):
    # R.T R is the identity: o v stays, while the columns of o have other lengths.
    return R @ v, o @ R.T
