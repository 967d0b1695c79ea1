"""Figures: each draws what LINKS holds, is readable, and is the same bytes twice."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.image import AxesImage
from matplotlib.text import Text

import probe
import train
from chapters import figures
from data.windows import random_windows
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def seen():
    """A made-up link among the others, and what a tiny model shows with it."""
    change = probe.Edit("lucky charm removed", "z", "first", lambda x, p, s, i: x[:, p] * 0)
    luck = probe.Link("luck", "it is mere luck", [probe.Number(
        "luck", "size of z", lambda a: a["z"].abs().mean(), "mean")], cut=change, forge=change)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "LINKS", [luck, *probe.LINKS])
        model = tiny_model()
        x, y = random_windows(4, 16, 50)
        tables = [probe.cuts(model, x, y, k=5, seed=seed) for seed in (0, 1)]
        yield {"portrait": figures.portrait(model, x), "tables": tables,
               "verdicts": probe.verdicts(tables, 16), "links": probe.chain(model, x)}


def log(seen, missing=()):
    """Four evaluations of log.jsonl, of which the third lacks some numbers."""
    rows = []
    for i, step in enumerate((0, 10, 100, 1000)):
        links = {key: v * (1 + i) for key, v in seen["links"].items()}
        links |= {key: None for key in missing if i == 2}
        rows.append({"step": step, "train_loss": None if i == 0 else 3.0 / i, "val_loss": 4.0 - i,
                     "links": links, "links_bos": links})
    return rows


def words(figure):
    return [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]


def text(figure):
    return " ".join(" ".join(t.get_text() for t in words(figure)).split())


DRAWN = {
    "chain of one": lambda s: figures.chain({"a": s["portrait"]}, "random tokens"),
    "chain of three": lambda s: figures.chain(dict.fromkeys("abc", s["portrait"]), "text"),
    "cut": lambda s: figures.cut({"a": s["verdicts"], "b": s["verdicts"]}),
    "matrix": lambda s: figures.matrix(s["tables"]),
    "birth": lambda s: figures.birth(log(s)),
    "maps": lambda s: figures.maps({"one": s["portrait"]["map"], "two": s["portrait"]["map"]},
                                   ((0,), (0, 5))),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_each_is_readable_and_the_same_twice(seen, draw):
    figure = draw(seen)
    first = figures.png(figure)
    assert first[:4] == b"\x89PNG" and first == figures.png(draw(seen))
    assert figure.get_figwidth() <= figures.WIDTH == 8.8  # 850 CSS pixels: points stay points
    assert min(t.get_fontsize() for t in words(figure)) >= 9
    for ax in figure.axes:
        if ax.findobj(AxesImage):
            assert not any(spine.get_visible() for spine in ax.spines.values())


@pytest.mark.parametrize("name, says", [
    ("chain of one", "it is mere luck"), ("chain of three", "it is mere luck"),
    ("cut", "luck: lucky charm removed"), ("matrix", "luck: lucky charm removed"),
    ("birth", "luck (")])
def test_a_made_up_link_is_in_each(seen, name, says):
    assert says in text(DRAWN[name](seen))


def test_the_sink_has_the_accent_and_nothing_hides_it():
    figure, ax = figures.new(3, 1, 1)
    pattern = torch.full((8, 8), 0.25).tril()
    figures.attention(ax, pattern, "a map", sink=(0, 3))
    image = ax.images[0].get_array()
    red, green = image[..., 0], image[..., 1]
    assert (red[4:, [0, 3]] > green[4:, [0, 3]] + 0.2).all()
    assert (red[:, [1, 2, 4, 5, 6, 7]] == green[:, [1, 2, 4, 5, 6, 7]]).all()
    assert (image[0, 1:] == 1).all() and (image[7, :7] < 1).any(-1).all()
    assert "0" in [t.get_text() for t in ax.get_xticklabels()]


def test_portrait_is_the_strongest_head_after_layer_0(seen):
    model = tiny_model()
    x, _ = random_windows(4, 16, 50)
    p = seen["portrait"]
    found = probe.layers(model, x)[0][0]["sink"]
    assert p["layer"] == 1 and p["head"] == found[1].argmax()
    assert torch.allclose(p["map"].sum(-1), torch.ones(16))
    mean = p["map"][:, 0].mean()
    assert torch.isclose(mean, found[1].max(), atol=1e-5)
    assert torch.isclose(mean, torch.tensor(probe.summary(p["first"])["sink"]), atol=1e-5)


def test_numbers_that_do_not_exist_are_left_out(seen):
    keys = [link.numbers[0].key for link in probe.LINKS]
    axes = figures.birth(log(seen, missing=keys)).axes[0]
    assert {len(line.get_xdata()) for line in axes.lines} == {3}
    never = [row | {"links": dict.fromkeys(keys)} for row in log(seen)]
    assert figures.png(figures.birth(never))
    nothing = {key: v * torch.nan for key, v in seen["portrait"]["first"].items()}
    assert figures.png(figures.chain({"a": seen["portrait"] | {"first": nothing}}, "text"))
    verdicts = [v | {"share": float("nan")} for v in seen["verdicts"]]
    assert figures.png(figures.cut({"a": verdicts}))


def test_verdicts_have_bars_with_spread_and_thresholds(seen):
    above, below = figures.cut({"a": seen["verdicts"]}).axes
    for ax, kind, whole in ((above, "cut", 0.5), (below, "forge", 0.25)):
        rows = [v for v in seen["verdicts"] if v["kind"] == kind]
        shares = [share for v in rows for share in (v["share"], *(c for c, _ in v["controls"]))]
        drawn = [bar.get_width() for bar in ax.patches]
        assert drawn == pytest.approx([max(-0.2, min(s, 1.1)) for s in shares])
        assert {whole, whole / 2} <= {line.get_xdata()[0] for line in ax.lines}
        assert ax.findobj(LineCollection)
        assert [v["word"] for v in rows] == [t.get_text() for t in ax.texts]


def test_rule_says_from_where_on_it_holds():
    for whole in probe.WHOLE.values():
        assert f"from {whole:.0%}".replace("%", " %") in probe.RULE


def test_curve_of_a_training(seen, tmp_path):
    run = asdict(train.resolve(train.Run(size="micro", out=str(tmp_path))))
    header = {"run": run, "environment": {}, "corpus": {}}
    (tmp_path / "config.json").write_text(json.dumps(header))
    figures.curve(tmp_path, log(seen, missing=["sink"]), 0.8)
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_small_ones_draw_into_any_axes():
    figure, axes = figures.new(3, 1, 3)
    figures.by_layer(axes[0], {"token 0": torch.rand(6, 4), "others": [1, 2, 3, 4, 5, 6]},
                     "layers", hot=["token 0"], legend={}, ylabel="length")
    figures.by_position(axes[1], {"a": torch.rand(32)}, "positions")
    figures.bars(axes[2], {"it": {"x": (0.5, 0.1), "y": 0.2}, "control": {"x": 0.1}}, "bars",
                 hot=["it"])
    assert to_hex(axes[2].patches[0].get_facecolor()) == figures.ACCENT
    assert [line.get_color() for line in axes[0].lines] == [figures.ACCENT, "black"]
    assert figures.png(figure)


def test_import_leaves_pyplot_the_backend_and_the_folder_alone(tmp_path):
    code = """if True:
        import os, sys
        from chapters import figures
        assert "matplotlib.pyplot" not in sys.modules
        import lesson, matplotlib
        assert matplotlib.get_backend().lower() == "svg", matplotlib.get_backend()
        print(os.getcwd())"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "chapters")])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"MPLBACKEND": "svg",
                                                                 "PYTHONPATH": path})
    assert done.stdout.strip() == str(tmp_path.resolve()), done.stderr
