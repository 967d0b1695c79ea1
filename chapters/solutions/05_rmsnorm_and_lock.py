"""Solutions of chapter 05."""

import torch

# Without the norm the key is as long as the state makes it, and a logit is proportional
# to the length of its key. Most queries point to the side of this key, so logits rise.
prediction = "rise"


def norm_limit(gamma, c, sign):
    # Beside an infinite entry s all others vanish, and the root mean square is
    # |s| / sqrt(C). So s over it is the sign times sqrt(C), however large s is.
    limit = torch.zeros_like(gamma)
    limit[c] = sign * len(gamma) ** 0.5 * gamma[c]
    return limit


def common_direction(q):
    # This unit vector has the largest sum of squared products with the queries, and it
    # includes their mean, which we want. Its sign is arbitrary, so the mean query fixes
    # it.
    u = torch.linalg.svd(q, full_matrices=False)[2][0]
    return u if q.mean(0) @ u > 0 else -u


def unlock(k, q):
    # A key turned round has the same length and the opposite logit with every query.
    # Nearly all queries liked it, so nearly all dislike it now.
    k = k.clone()
    k[:, 0] = -k[:, 0]
    return k
