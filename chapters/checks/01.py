"""Checks of the exercises of chapter 01."""

import torch

import probe
from model import GPT, Config, record


def sum_variance(answer):
    def close(weights, sigma, rho, expected):
        got = answer(torch.tensor(weights), torch.tensor(sigma), rho)
        return abs(float(got) - expected) < 1e-5

    ones = [1.0] * 4
    assert close([0.25] * 4, ones, 0.0, 0.25), \
        "Four equal weights on independent values leave a quarter of the variance."
    assert close([1.0], [1.0], 0.5, 1), "One value alone keeps its variance."
    assert close([0.25] * 4, ones, 1.0, 1), "Equal values lose nothing by averaging."
    assert close([0.5] * 3, [1.0] * 3, 0.2, 1.05), "Weights need not add up to 1."
    assert close([0.5, 0.5], [3.0, 1.0], 0.0, 2.5), \
        "sigma is a standard deviation: independent values give sum a^2 sigma^2."
    assert close([0.5, 0.5], [3.0, 1.0], 0.5, 3.25), \
        "The covariance of two is rho sigma_s sigma_s', and each pair counts twice."
    assert close([0.5, -1.0], [2.0, 3.0], 0.5, 7.0), \
        "Each weight goes with its own sigma, and a weight may be negative."


def prediction(answer):
    assert isinstance(answer, list), "Give a list of numbers."
    got = sorted(int(t) for t in answer)
    assert 10 in got, "Token 10 sees one value, its own. What is averaged there?"
    assert got == [10], ("Only row 10 of the mask changed: in the first layer the "
                         "others average the same values as before.")


def initial_discrepancy(answer):
    for std, C, T in ((0.02, 64, 64), (0.1, 64, 64), (0.06, 128, 32)):
        cfg = Config(vocab_size=257, hidden_size=C, num_hidden_layers=1,
                     num_attention_heads=2, initializer_range=std)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(256, (128, T), generator=generator)
        with torch.no_grad():
            z = record(GPT(cfg, seed=1), tokens, ["0.z"])[1]["0.z"]
        got = float(answer(std, C, T))
        found = probe.over_median(probe.variance(z), 0).item()
        assert 0.85 < got / found < 1.2, \
            (f"std {std}, C {C}, T {T}: you say {got:.1f}, an untrained model has "
             f"{found:.1f}. What do larger weights do to the scores?")
