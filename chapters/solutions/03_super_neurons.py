"""Solutions of chapter 03."""

# The two neurons answer to the first token and are nearly silent at every other one.
# To silence them where they say nothing changes nothing.
prediction = "untouched"


def twin(x):
    # Token 0 mixes one value, its own, and token 1 mixes two. Of two equal values every
    # mean is that value, so the pair reads the same in both places.
    x = x.clone()
    x[:, 1] = x[:, 0]
    return x


def rescue(out):
    # What the model needs of the pair is in dimension 507 of token 0, where they write
    # 17,400 and 6,400 (measured with `record`). For the loss alone 5,000 would do,
    # because RMSNorm keeps the direction of a state and forgets its length.
    out = out.clone()
    out[:, 0, 507] += 17_400 + 6_400
    return out
