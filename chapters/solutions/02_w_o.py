"""Solutions of chapter 02."""

import torch


def kendall(a, b):
    # A pair agrees if both lists put it in the same order: the signs have product 1.
    # The sum over the square of all pairs counts each of them twice.
    n = len(a)
    agree = torch.sign(a[:, None] - a) * torch.sign(b[:, None] - b)
    return agree.sum() / (n * (n - 1))


# A column of W_O reads one dimension of z, so its length and the spread of that
# dimension change when z is turned. Rows write into the state, which stays as it is.
prediction = "columns"


def turn_values(v, o, R):
    # R.T R is the identity, so that o v stays and the model computes the same. But each
    # new column of o is a mixture of the old ones, and has another length.
    return R @ v, o @ R.T
