"""Solutions of chapter 00."""


def sink_score(pattern, k):
    return pattern[k:, k].mean()


def shortest_window(level):
    total, T = 1.0, 1
    while total / T >= level:
        total, T = total + 1 / (T + 1), T + 1
    return T
