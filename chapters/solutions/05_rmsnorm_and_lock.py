"""Solutions of chapter 05."""

import torch

prediction = "rise"  # the queries like this key, and the logit grows with its length


def norm_limit(gamma, c, sign):
    # One entry s among C has root mean square |s| / sqrt(C).
    limit = torch.zeros_like(gamma)
    limit[c] = sign * len(gamma) ** 0.5 * gamma[c]
    return limit


def common_direction(q):
    # The right singular vector of the largest singular value, turned to the mean query.
    u = torch.linalg.svd(q, full_matrices=False)[2][0]
    return u if q.mean(0) @ u > 0 else -u


def unlock(k, q):
    k = k.clone()
    k[:, 0] = -k[:, 0]  # every query that liked it now dislikes it as much
    return k
