"""Solutions of chapter 01."""

import math

import torch


def aggregate_variance(weights, rho):
    return rho * weights.sum() ** 2 + (1 - rho) * (weights**2).sum()


def blocked_pattern(T, k):
    pattern = torch.tril(torch.ones(T, T)) / torch.arange(1, T + 1)[:, None]
    pattern[k] = torch.eye(T)[k]
    return pattern


def initial_discrepancy(std, C, T):
    variance = (std**2 * C) ** 2  # of a score
    return (T / 2 + 1) * math.exp(-variance)
