"""Solutions of chapter 03."""

# The pair is nearly silent at every other token anyway. So silencing it there changes
# next to nothing, and what it does for the model it does at the first token.
prediction = "untouched"


def twin(x):
    # The average of two equal values is that value, whatever the weights. So token 1 is
    # as unmixed as token 0, although it sees two tokens.
    x = x.clone()
    x[:, 1] = x[:, 0]
    return x


def rescue(out):
    # The neurons write 17,400 and 6,400 to dimension 507 of token 0. For the loss 5,000
    # are enough: RMSNorm keeps the direction of a state and forgets its length.
    out = out.clone()
    out[:, 0, 507] += 23_000
    return out
