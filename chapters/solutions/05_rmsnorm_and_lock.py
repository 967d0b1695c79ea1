"""Solutions of chapter 05."""

import torch


def norm_limit(gamma, c, sign):
    limit = torch.zeros_like(gamma)
    limit[c] = sign * len(gamma) ** 0.5 * gamma[c]
    return limit


def ratio_for(cosine):
    return (cosine / (1 - cosine)) ** 0.5


def common_direction(q):
    u = torch.linalg.svd(q, full_matrices=False)[2][0]
    return u if q.mean(0) @ u > 0 else -u
