"""Solutions of chapter 04."""

import math

import torch

import probe


def spike_for(ratio, width):
    return ratio * (width - 1) / (width - ratio) if ratio < width else math.inf


def shares_of(parts):
    state = parts.sum(0)
    return parts @ state / state.square().sum()


def surprise(x):
    drawn = probe.dominance(torch.randn(4000, len(x), generator=torch.Generator().manual_seed(0)))
    return ((probe.dominance(x) - drawn.mean()) / drawn.std()).item()
