"""Solutions of chapter 05."""

import torch

# The queries point to the side of this key, so its logit is positive. Without the norm
# it grows with the length of the key, and softmax then gives it more.
prediction = "rise"


def norm_limit(gamma, c, sign):
    # If one entry s is large, the root mean square of all C is |s| / sqrt(C). Divided
    # by it, that entry becomes sign sqrt(C), and all others vanish; then the gain
    # multiplies.
    limit = torch.zeros_like(gamma)
    limit[c] = sign * len(gamma) ** 0.5 * gamma[c]
    return limit


def common_direction(q):
    # The right singular vector of the largest singular value is the direction in which
    # the queries are longest together. Its sign is free: it is turned to the mean
    # query.
    u = torch.linalg.svd(q, full_matrices=False)[2][0]
    return u if q.mean(0) @ u > 0 else -u


def unlock(k, q):
    # The logit is q . k, so that it changes its sign with the key. Every query that
    # liked the key now dislikes it as much, and the length of the key stays.
    k = k.clone()
    k[:, 0] = -k[:, 0]
    return k
