"""Solutions of chapter 06."""

import torch

# All but W_O: giving z_0 the usual length leaves the sink. So the sink does not need a
# long z, but what z is made of, the neurons, and what follows from them.
prediction = ["variance", "neurons", "disparity", "direction", "lock"]
# Token 10 has to be unmixed until layer 11 writes the long state, and from then on the
# mask is no longer needed. Of the two waves the second is the one that counts.
first_layer = 10


def shift_to(z, target):
    # The mean squared length is the squared length of the mean plus the variance. A
    # shift along the mean changes only the first of them, so the variance stays.
    mean = z.mean(0)
    variance = (z - mean).square().sum(1).mean()
    wanted = (target - variance).clamp_min(0).sqrt()
    return z + mean * (wanted / mean.norm() - 1)


def alone_mask(T, alone):
    # Rows are queries: a token that is alone may look at itself and at nothing else.
    # All later tokens may still look at it, so it can become their sink.
    mask = torch.ones(T, T, dtype=torch.bool)
    for t in alone:
        mask[t] = torch.arange(T) == t
    return mask
