"""Solutions of chapter 00."""

import torch


def sink_score(pattern, k):
    # Queries before k cannot see it, and give it nothing. With them in the mean a late
    # key would score low, however much the queries after it look at it.
    return pattern[k:, k].mean()


def hidden(T, key):
    # Softmax needs at least one key to share its weight out to. For key 0 the query of
    # that token sees no other, so each token keeps sight of itself.
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[:, key] = False
    mask[key, key] = True
    return mask


# With token 0 out of sight, token 1 sees only itself, as token 0 did. So its value is
# not mixed with others, and that is what the later heads find.
prediction = 1
