"""Solutions of chapter 01."""

import math


def sum_variance(weights, sigma, rho):
    # The variance of a sum: own variances, and rho sigma_s sigma_s' for every pair.
    scaled = weights * sigma
    return rho * scaled.sum() ** 2 + (1 - rho) * (scaled**2).sum()


prediction = [10]  # only this row of the mask changed


def initial_discrepancy(std, C, T):
    # Uniform weights leave 1/(t+1) of the variance: the median token has T/2 + 1
    # values to average. Scores that vary sharpen the weights, which then average less.
    variance = (std**2 * C) ** 2  # of a score
    return (T / 2 + 1) * math.exp(-variance)
