"""Solutions of chapter 00."""

import torch


def sink_score(pattern, k):
    return pattern[k:, k].mean()


def shortest_window(level):
    total, T = 1.0, 1
    while total / T >= level:
        total, T = total + 1 / (T + 1), T + 1
    return T


def hidden(T, key):
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[:, key] = False
    mask[key, key] = True
    return mask


prediction = 1  # with token 0 out of sight, token 1 is the one that sees only itself
