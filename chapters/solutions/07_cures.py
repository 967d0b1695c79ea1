"""Solutions of chapter 07."""

import torch

# Each of the three lets the weights that reach the output add up to less than 1, so
# that a head can be silent anywhere. Under headnorm the output keeps its length, and a
# head must still look somewhere: several seeds rest on token 0.
prediction = ["sigmoid", "gated", "logit"]


def head_norm(z, gain, eps=1e-5):
    # The mean is taken over D alone: each head of each token has its own length.
    # eps stands under the root, so that a zero vector stays zero.
    return gain * z / (z.square().mean(-1, keepdim=True) + eps).sqrt()


def weights_with_logit(scores, b):
    # One more score, of a key that is not there, takes its share of the softmax. Its
    # weight is then left out, so that the others add up to less than 1.
    nowhere = torch.full((*scores.shape[:-1], 1), b)
    return torch.cat((scores, nowhere), dim=-1).softmax(-1)[..., :-1]


# The heads put nearly all their weight on v_0, so its length is that of their noise in
# the logits. Noise costs as its variance: twice as long, from 8 to 16, is four times.
longer = (16 // 8) ** 2
