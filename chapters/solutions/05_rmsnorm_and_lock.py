"""Solutions of chapter 05."""

import torch

prediction = "rise"


def norm_limit(gamma, c, sign):
    limit = torch.zeros_like(gamma)
    limit[c] = sign * len(gamma) ** 0.5 * gamma[c]
    return limit


def common_direction(q):
    u = torch.linalg.svd(q, full_matrices=False)[2][0]
    return u if q.mean(0) @ u > 0 else -u


def unlock(k, q):
    k = k.clone()
    k[:, 0] = -k[:, 0]  # every query that liked it now dislikes it as much
    return k
