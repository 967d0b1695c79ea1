"""Solutions of chapter 04."""

import math

prediction = "mean"  # a constant in its place serves as well: it has no news


def spike_for(ratio, width):
    # Solve ratio = s / ((s + width - 1) / width) for s.
    return ratio * (width - 1) / (width - ratio) if ratio < width else math.inf


def shorten(x):
    x = x.clone()
    x[:, 0] /= 10  # all dimensions alike: RMSNorm keeps the direction
    return x
