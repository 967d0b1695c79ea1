"""All drawing: numbers, arrays and words in, figures out; no model and no program is
known here.

A figure is for a slide: the claim is its title, the first token (the sink) has the one
accent colour, all else is black or grey, with its own kind of line. Widths are in
inches of 96 CSS pixels, and no figure is wider than 8.8, a README page: there a point
of type is a point. Files are drawn without pyplot, so that no backend is chosen for
anybody; chapters use pyplot as everybody does, and hand its axes to the small functions
below.

In this file: saving, what chapters draw with, chain.png, cut.png, the cut matrix, and
the figures of a training.
"""

import io
import math
import re
import sys
import textwrap
import warnings

import matplotlib
import torch
from cycler import cycler
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from data.common import UserError, digits, write_atomically

HOT = "sink"  # the key of the number that has the accent
ACCENT, GREY, WIDTH = "#e8450c", "0.45", 8.8
KINDS_OF_LINE = cycler(
    color=["black", "0.45", "0.6", "black", "0.3", "0.6", "0.45", "black"],
    ls=["-", "--", "-.", ":", "-", "--", ":", "-."])
STYLES = list(KINDS_OF_LINE + cycler(marker="os^DvxP*"))
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "figure.titlesize": 11,
    "axes.titleweight": "bold", "figure.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "0.92", "axes.axisbelow": True,
    "lines.linewidth": 1.4, "lines.markersize": 4.5, "legend.frameon": False,
    "legend.fontsize": 9, "figure.constrained_layout.use": True, "savefig.dpi": 144,
    "axes.prop_cycle": KINDS_OF_LINE,
}
DOTTED = {"color": "black", "lw": 0.9, "ls": ":"}  # a baseline, or a threshold
PERCENT = "{x:.0%}"
styled = matplotlib.rc_context(STYLE)


@styled
def new(height, *shape, **how):
    """A figure of page width and its axes, without pyplot: new(3, 1, 2) has two side by
    side."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(*shape, **how)


NO_DATE = {"png": "Software", "svg": "Date", "pdf": "CreationDate"}  # nor a version


@styled
def drawn(figure, kind="png") -> bytes:
    """A file of this kind: png, svg or pdf. The same figure gives the same bytes;
    pyplot, where it made it, forgets it."""
    part = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "sink"}):
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks
        figure.savefig(part, format=kind, metadata={NO_DATE[kind]: None})
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot:
        pyplot.close(figure)
    return part.getvalue()


def save(path, figure) -> None:
    """As png, svg or pdf, by the ending of the path. Raises UserError where nothing can
    be written."""
    kind = path.suffix[1:]
    if kind not in NO_DATE:
        raise UserError(f"{path.name}: a figure is png, svg or pdf")
    content = drawn(figure, kind)
    write_atomically(path, lambda part: part.write_bytes(content))


# ---------------------------------------------------------------- for chapters too

def dress(ax, title, legend=None, **labels):
    """Title (wrapped to the axes), labels, and a legend for a dict of its settings."""
    ax.set(**labels)
    inches = ax.get_position().width * ax.figure.get_figwidth()
    ax.set_title(textwrap.fill(title, max(18, round(inches / 0.085))))
    plain_numbers(ax.xaxis)
    plain_numbers(ax.yaxis)
    if legend is not None:
        ax.legend(**legend)


def plain_numbers(axis):
    """A log axis of few decades gets plain numbers, not one crowded power of ten."""
    low, high = axis.get_view_interval()
    if axis.get_scale() != "log" or high / low >= 1e4:
        return
    axis.set_major_formatter("{x:g}")
    if high / low < 1000:
        subs = (1, 3) if high / low > 30 else (1, 2, 5)
        axis.set_major_locator(LogLocator(10, subs=subs))
        axis.set_minor_locator(NullLocator())


def tex(text):
    """V_k, W_O, x_0 in plain text, with a real index."""
    return re.sub(r"\b([A-Za-z]_[A-Za-z0-9])\b", r"${\1}$", text)


def plain(name):
    """A name or word as it is: `$` begins no formula, and what is no UTF-8 is `?`."""
    return name.encode("utf-8", "replace").decode().replace("$", r"\$")


def lines(ax, curves, x=None, hot=()):
    """curves: name -> (n,), where None leaves a gap. The names in `hot` are the first
    token's: in the accent."""
    hot_styles, grey_styles = iter(STYLES), iter(STYLES)
    for name, y in curves.items():
        style = next(hot_styles if name in hot else grey_styles)
        if name in hot:
            style = style | {"color": ACCENT, "zorder": 3}
        if len(y) > 40:
            style = style | {"marker": ""}
        ax.plot(x or range(len(y)), y, label=name, **style)


