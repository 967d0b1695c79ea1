"""Solutions of chapter 08."""

import math

# The heads rest on token 0, because its value adds next to nothing. Tokens 1 and 8 are
# words like others: to keep one of them gives no place to rest.
prediction = [0]

# Two neurons of layer 2, 90 and 430, answer to some "the" as loudly as to the first
# token, and write the same dimension, 507. The pair of layer 11 does not answer to it.
word = "the"


def rank_of_rows(n, c):
    # Rows at right angles share no direction, so their lengths are the singular values.
    # The long row has c / (c + n - 1) of their sum, and each other row 1 / (c + n - 1).
    total = c + n - 1
    long, short = c / total, 1 / total
    entropy = -long * math.log(long) - (n - 1) * short * math.log(short)
    return math.exp(entropy)
