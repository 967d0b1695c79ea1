"""Solutions of chapter 03."""

prediction = "untouched"  # the pair is nearly silent at every other token anyway


def twin(x):
    x = x.clone()
    x[:, 1] = x[:, 0]  # an average of two equal values is that value
    return x


def rescue(out):
    # The neurons write 17,400 and 6,400 to dimension 507 of token 0. For the loss 5,000
    # are enough: RMSNorm keeps the direction of a state and forgets its length.
    out = out.clone()
    out[:, 0, 507] += 23_000
    return out