def by_layer(ax, curves, title, hot=(), legend=None, **labels):
    """curves: name -> (L,), or (L, H), of which each layer's largest is drawn."""
    most = {}
    for name, values in curves.items():
        values = torch.as_tensor(values)
        most[name] = values.amax(1) if values.dim() == 2 else values
    lines(ax, most, hot=hot)
    ax.xaxis.get_major_locator().set_params(integer=True)
    dress(ax, title, legend, **{"xlabel": "layer"} | labels)


def by_position(ax, curves, title, legend=None, **labels):
    """curves: name -> (T,), on log axes; the first token of each is a large dot."""
    for style, (name, y) in zip(STYLES, curves.items()):
        ax.plot(range(1, len(y) + 1), y, label=name, **style | {"marker": ""})
        ax.plot([1], y[:1], **style | {"color": ACCENT, "ms": 7})
    ax.set(xscale="log", yscale="log")
    dress(ax, title, legend, **{"xlabel": "position t + 1 (log)"} | labels)


def bars(ax, groups, title, hot=(), legend=None, **labels):
    """groups: name -> {label: value}, or each a (value, spread); a bar a name at each
    label, the same labels in all groups."""
    width, greys = 0.8 / len(groups), iter(("0.35", "0.6", "0.8"))
    for i, (name, group) in enumerate(groups.items()):
        shift = (i - (len(groups) - 1) / 2) * width
        color = ACCENT if name in hot else next(greys)
        values, spreads = list(group.values()), None
        if isinstance(values[0], tuple):
            values, spreads = zip(*values)
        x = [place + shift for place in range(len(group))]
        ax.bar(x, values, width, yerr=spreads, color=color, ecolor="black", label=name)
    ax.set_xticks(range(len(group)), group)
    ax.grid(False, axis="x")
    dress(ax, title, legend, **labels)


def dots(ax, groups, title, hot=(), **labels):
    """groups: name -> values, a row of dots a name, from above."""
    for row, (name, values) in enumerate(groups.items()):
        color = ACCENT if name in hot else "black"
        ax.plot(values, [row] * len(values), "o", color=color, mfc="none", ms=6)
    ax.set_yticks(range(len(groups)), groups)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    dress(ax, title, **labels)


