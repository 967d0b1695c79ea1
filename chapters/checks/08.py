"""Checks of chapter 08."""

import math


def prediction(answer):
    assert isinstance(answer, list), "Give a list of numbers."
    right = sorted(set(answer)) == [0]
    assert right, "Look at the printed shares: which tokens undo more than half?"


def rank_of_rows(answer):
    got = answer(10, 1)
    assert got is not None, "Return a number."
    assert math.isclose(got, 10, rel_tol=1e-3), \
        "Ten rows of one length: ten directions."
    one = answer(1, 7.0)
    assert math.isclose(one, 1, rel_tol=1e-3), "One row: one direction, however long."
    p, q = 50 / 149, 1 / 149
    wanted = math.exp(-p * math.log(p) - 99 * q * math.log(q))
    assert math.isclose(answer(100, 50.0), wanted, rel_tol=1e-4), \
        "p is a share of the *sum* of the lengths, which is c + n - 1."
    assert answer(500, 1e6) < 1.1, "In the end the long row is all there is."


def word(answer):
    assert isinstance(answer, str), "A word, as a string."
    right = answer.strip().lower() == "the"
    assert right, "Try (states[6].abs().amax(-1) > 300).nonzero()."
