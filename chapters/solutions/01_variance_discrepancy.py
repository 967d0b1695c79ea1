"""Solutions of chapter 01."""

import math


def sum_variance(weights, sigma, rho):
    # The variance of a sum is the sum of all covariances: sigma_s^2 for a value with
    # itself, rho sigma_s sigma_s' for a pair. The first term below counts the pairs
    # with s = s' as well, so the second has only 1 - rho of them left to add.
    scaled = weights * sigma
    return rho * scaled.sum() ** 2 + (1 - rho) * (scaled**2).sum()


# In the first layer z_t depends on the embeddings and on row t of the mask. Only row 10
# of the mask was changed, so no other position can move.
prediction = [10]


def initial_discrepancy(std, C, T):
    # Uniform weights leave 1/(t+1) of the variance: the median token has T/2 + 1
    # values to average. Scores that vary sharpen the weights, which then average less.
    variance = (std**2 * C) ** 2  # of a score
    return (T / 2 + 1) * math.exp(-variance)
