"""Solutions of chapter 04."""

import math

# The large dimension of the first token is nearly the same in every text, so it carries
# no information about it. A constant in its place, the mean, does the same work.
prediction = "mean"


def spike_for(ratio, width):
    # One entry is s and all others 1, so that the mean is (s + width - 1) / width.
    # Solve ratio = s / mean for s; a ratio of width or more would need an infinite s.
    return ratio * (width - 1) / (width - ratio) if ratio < width else math.inf


def shorten(x):
    # RMSNorm keeps the direction of a state and forgets its length. Dividing all
    # dimensions alike keeps the direction, so the next layer reads the same.
    x = x.clone()
    x[:, 0] /= 10
    return x
