"""Solutions of chapter 08."""

import math

prediction = [0]
word = "the"


def rank_of_rows(n, c):
    shares = [c / (c + n - 1)] + [1 / (c + n - 1)] * (n - 1)
    return math.exp(-sum(p * math.log(p) for p in shares))
