"""Figures: each draws what LINKS holds, is readable, and is the same bytes twice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import AxesImage
from matplotlib.text import Text

import probe
from chapters import figures
from data.windows import random_windows
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def seen(made_up):
    """What a tiny model shows, the made-up link among the others."""
    model = tiny_model()
    x, y = random_windows(4, 16, 50)
    tables = [probe.cuts(model, x, y, k=5, seed=seed) for seed in (0, 1)]
    return {"portrait": figures.portrait(model, x), "tables": tables,
            "verdicts": probe.verdicts(tables, 16), "links": probe.chain(model, x)}


def log(seen, missing=()):
    """Four evaluations of log.jsonl, of which the third lacks some numbers."""
    rows = []
    for i, step in enumerate((0, 10, 100, 1000)):
        links = {key: v * (1 + i) for key, v in seen["links"].items()}
        links |= {key: None for key in missing if i == 2}
        rows.append({"step": step, "train_loss": None if i == 0 else 3.0 / i, "val_loss": 4.0 - i,
                     "links": links})
    return rows


def words(figure):
    return [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]


LINK, EDIT = "a link nobody else names", "mirrors: it is mirrored"
DRAWN = {  # how it is drawn, and what is said of the made-up link
    "chain": (lambda s: figures.chain({"a": s["portrait"]}, "random tokens"), LINK),
    "three": (lambda s: figures.chain(dict.fromkeys("abc", s["portrait"]), ""), LINK),
    "cut": (lambda s: figures.cut({"a": s["verdicts"], "b": s["verdicts"]}), EDIT),
    "matrix": (lambda s: figures.matrix(s["tables"]), EDIT),
    "birth": (lambda s: figures.birth(log(s)), "mirrors ("),
    "maps": (lambda s: figures.maps(dict.fromkeys("ab", s["portrait"]["map"]), ((0,), (0, 5))), "")}


@pytest.mark.parametrize("draw, says", DRAWN.values(), ids=DRAWN)
def test_each_has_the_link_is_readable_and_the_same_twice(seen, draw, says):
    figure = draw(seen)
    first = figures.png(figure)
    assert first[:4] == b"\x89PNG" and first == figures.png(draw(seen))
    text = " ".join(t.get_text() for t in words(figure))
    assert says in " ".join(text.split())
    assert figure.get_figwidth() <= 8.8  # 850 CSS pixels: points stay points
    assert min(t.get_fontsize() for t in words(figure)) >= 9
    for ax in figure.axes:  # a frame would hide the first token
        assert not (ax.findobj(AxesImage) and any(s.get_visible() for s in ax.spines.values()))


def test_the_sink_has_the_accent():
    _, ax = figures.new(3, 1, 1)
    figures.attention(ax, torch.full((8, 8), 0.25).tril(), "a map", sink=(0, 3))
    red, green, _ = ax.images[0].get_array().transpose(2, 0, 1)
    assert (red[4:, [0, 3]] > green[4:, [0, 3]] + 0.2).all()
    assert (red[:, [1, 2, 4, 5, 6, 7]] == green[:, [1, 2, 4, 5, 6, 7]]).all()
    assert (red[0, 1:] == 1).all() and (green[7] < 1).all()  # white: what a query cannot see


def test_numbers_that_do_not_exist_are_left_out(seen):
    keys = [link.numbers[0].key for link in probe.LINKS]
    axes = figures.birth(log(seen, missing=keys)).axes[0]
    assert {len(line.get_xdata()) for line in axes.lines} == {3}
    nothing = {key: v * torch.nan for key, v in seen["portrait"]["first"].items()}
    assert figures.png(figures.chain({"a": seen["portrait"] | {"first": nothing}}, "text"))
    verdicts = [v | {"share": float("nan")} for v in seen["verdicts"]]
    assert figures.png(figures.cut({"a": verdicts}))


def test_import_leaves_pyplot_the_backend_and_the_folder_alone(tmp_path):
    code = ("import os, sys; from chapters import figures; assert 'matplotlib.pyplot' not in "
            "sys.modules; import lesson, matplotlib; print(matplotlib.get_backend(), os.getcwd())")
    root = Path(__file__).parent.parent
    env = os.environ | {"MPLBACKEND": "svg", "PYTHONPATH": f"{root}{os.pathsep}{root / 'chapters'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, env=env,
                          capture_output=True)
    assert done.stdout.split() == ["svg", str(tmp_path.resolve())], done.stderr
