"""tests/measure.py: a fresh result has the keys of the committed one, and both can be drawn."""
from types import SimpleNamespace

import pytest
import torch

from data.common import read_json
from data.windows import random_windows
from tests import measure
from tests.tiny import tiny_model

SETS = {name: [[1, 3], [2, 5]] for name in (
    "writers", "wave one", "wave two", "weights", "like", "erasers, early", "erasers, late")}


@pytest.mark.parametrize("name", measure.MEASUREMENTS)
def test_measured_and_drawn(name, monkeypatch):
    """On a model of no meaning, deep enough for the hypotheses to be asked."""
    model = tiny_model(num_hidden_layers=13, vocab_size=300).eval().requires_grad_(False)
    windows = [random_windows(3, measure.T, 300, seed=b) for b in range(4)]
    batches = SimpleNamespace(random=windows[:2], text=windows[2:])
    monkeypatch.setattr(measure, "smollm2_and_windows", lambda: (model, batches))
    monkeypatch.setattr(measure, "choose", lambda *_: (SETS, 3))
    fresh, committed = measure.result(name), read_json(measure.path(name))
    assert fresh.keys() == committed.keys()
    assert fresh["hypothesis"] == committed["hypothesis"]  # written down, and kept
    figures = [measure.MEASUREMENTS[name][1](found) for found in (fresh, committed)]
    assert len(figures[0].axes) == len(figures[1].axes)


def test_the_page_quotes_the_json():
    page = " ".join(measure.PAGE.read_text(encoding="utf-8").split())
    rows = read_json(measure.path("mask"))["rows"]
    to, after = (measure.means(measure.pick(rows, layers=name)) for name in ("to", "from"))
    assert f"it makes {to[2]:.0%} of the two sinks".replace("%", " %") in page
    assert f"from layer 5 on {after[5]:.0%}".replace("%", " %") in page
    found = read_json(measure.path("neurons"))["text"]
    silent = measure.pick(found, set="writers", tokens="first")[0]["mean"]["loss"]
    assert f"English costs {silent - found[0]['mean']['loss']:.1f} nats more" in page
    table = measure.lambda_table(read_json(measure.path("variance")))
    assert table in measure.PAGE.read_text(encoding="utf-8")


def test_choose():
    """Layer 1 of three doubles dimension c; layer 2 takes from it; layer 0 does it for all."""
    writes = torch.zeros(3, 5, 4)
    writes[0, :, 0] = 1
    writes[1, 0, 1:] = torch.tensor([80, 20, 5])
    writes[2, 0, 0] = -50
    score = torch.tensor([[1.0, 2, 3, 4], [1, 5, 7, 20], [1, 1, 1, 40]])
    sets, main = measure.choose(torch.tensor([0.0, 1, 106]), writes, score)
    assert main == 1
    assert sets == {"writers": [[1, 1], [1, 2]], "wave one": [], "wave two": [[1, 1], [1, 2]],
                    "weights": [[2, 3], [1, 3]], "like": [[1, 0], [1, 3]],
                    "erasers, early": [], "erasers, late": [[2, 0]]}


@pytest.mark.parametrize("tokens, where", [("first", slice(1)), ("all", slice(None))])
def test_silent(tokens, where):
    post = torch.arange(1.0, 2 * 5 * 40 + 1).view(2, 5, 40)
    usual = torch.full((2, 40), 7.0)
    tap = measure.silent(tiny_model(), [[1, 3], [1, 8]], tokens, usual)
    wanted = post.clone()
    wanted[:, where, [3, 8]] = 7
    assert torch.equal(tap("1.mlp_post", post), wanted)
    assert torch.equal(tap("0.mlp_post", post), post)
