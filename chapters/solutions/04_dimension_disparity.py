"""Solutions of chapter 04."""

import math

# The number is nearly the same in every text, so its mean is as good as the number
# itself: it carries no information about the text. Zero takes away the long state.
prediction = "mean"


def spike_for(ratio, width):
    # DomRatio is s over the mean size, (s + width - 1) / width; this is solved for s.
    # The mean is more than s / width, however large s is: the ratio is below `width`.
    return ratio * (width - 1) / (width - ratio) if ratio < width else math.inf


def shorten(x):
    # Every layer reads the state through RMSNorm, which sees its direction only, and
    # the same factor for all dimensions keeps this. What later layers add now counts
    # ten times as much beside it, but it is still small.
    x = x.clone()
    x[:, 0] /= 10
    return x
