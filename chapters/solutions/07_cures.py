"""Solutions of chapter 07."""

import torch

import probe
from lesson import TASK, models, windows
from model import make_tap

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


@torch.no_grad()
def growth():
    # The heads put nearly all their weight on v_0, so its length is that of their noise
    # in the logits. Noise costs as its variance: twice as long is four times.
    model = models("softmax")["softmax"]
    x, _ = windows("rest", 256)
    resting = TASK.resting(x)

    def excess(times):
        edit = probe.at_token(0, lambda v: times * v[:, 0])
        tap = make_tap(model.cfg, {"2.v": edit})
        log_p = model(x, tap=tap)[0].log_softmax(-1)[..., :len(TASK.symbols)]
        best = torch.tensor(len(TASK.symbols)).log()
        return (-log_p.mean(-1) - best)[resting].mean().item()

    return round(excess(16) / excess(8))


longer = growth()
