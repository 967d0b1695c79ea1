"""Solutions of chapter 00."""

import torch


def sink_score(pattern, k):
    return pattern[k:, k].mean()


def hidden(T, key):
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[:, key] = False
    mask[key, key] = True
    return mask


prediction = 1  # with token 0 out of sight, token 1 is the one that sees only itself
