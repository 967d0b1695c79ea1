"""Solutions of chapter 01."""

import math


def sum_variance(weights, sigma, rho):
    # The variance of a sum is all variances plus a covariance for every ordered pair.
    # The square of the sum holds each pair, and each value with itself as well, which
    # is why the second term has the factor 1 - rho.
    scaled = weights * sigma
    return rho * scaled.sum() ** 2 + (1 - rho) * (scaled**2).sum()


# Only row 10 of the mask changed, and in the first layer no other query reads what
# token 10 mixed. Its z is no longer a mean of eleven values, so its variance rises.
prediction = [10]


def initial_discrepancy(std, C, T):
    # Uniform weights leave 1/(t+1) of the variance, and the token in the middle has
    # T/2 + 1 values to average. Scores that vary make some weights larger than others,
    # so less is averaged away, by the factor e^variance.
    variance = (std**2 * C) ** 2  # of a score
    return (T / 2 + 1) * math.exp(-variance)
