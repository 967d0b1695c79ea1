"""tests/measure.py: every measurement runs and is drawn, on a model of no meaning; its committed
results have what the figures and their readers need."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from chapters import figures
from data.border import read_json
from data.windows import random_windows
from tests import measure
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_hidden_layers=3, vocab_size=300).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batches():
    windows = [random_windows(3, measure.T, 300, seed=b) for b in range(4)]
    return SimpleNamespace(random=windows[:2], text=windows[2:])


@pytest.mark.parametrize("name", measure.MEASUREMENTS)
def test_measured_and_drawn(name, model, batches):
    found = measure.settings() | measure.MEASUREMENTS[name](model, batches)
    held = found["held"].values() if isinstance(found["held"], dict) else found["held"]
    assert held and all(type(v) is bool for v in held)
    again = json.loads(json.dumps(measure.rounded(found), allow_nan=False))
    assert figures.png(measure.DRAWN[name](again)).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", measure.MEASUREMENTS)
def test_results(name):
    found = read_json(measure.path(name))
    wanted = {"model", "file", "versions", "hardware", "hypothesis", "held"}
    assert wanted <= set(found)
    assert found["hypothesis"] == measure.MEASUREMENTS[name].__doc__  # written down, and kept
    measure.DRAWN[name](found)
    assert measure.path(name, "png").stat().st_size < 150_000


def test_render_measures_nothing(tmp_path, monkeypatch):
    shutil.copy(measure.path("wo"), tmp_path)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure.smollm2, "fetch", lambda: pytest.fail("nothing to measure"))
    before = measure.path("wo").read_bytes()
    for options in (["--render"], []):  # a result that is there is kept
        measure.path("wo", "png").unlink(missing_ok=True)
        measure.main(["wo", *options])
        assert measure.path("wo", "png").exists() and measure.path("wo").read_bytes() == before


def test_first_wave():
    #         rises past 40 at 2, top at 3, low at 5, before the great rise of layer 6
    assert measure.first_wave([0, 9, 50, 80, 70, 10, 20, 999], main=6) == (2, 3, 5)


def test_choose():
    """Layer 1 of three doubles dimension c; layer 2 takes from it; layer 0 does it for all."""
    writes = torch.zeros(3, 4)
    writes[0, 0], writes[1, 1], writes[1, 2], writes[1, 3], writes[2, 0] = 1, 80, 20, 5, -50
    seen = [{"value": torch.tensor([0.0, 1, 106, 56]), "mlp": writes.sum(1),
             "mlp_rest": torch.tensor([1.0, 2, 0]), "writes": (writes, None)}]
    score = torch.tensor([[1.0, 2, 3, 4], [1, 5, 7, 20], [1, 1, 1, 40]])
    sets, main = measure.choose(seen, score)
    assert main == 1 and sets["writers"] == sets["wave two"] == [[1, 1], [1, 2]]
    assert sets["wave one"] == sets["erasers, early"] == [] and sets["erasers, late"] == [[2, 0]]
    assert sets["weights"] == [[2, 3], [1, 3]] and sets["like"] == [[1, 0], [1, 3]]


def test_silenced_at_token_0_or_everywhere(model, batches):
    x, y = batches.random[0]
    nothing = torch.zeros(3, model.cfg.intermediate_size)
    free = measure.silenced(model, x, y)
    same = measure.silenced(model, x, y, [[1, 3]], True, nothing)
    more = measure.silenced(model, x, y, [[1, 3]], False, nothing)
    assert torch.equal(free[0]["sink"][:2], same[0]["sink"][:2])  # layer 1 attends before it writes
    assert len({f["loss"] for f in (free, same, more)}) == 3
