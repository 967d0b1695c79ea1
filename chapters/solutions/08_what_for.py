"""Solutions of chapter 08."""

import math

prediction = [0]  # the heads rest there; other tokens mean something
word = "the"


def rank_of_rows(n, c):
    # Rows at right angles: their lengths are the singular values.
    total = c + n - 1
    long, short = c / total, 1 / total
    entropy = -long * math.log(long) - (n - 1) * short * math.log(short)
    return math.exp(entropy)
