"""Figures: each is drawn once, holds what it was given, and is readable."""

import os
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
    model = tiny_model()
    x, y = random_windows(4, 16, 50)
    table = probe.cuts(model, x, y, k=5)
    links, log = probe.chain(model, x), []
    for step in (0, 10, 100):
        log.append({"step": step, "train_loss": 3.0 if step else None, "val_loss": 4.0,
                    "links": {key: value * (1 + step) for key, value in links.items()}})
    log[1]["links"]["mirror"] = None
    return {"portraits": dict.fromkeys(["a", "b_c $2"], probe.portrait(model, x)),
            "verdicts": {"a": probe.verdicts([table], 16)}, "log": log,
            "rows": list(probe.matrix([table])), "columns": probe.headline_keys()}


DRAWN = {
    "chain": (lambda s: figures.chain(s["portraits"], "random tokens"), LINK),
    "cut": (lambda s: figures.cut(s["verdicts"], probe.WHOLE), EDIT),
    "matrix": (lambda s: figures.matrix(s["rows"], s["columns"]), EDIT),
    "birth": (lambda s: figures.birth(s["log"], s["columns"]), "mirrors ("),
    "maps": (lambda s: figures.maps({"a map": s["portraits"]["a"]["map"]}, [(0,)]), "a map")}


@pytest.mark.parametrize("draw, says", DRAWN.values(), ids=DRAWN)
def test_each_is_drawn_readable_and_the_same_twice(seen, draw, says):
    figure = draw(seen)
    assert figures.png(figure) == figures.png(draw(seen))
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    assert says in " ".join(" ".join(text.get_text() for text in texts).split())
    assert figure.get_figwidth() <= 8.8  # 850 CSS pixels: points stay points
    assert min(text.get_fontsize() for text in texts if text.get_visible()) >= 9


def test_the_curve_of_a_training(seen, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda path, figure: drawn.append((path, figure)))
    figures.curve(tmp_path, seen["log"], {"links": "ordinary", "links_bos": "bos"}, 0.2, 1.5)
    (path, figure), = drawn
    assert path == tmp_path / "curve.png"
    labels = [[line.get_label() for line in ax.lines] for ax in figure.axes]
    assert labels == [["training", "validation", "perfect predictor"],
                      ["ordinary", "uniform attention"]]
    assert [len(line.get_xdata()) for line in figure.axes[0].lines[:2]] == [2, 3]


def test_numbers_that_do_not_exist_are_left_out(seen):
    lines = figures.birth(seen["log"], seen["columns"]).axes[0].lines
    assert {len(line.get_xdata()) for line in lines} == {2, 3}
    nothing = [verdict | {"share": float("nan")} for verdict in seen["verdicts"]["a"]]
    assert figures.png(figures.cut({"a": nothing}, probe.WHOLE))


def test_the_sink_has_the_accent():
    _, ax = figures.new(3, 1, 1)
    figures.attention(ax, torch.full((8, 8), 0.25).tril(), "a map", sink=(0, 3))
    red, green, _ = ax.images[0].get_array().transpose(2, 0, 1)
    grey = [1, 2, 4, 5, 6, 7]
    assert (red[4:, [0, 3]] > green[4:, [0, 3]] + 0.2).all()
    assert (red[:, grey] == green[:, grey]).all()
    assert (red[0, 1:] == 1).all()  # white: what a query cannot see


def test_import_leaves_pyplot_the_backend_and_the_folder_alone(tmp_path):
    code = """if True:
        import os, sys
        from chapters import figures
        assert "matplotlib.pyplot" not in sys.modules and "probe" not in sys.modules
        import lesson, matplotlib
        print(matplotlib.get_backend(), os.getcwd())"""
    root = Path(__file__).parent.parent
    env = os.environ | {"MPLBACKEND": "svg",
                        "PYTHONPATH": f"{root}{os.pathsep}{root / 'chapters'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, env=env,
                          capture_output=True)
    assert done.stdout.split() == ["svg", str(tmp_path.resolve())], done.stderr
