"""Solutions of chapter 07."""

import math


def head_norm(z, gain, eps=1e-5):
    return gain * z / (z.square().mean(-1, keepdim=True) + eps).sqrt()


def gate_bias(keys, total):
    return math.log(total / (keys - total))


def attention_needed(cosine, d):
    ratio = cosine / math.sqrt(1 - cosine**2)  # a d / (1 - a)
    return ratio / (d + ratio)
