"""Solutions of chapter 01."""

import math


def sum_variance(weights, sigma, rho):
    scaled = weights * sigma
    return rho * scaled.sum() ** 2 + (1 - rho) * (scaled**2).sum()


prediction = [10]  # only this row of the mask changed


def initial_discrepancy(std, C, T):
    variance = (std**2 * C) ** 2  # of a score
    return (T / 2 + 1) * math.exp(-variance)
