"""Solutions of chapter 08."""

import math

# The heads rest on token 0, and on no other. Any other token brings back only what it
# says, which is worth little so far behind.
prediction = [0]
# The measurement says which word, not why. A frequent word that says little would be a
# cheap second place to rest; whether heads do so is not tested here.
word = "the"


def rank_of_rows(n, c):
    # Rows at right angles have their lengths as singular values. One long one takes
    # most of the shares, so that the entropy, and with it the rank, is low.
    total = c + n - 1
    long, short = c / total, 1 / total
    entropy = -long * math.log(long) - (n - 1) * short * math.log(short)
    return math.exp(entropy)
