"""tests/measure.py: a fresh result has the keys of the committed one, and both can be drawn."""

import pytest

from data.common import read_json
from data.windows import random_windows
from tests import measure
from tests.tiny import tiny_model


@pytest.mark.parametrize("name, L", [("maps", 2), ("mask", 13), ("variance", 4)])
def test_measured_and_drawn(name, L, monkeypatch):
    """On a model of no meaning, deep enough for the hypotheses to be asked."""
    model = tiny_model(num_hidden_layers=L, vocab_size=300).eval().requires_grad_(False)
    monkeypatch.setattr(measure, "T", 42)  # tokens up to 40 are asked for
    windows = [random_windows(2, measure.T, 300)]
    monkeypatch.setattr(measure, "smollm2_and_windows", lambda: (model, windows))
    fresh, committed = measure.result(name), read_json(measure.path(name))
    assert fresh.keys() == committed.keys()
    assert fresh["hypothesis"] == committed["hypothesis"]  # written down, and kept
    for found in (fresh, committed):
        measure.MEASUREMENTS[name][1](found)  # can be drawn


def test_the_page_quotes_the_json():
    page = " ".join(measure.PAGE.read_text(encoding="utf-8").split())
    rows = read_json(measure.path("mask"))["rows"]
    for where, i, words in (("to", 2, "it makes # of the two sinks"), ("to", 10, "(layer 11), #"),
                            ("from", 5, "from layer 5 on #")):
        mean, std = (measure.pick(rows, layers=where)[i][key]["share"] for key in ("mean", "std"))
        assert words.replace("#", f"{100 * mean:.0f} ± {100 * std:.0f} %") in page
    table = measure.lambda_table(read_json(measure.path("variance")))
    assert table in measure.PAGE.read_text(encoding="utf-8")
