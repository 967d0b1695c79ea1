"""Solutions of chapter 02."""

import torch


def kendall(a, b):
    # A pair agrees if both lists put it in the same order: then its two signs have the
    # product 1, else -1. The sum is the pairs that agree minus those that do not, and
    # the matrix holds every pair twice.
    n = len(a)
    agree = torch.sign(a[:, None] - a) * torch.sign(b[:, None] - b)
    return agree.sum() / (n * (n - 1))


# The reading by columns uses the lengths of the columns and the variance of z, and the
# shuffle changes neither. Rows get new entries, so their lengths and W_O z change.
prediction = "columns"


def turn_values(v, o, R):
    # R.T R is the identity, so the product o v stays, and the model's output depends on
    # this product alone. But z lies on other axes, and the columns of o have other
    # lengths, so tau changes.
    return R @ v, o @ R.T
