"""Solutions of chapter 03."""

prediction = "untouched"  # the pair is nearly silent at every other token anyway


def twin(x):
    x = x.clone()
    x[:, 1] = x[:, 0]  # an average of two equal values is that value
    return x


def rescue(out):
    out = out.clone()
    out[:, 0, 507] += 23_000
    return out
