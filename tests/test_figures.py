"""Figures: each is drawn, holds what it was given, and is readable."""

from functools import partial

import pytest
import torch
from matplotlib.text import Text

import probe
from chapters import figures
from data.windows import random_windows
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def draw(made_up):
    """{name: how to draw what a tiny model shows}, the made-up link among the others."""
    model, keys = tiny_model(), probe.headline_keys()
    x, y = random_windows(4, 16, 50)
    portrait, table = probe.portrait(model, x), probe.cuts(model, x, y, k=5)
    log, numbers = [], probe.chain(model, x)
    for step in (0, 10, 100):
        log.append({"step": step, "links": {key: step * numbers[key] for key in numbers}})
    log[1]["links"]["mirror"] = None
    portraits = {"a$b_Köln 猫": portrait, "$c$": portrait}
    verdicts = {"a": probe.verdicts([table], 16)}
    return {
        "chain": partial(figures.chain, portraits, "random tokens"),
        "cut": partial(figures.cut, verdicts, probe.WHOLE),
        "matrix": partial(figures.matrix, list(probe.matrix([table])), keys),
        "birth": partial(figures.birth, log, keys, "links", "title")}


@pytest.mark.filterwarnings("error::UserWarning")  # of a letter that the font lacks
@pytest.mark.parametrize("name, says", [
    ("chain", "a headline nobody else names"), ("cut", "mirrors: it is mirrored"),
    ("matrix", "mirrors: it is mirrored"), ("birth", "mirrors (")])
def test_each_is_drawn_and_readable(draw, name, says):
    figure = draw[name]()
    assert figures.drawn(figure).startswith(b"\x89PNG")
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    words = " ".join(text.get_text() for text in texts)
    assert says in " ".join(words.split())
    assert min(text.get_fontsize() for text in texts if text.get_visible()) >= 9


def test_a_figure_is_the_same_twice():
    first, second = (figures.drawn(figures.new(1)[0], "svg") for _ in range(2))
    assert first == second
    assert b"Software" not in figures.drawn(figures.new(1)[0])  # nor the version of matplotlib


def test_numbers_that_do_not_exist_are_left_out(draw):
    lines = draw["birth"]().axes[0].lines
    assert {len(line.get_xdata()) for line in lines} == {2, 3}


def test_a_name_is_drawn_as_it_is(draw):
    assert r"a\$b_Köln 猫" in draw["chain"]().axes[0].get_title("left")


def test_what_is_drawn_is_what_was_given():
    _, (left, middle, right) = figures.new(3, 1, 3)
    link = {"name": "n", "label": "l", "dot": None, "baseline": None}
    figures.headline(left, [link | {"first": [2, 3], "ordinary": [1, 1]}])
    curves = {line.get_color(): list(line.get_ydata()) for line in left.lines}
    assert curves == {figures.GREY: [1, 1], figures.ACCENT: [2, 3]}
    verdict = {"link": "l", "says": "s", "said": "no", "share": 0.5, "spread": 0}
    figures.effects(middle, [verdict | {"controls": [(0.1, 0)]}], 0.5)
    assert [bar.get_width() for bar in middle.patches] == [0.5, 0.1]
    figures.bars(right, {"name": {"label": (0.5, 0.1)}}, "title")
    assert right.patches[0].get_height() == 0.5
    cell, = figures.matrix([("edit", "e", {"a": 1.0}, {"a": 2.0})], {"A": "a"}).axes[0].texts
    assert cell.get_text() == "2"  # after the edit
    log = [{"step": step, "links": {"sink": step}} for step in (0, 10)]
    born, = figures.birth(log, {"sink": "sink"}, "links", "title").axes[0].lines
    assert born.get_ydata().tolist() == [0, 1]


def test_the_sink_has_the_accent():
    _, ax = figures.new(3)
    figures.attention(ax, torch.full((4, 4), 0.25).tril(), "a map", sink=(0, 3))
    red, green, _ = ax.images[0].get_array().transpose(2, 0, 1)
    assert (red[3] > green[3] + 0.2).tolist() == [True, False, False, True]
    assert (red[0, 1:] == 1).all()  # white: what a query cannot see
