"""Solutions of chapter 04."""

import math

prediction = "mean"


def spike_for(ratio, width):
    return ratio * (width - 1) / (width - ratio) if ratio < width else math.inf


def shorten(x):
    x = x.clone()
    x[:, 0] /= 10  # all dimensions alike: RMSNorm keeps the direction
    return x
