"""Solutions of chapter 00."""

import torch


def sink_score(pattern, k):
    # Queries before k cannot see it. With them in the mean, a late key scores low.
    return pattern[k:, k].mean()


def hidden(T, key):
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[:, key] = False  # hidden from every query
    mask[key, key] = True  # but its own, which needs a key
    return mask


prediction = 1  # with token 0 out of sight, token 1 is the one that sees only itself