def attention(ax, pattern, title, sink=(0,)):
    """pattern (T, T), rows are queries. Keys in `sink` have the accent; the shade goes
    with the root of attention (see `shades`); what a query cannot see is white."""
    a = torch.as_tensor(pattern).float().cpu()
    image = shade(a, "black")
    for key in sink:
        image[:, key] = shade(a[:, key], ACCENT)
    image[torch.ones_like(a).triu(1) > 0] = 1
    ax.imshow(image.numpy(), interpolation="nearest")
    ticks = range(0, len(a), max(1, len(a) // 4))
    ax.set(xticks=ticks, yticks=ticks)
    without_frame(ax)
    dress(ax, title, xlabel="key", ylabel="query")


def shade(a, color):
    """Attention of any shape -> (..., 3): white to `color`, and never quite white."""
    return tint(0.03 + 0.97 * a.clamp(0, 1).sqrt(), color)


def tint(depth, color):
    """depth, of any shape, from 0 for white to 1 for `color` -> (..., 3)"""
    return 1 - depth[..., None] * (1 - torch.tensor(to_rgb(color)))


def without_frame(ax):
    """A frame would hide column 0 of a map."""
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.grid(False)


def shades(ax, colors=("black", ACCENT)):
    """The scale of `attention`, in narrow axes: other keys (black), and the sink."""
    a = torch.linspace(1, 0, 128) ** 2  # evenly spaced in shade
    image = torch.stack([shade(a, color) for color in colors], 1)
    extent = (0, len(colors), 0, 1)
    ax.imshow(image.numpy(), aspect=24, extent=extent, interpolation="nearest")
    without_frame(ax)
    ticks = (0, 0.05, 0.2, 0.5, 1)
    ax.set_yticks([math.sqrt(tick) for tick in ticks], ticks)
    names = ["sink" if color == ACCENT else "others" for color in colors]
    ax.set_xticks([0.2, 1.8][:len(colors)], names, rotation=90, fontsize=8)
    ax.yaxis.tick_right()
    ax.set_title("attention", fontsize=9, fontweight="normal", loc="right")


@styled
def maps(patterns, sinks, title=None) -> Figure:
    """Attention maps in one row, title -> (T, T), and the sinks of each."""
    widths = [12] * len(patterns) + [len(patterns) / 3]
    height = WIDTH / (len(patterns) + 0.3) + (0.6 if title else 0.4)
    figure, axes = new(height, 1, len(widths), width_ratios=widths)
    for ax, (name, pattern), sink in zip(axes, patterns.items(), sinks):
        attention(ax, pattern, name, sink)
    shades(axes[-1])
    if title:
        figure.suptitle(title)
    return figure


@styled
def words(maps, words, nexts, title) -> Figure:
    """One text in one head: maps, title -> (T, T), with its words on the axes; at the
    right above, where no query can see, what the model says next: `nexts` holds a list
    of (word, probability) for each map. Beside each other, or below for many words."""
    T, n = len(words), len(maps)
    side = max(3.4, 0.14 * T)  # inches: a line of type a word
    beside = T <= 24
    rows, columns = (1, n) if beside else (n, 1)
    figure, axes = new(rows * (side + 1) + 0.4, rows, columns, sharey=beside)
    short_words = [word if len(word) < 13 else word[:11] + "\u2026" for word in words]
    for ax, (name, pattern), following in zip(axes.flat, maps.items(), nexts):
        attention(ax, pattern, name)
        ax.set_xticks(range(T), map(plain, short_words), rotation=90)
        ax.set_yticks(range(T), map(plain, short_words))
        likely = [f"{word} {p:.0%}" for word, p in following]
        text = plain("\n".join(["next word:", *likely]))
        ax.text(0.99, 0.99, text, ha="right", va="top", transform=ax.transAxes)
        first = name == next(iter(maps))
        ax.set(xlabel="looked at", ylabel="reader" if first or not beside else "")
    figure.suptitle(plain(title))
    return figure


def below(figure, entries, **how):
    """A legend below all axes. entries: label -> the look of its line."""
    handles = [Line2D([], [], label=label, **look) for label, look in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", **how)


# ---------------------------------------------------------------- the chain of a model

@styled
def chain(portraits, kind) -> Figure:
    """chain.png: for up to three models (name -> `probe.portrait`) the map of the
    strongest head, and the headline of each link by layer. `kind`: what they read."""
    some = next(iter(portraits.values()))
    panels = len(portraits) + len(some["links"])
    columns = 3 if panels < 10 else 4
    rows = math.ceil(panels / columns)
    figure, axes = new(2.6 * rows + 0.8, rows, columns)
    for ax in axes.flat[panels:]:
        ax.axis("off")
    places = iter(axes.flat)
    for name, portrait in portraits.items():
        title = f"{plain(name)}: layer {portrait['layer']}, head {portrait['head']}"
        attention(next(places), portrait["map"], title)
    for same_link in zip(*(portrait["links"] for portrait in portraits.values())):
        headline(next(places), same_link)
    figure.suptitle(f"From the first token to the sink: every link, by layer ({kind})")
    entries = {
        "token 0": {"color": ACCENT},
        f"token {some['T'] // 2}": {"color": GREY},
        "baseline": DOTTED,
        "the number in the table": {"color": ACCENT, "marker": "o", "ls": ""}}
    if len(portraits) > 1:
        for style, name in zip(STYLES, portraits):
            entries[plain(name)] = {"color": "black", "ls": style["ls"]}
    below(figure, entries, ncols=4)
    return figure


def headline(ax, models):
    """One of the "links" of `probe.portrait`, for each model."""
    link = models[0]
    for style, one in zip(STYLES, models):
        ax.plot(one["ordinary"], color=GREY, ls=style["ls"])
        ax.plot(one["first"], color=ACCENT, ls=style["ls"])
        if one["dot"] is not None:
            value = one["first"][one["dot"]]
            ax.plot(one["dot"], value, color=ACCENT, marker="o", clip_on=False)
    if link["baseline"] is not None:
        ax.axhline(link["baseline"], **DOTTED)
    low, high = ax.dataLim.intervaly
    if low > 1e-6 and high > max(3, 30 * low):  # below that all is rounding
        ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    dress(ax, tex(link["name"]), xlabel="layer",
          ylabel=tex(textwrap.fill(link["label"], 26)))


# ---------------------------------------------------------------- cut and forge

@styled
def cut(found, whole) -> Figure:
    """cut.png: model -> `probe.verdicts`, a column each. Above, the share of the sink
    that a cut takes; below, the share of the two sinks that a forgery has; grey, the
    controls. `whole`: kind -> the share from which it holds, `probe.WHOLE`."""
    some = next(iter(found.values()))
    figure, axes = new(0.5 * len(some) + 1, 2, len(found), squeeze=False, sharey="row")
    for column, (name, verdicts) in zip(axes.T, found.items()):
        for ax, kind in zip(column, whole):
            same_kind = [verdict for verdict in verdicts if verdict["kind"] == kind]
            effects(ax, same_kind, whole[kind])
        column[0].set(title=plain(name), xlabel="share of the sink that the cut takes")
        column[1].set(xlabel="share of the two sinks that is forged")
    figure.suptitle("Each link cut at token 0, and forged at an ordinary token")
    entries = {
        "the link": {"color": ACCENT, "lw": 6},
        "its controls": {"color": "0.7", "lw": 6},
        "from here on it holds": {"color": "black", "ls": "--"},
        "partly": {"color": "black", "ls": ":"}}
    below(figure, entries, ncols=4)
    return figure


def effects(ax, verdicts, whole):
    """A bar for each verdict, and below it a grey one for each of its controls. A bar
    ends where the axes do in a model without a sink."""
    y, ticks = 0, {}
    for verdict in verdicts:
        ticks[y] = tex(f"{verdict['link']}: {verdict['says']}")
        ax.text(1.13, y, verdict["said"], va="center")
        color, effect = ACCENT, (verdict["share"], verdict["spread"])
        for share, spread in [effect, *verdict["controls"]]:
            width = min(max(share, -0.2), 1.1)
            ax.barh(y, width, color=color, xerr=spread, ecolor="black")
            y, color = y + 1, "0.7"
    for x, ls in ((0, "-"), (whole, "--"), (whole / 2, ":")):
        ax.axvline(x, color="black", ls=ls, lw=0.9)
    ax.set_yticks(list(ticks), ticks.values())
    ax.set(xlim=(-0.22, 1.9), ylim=(y - 0.4, -0.6), xticks=(0, 0.5, 1))
    ax.xaxis.set_major_formatter(PERCENT)
    ax.grid(False, axis="y")


@styled
def matrix(rows, columns) -> Figure:
    """The cut matrix: `probe.matrix` (each edit and its controls) against
    `probe.headline_keys`. Number: after the edit. Shade: its change."""
    figure, ax = new(0.21 * len(rows) + 1.2)
    image = torch.ones(len(rows), len(columns), 3)
    for i, (kind, _, before, after) in enumerate(rows):
        if kind == "untouched":
            ax.axhline(i - 0.5, color="black", lw=1.2)
        for j, key in enumerate(columns.values()):
            change = abs(after[key] - before[key]) / max(abs(before[key]), 0.02)
            depth = 0.85 * min(change, 1.0)
            color, dark = (ACCENT, 0.75) if key == HOT else ("black", 0.5)
            letters = "white" if depth > dark else "black"
            image[i, j] = tint(torch.tensor(depth), color)
            ax.text(j, i, digits(after[key]), ha="center", va="center", color=letters)
    ax.imshow(image.numpy(), aspect="auto", interpolation="nearest")
    ax.set_xticks(range(len(columns)), map(tex, columns))
    ax.set_yticks(range(len(rows)), [tex(says) for _, says, *_ in rows], ha="left")
    ax.xaxis.tick_top()
    without_frame(ax)
    ax.tick_params(axis="y", pad=210)  # points: as wide as the longest label
    ax.set_xlabel("number: after the edit; shade: its change, full from 100 % on")
    figure.suptitle("Every edit (indented: its controls) against every link")
    return figure


# ---------------------------------------------------------------- training

@styled
def birth(rows, columns, links, title) -> Figure:
    """rows of log.jsonl: the number of each column (`probe.headline_keys`) over the
    steps, as share of the way from its least to its greatest value. `links` is the key
    of a row. What is null is left out, and so is a column that no row has."""
    figure, ax = new(3.4)
    styles = iter(STYLES)
    for name, key in columns.items():
        there = [row for row in rows if row[links].get(key) is not None]
        if not there:
            continue
        steps = [max(row["step"], 1) for row in there]
        values = torch.tensor([row[links][key] for row in there])
        low, high = values.min().item(), values.max().item()
        way, label = (values - low) / (high - low), f"{digits(low)} to {digits(high)}"
        if high - low < 1e-6:  # rounding, if the first token is always the same
            steps, way, label = [], [], "does not move"
        accent = {"color": ACCENT, "lw": 2.2, "zorder": 3}
        style = accent if key == HOT else next(styles)
        ax.plot(steps, way, label=f"{tex(name)} ({label})", **style)
    ax.set(xscale="log", ylim=(-0.03, 1.03))
    ax.yaxis.set_major_formatter(PERCENT)
    beside = dict(loc="center left", bbox_to_anchor=(1, 0.5),
                  title="link (least to most)")
    dress(ax, title, beside, xlabel="step of training (log; step 0 is drawn at 1)",
          ylabel="way from least to most")
    return figure


@styled
def curve(name, log, kinds, baseline, optimum=None) -> Figure:
    """curve.png of the training `name`, from the rows of log.jsonl: its losses, and the
    sink in each of `kinds`, {key of a row: what the windows are}. `baseline` is the
    sink of uniform attention, `optimum` the loss of a perfect predictor."""
    figure, (left, right) = new(3.2, 1, 2)
    steps, losses, sinks = [row["step"] for row in log], {}, {}
    for what, key in (("training", "train_loss"), ("validation", "val_loss")):
        losses[what] = [row[key] for row in log]
    for kind, windows in kinds.items():
        if kind in log[0]:
            sinks[windows] = [row[kind][HOT] for row in log]
    lines(left, losses, steps)
    lines(right, sinks, steps, hot=sinks)
    right.axhline(baseline, label="uniform attention", **DOTTED)
    if optimum is not None:
        left.axhline(optimum, label="perfect predictor", **DOTTED)
    title = f"{plain(name)}: loss"
    dress(left, title, {}, xlabel="step", ylabel="nats per token")
    says = "attention to the first token,\nstrongest head after layer 0"
    dress(right, "sink", {}, xlabel="step", ylabel=says, ylim=(0, None))
    return figure


def track(ax, log, value, **style):
    """A value of each evaluation over the steps; what is null is left out."""
    there = [row for row in log if value(row) is not None]
    steps = [row["step"] for row in there]
    ax.plot(steps, [value(row) for row in there], **style)
