"""Figures: each is drawn once, holds what it was given, and is readable."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text

import probe
from chapters import figures
from data.windows import random_windows
from tests.tiny import tiny_model

LINK, EDIT = "a headline nobody else names", "mirrors: it is mirrored"


@pytest.fixture(scope="module")
def seen(made_up):
    """What a tiny model shows, the made-up link among the others."""
    model, log = tiny_model(), []
    x, y = random_windows(4, 16, 50)
    table = probe.cuts(model, x, y, k=5)
    for step in (0, 10, 100):
        links = {key: step * value for key, value in probe.chain(model, x).items()}
        log.append({"step": step, "train_loss": 3.0, "val_loss": 4.0, "links": links})
    log[0]["train_loss"] = log[1]["links"]["mirror"] = None
    return {"portraits": dict.fromkeys(["a", "b_c"], probe.portrait(model, x)),
            "verdicts": {"a": probe.verdicts([table], 16)},
            "rows": list(probe.matrix([table])), "log": log}


def draw_birth(seen):
    return figures.birth(seen["log"], probe.headline_keys(), "links", "title")


DRAWN = {
    "chain": (lambda s: figures.chain(s["portraits"], "random tokens"), LINK),
    "cut": (lambda s: figures.cut(s["verdicts"], probe.WHOLE), EDIT),
    "matrix": (lambda s: figures.matrix(s["rows"], probe.headline_keys()), EDIT),
    "birth": (draw_birth, "mirrors (")}


@pytest.mark.parametrize("draw, says", DRAWN.values(), ids=DRAWN)
def test_each_is_drawn_readable_and_the_same_twice(seen, draw, says):
    figure = draw(seen)
    assert figures.png(figure) == figures.png(draw(seen))
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    assert says in " ".join(" ".join(text.get_text() for text in texts).split())
    assert figure.get_figwidth() <= 8.8  # 850 CSS pixels: points stay points
    assert min(text.get_fontsize() for text in texts if text.get_visible()) >= 9


def test_the_curve_of_a_training(seen, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "save", drawn.__setitem__)
    figures.curve(tmp_path, seen["log"], {"links": "ordinary", "links_bos": "bos"}, 0.2, 1.5)
    left, right = drawn[tmp_path / "curve.png"].axes
    assert [line.get_label() for line in right.lines] == ["ordinary", "uniform attention"]
    training, validation, optimum = (line.get_ydata() for line in left.lines)
    assert list(training) == [None, 3, 3]
    assert list(validation) == [4, 4, 4]
    assert list(optimum) == [1.5, 1.5]


def test_numbers_that_do_not_exist_are_left_out(seen):
    lines = draw_birth(seen).axes[0].lines
    assert {len(line.get_xdata()) for line in lines} == {2, 3}


def test_the_sink_has_the_accent():
    _, ax = figures.new(3)
    figures.attention(ax, torch.full((4, 4), 0.25).tril(), "a map", sink=(0, 3))
    red, green, _ = ax.images[0].get_array().transpose(2, 0, 1)
    assert (red[3] > green[3] + 0.2).tolist() == [True, False, False, True]
    assert (red[0, 1:] == 1).all()  # white: what a query cannot see


def test_import_leaves_pyplot_alone():
    code = "import sys, chapters.figures; print({'matplotlib.pyplot', 'probe'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          cwd=Path(__file__).parent.parent)
    assert done.stdout == "set()\n", done.stderr
