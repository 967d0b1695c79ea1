"""tests/measure.py: a fresh result has what the committed one has, and both can be drawn."""
from types import SimpleNamespace

import pytest
import torch

from chapters import figures
from data.common import read_json
from data.windows import random_windows
from tests import measure
from tests.tiny import tiny_model

SETS = {name: [[1, 3], [2, 5]] for name in (
    "writers", "wave one", "wave two", "weights", "like", "erasers, early", "erasers, late")}


@pytest.fixture(scope="module")
def batches():
    windows = [random_windows(3, measure.T, 300, seed=b) for b in range(4)]
    return SimpleNamespace(random=windows[:2], text=windows[2:])


@pytest.mark.parametrize("name", measure.MEASUREMENTS)
def test_measured_and_drawn(name, batches, monkeypatch):
    """On a model of no meaning, deep enough for the hypotheses to be asked."""
    model = tiny_model(num_hidden_layers=13, vocab_size=300).eval().requires_grad_(False)
    monkeypatch.setattr(measure, "smollm2_and_windows", lambda: (model, batches))
    monkeypatch.setattr(measure, "choose", lambda *_: (SETS, 3))
    run, draw = measure.MEASUREMENTS[name]
    fresh, committed = measure.result(run), read_json(measure.path(name))
    assert draw(fresh) and draw(committed)
    assert fresh.keys() == committed.keys() and measure.path(name, "png").exists()
    assert fresh["hypothesis"] == committed["hypothesis"]  # written down, and kept
    for key in {"rows", "random", "text"} & fresh.keys():
        assert fresh[key][-1]["mean"].keys() <= committed[key][-1]["mean"].keys()


def test_render_measures_nothing(monkeypatch):
    monkeypatch.setattr(measure, "smollm2_and_windows", lambda: pytest.fail("measured"))
    monkeypatch.setattr(figures, "save", lambda path, figure: drawn.append(path))
    drawn = []
    measure.main(["all"])
    measure.main(["maps", "--render"])
    assert drawn == [measure.path(name, "png") for name in (*measure.MEASUREMENTS, "maps")]


def test_choose():
    """Layer 1 of three doubles dimension c; layer 2 takes from it; layer 0 does it for all."""
    writes = torch.zeros(3, 5, 4)
    writes[0, :, 0] = 1
    writes[1, 0, 1:] = torch.tensor([80, 20, 5])
    writes[2, 0, 0] = -50
    score = torch.tensor([[1.0, 2, 3, 4], [1, 5, 7, 20], [1, 1, 1, 40]])
    sets, main = measure.choose(torch.tensor([0.0, 1, 106]), writes, score)
    assert main == 1 and sets["writers"] == sets["wave two"] == [[1, 1], [1, 2]]
    assert sets["wave one"] == sets["erasers, early"] == [] and sets["erasers, late"] == [[2, 0]]
    assert sets["weights"] == [[2, 3], [1, 3]] and sets["like"] == [[1, 0], [1, 3]]


def test_silent_at_token_0_or_everywhere():
    model, post = tiny_model(), torch.arange(1.0, 2 * 5 * 40 + 1).view(2, 5, 40)
    for tokens, where in (("first", slice(1)), ("all", slice(None))):
        wanted = post.clone()
        wanted[:, where, [3, 7]] = 0
        tap = measure.silent(model, [[1, 3], [1, 7]], tokens)
        assert torch.equal(tap("1.mlp_post", post), wanted)
        assert torch.equal(tap("0.mlp_post", post), post)
    usual = torch.full((2, 40), 7.0)
    found = measure.silent(model, [[1, 3]], "first", usual)("1.mlp_post", post)[..., 3]
    assert found.tolist() == [[7, 44, 84, 124, 164], [7, 244, 284, 324, 364]]
