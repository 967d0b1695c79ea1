"""Solutions of chapter 04."""

import math

prediction = "mean"


def spike_for(ratio, width):
    return ratio * (width - 1) / (width - ratio) if ratio < width else math.inf


def shares_of(parts):
    state = parts.sum(0)
    return parts @ state / state.square().sum()


smallest = 5_000  # about three times the next dimension, 247
