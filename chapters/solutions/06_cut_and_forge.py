"""Solutions of chapter 06."""

import torch

# Each of these takes something that the sink needs. The length of what W_O passes on
# is not needed: RMSNorm divides it out before the next reader sees it.
prediction = ["variance", "neurons", "disparity", "direction", "lock"]

# Layer 11 writes the long state to a token that has averaged nothing so far. If the mask
# ends before layer 10, the token has mixed with others when the neurons read it.
first_layer = 10


def shift_to(z, target):
    # The mean squared length is the squared length of the mean plus the variance. One
    # shift for all windows changes the mean alone, so the variance stays as it is.
    mean = z.mean(0)
    variance = (z - mean).square().sum(1).mean()
    wanted = (target - variance).clamp_min(0).sqrt()
    return z + mean * (wanted / mean.norm() - 1)


def alone_mask(T, alone):
    # Rows are queries: row t says what token t reads. Its column stays open, because the
    # others may still look at token t.
    mask = torch.ones(T, T, dtype=torch.bool)
    for t in alone:
        mask[t] = torch.arange(T) == t
    return mask
