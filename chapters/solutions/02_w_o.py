"""Solutions of chapter 02."""

def share_agreeing(tau):
    # A share s agrees and 1 - s does not, and tau is their difference, 2 s - 1. So the
    # paper's 0.32 means that two pairs of three agree.
    return (1 + tau) / 2


# The reading by columns uses the lengths of the columns and the variance of z, and the
# shuffle changes neither. Rows get new entries, so their lengths and W_O z change.
prediction = "columns"


def turn_values(v, o, R):
    # R.T R is the identity, so the product o v stays, and the model's output depends on
    # this product alone. But z lies on other axes, and the columns of o have other
    # lengths, so tau changes.
    return R @ v, o @ R.T
