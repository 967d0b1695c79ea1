"""Solutions of chapter 00."""

import torch


def sink_score(pattern, k):
    # Queries before k cannot see key k, so their zeros say nothing about what it gets.
    # With them in the mean, a late key could never score high.
    return pattern[k:, k].mean()


def hidden(T, key):
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    # What is hidden is a column: rows are queries, and every row loses this one key.
    # The row of the token itself keeps it, because softmax over no key is not defined.
    mask[:, key] = False
    mask[key, key] = True
    return mask


# With token 0 out of sight, token 1 is the one that sees only itself. The heads look
# for a token that has averaged nothing, and do not mind at which position it stands. So
# the loss hardly rises. In a sliding window no later token sees only itself: nothing
# takes the place of token 0, and the model fails.
prediction = 1
