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
import itertools
import math
import re
import sys
import textwrap
from pathlib import Path

import matplotlib
import torch
from cycler import cycler
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from data.common import write_atomically

SINK = "sink"  # the key of the number that has the accent
ACCENT, GREY, WIDTH = "#e8450c", "0.45", 8.8
STYLES = [
    {"color": "black", "ls": "-", "marker": "o"},
    {"color": "0.45", "ls": "--", "marker": "s"},
    {"color": "0.6", "ls": "-.", "marker": "^"},
    {"color": "black", "ls": ":", "marker": "D"},
    {"color": "0.3", "ls": "-", "marker": "v"},
    {"color": "0.6", "ls": "--", "marker": "x"},
    {"color": "0.45", "ls": ":", "marker": "P"},
    {"color": "black", "ls": "-.", "marker": "*"},
]
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 9,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "figure.titlesize": 11,
    "axes.titleweight": "bold", "figure.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "0.92", "axes.axisbelow": True,
    "lines.linewidth": 1.4, "lines.markersize": 4.5, "legend.frameon": False,
    "figure.constrained_layout.use": True, "savefig.dpi": 144,
    "axes.prop_cycle": cycler(color=[s["color"] for s in STYLES],
                              ls=[s["ls"] for s in STYLES]),
}
DOTTED = {"color": "black", "lw": 0.9, "ls": ":"}  # a baseline, or a threshold
styled = matplotlib.rc_context(STYLE)


@styled
def new(height, *shape, **how):
    """A figure of page width and its axes, without pyplot: new(3, 1, 2) has two side by
    side."""
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(*shape, **how)


@styled
def png(figure) -> bytes:
    """The same figure gives the same bytes; pyplot, where it made it, forgets it."""
    part = io.BytesIO()
    figure.savefig(part, format="png", dpi=144, metadata={"Software": None})
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(figure)
    return part.getvalue()


def save(path, figure) -> None:
    """Raises UserError where nothing can be written."""
    content = png(figure)
    write_atomically(path, lambda part: part.write_bytes(content))


# ---------------------------------------------------------------- for chapters too

def dress(ax, title, legend=None, **labels):
    """Title (wrapped to the axes), labels, and a legend for a dict of its settings."""
    ax.set(**labels)
    if title is not None:
        inches = ax.get_position().width * ax.figure.get_figwidth()
        ax.set_title(textwrap.fill(title, max(18, round(inches / 0.085))))
    plain_numbers(ax.xaxis, *ax.get_xlim())
    plain_numbers(ax.yaxis, *ax.get_ylim())
    if legend is not None:
        ax.legend(**legend)


def plain_numbers(axis, low, high):
    """A log axis of few decades gets plain numbers, not one crowded power of ten."""
    if axis.get_scale() != "log" or high / low >= 1e4:
        return
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    if high / low < 1000:
        subs = (1, 3) if high / low > 30 else (1, 2, 5)
        axis.set_major_locator(LogLocator(10, subs=subs))
        axis.set_minor_locator(NullLocator())


def tex(text, font=""):
    """V_k, W_O, x_0 in plain text, with a real index."""
    pattern = r"\b[A-Za-z]_[A-Za-z0-9]\b"
    return re.sub(pattern, lambda match: f"${font}{{{match[0]}}}$", text)


def plain(name):
    """The name of a folder, which may hold a dollar, for a text that is drawn."""
    return name.replace("$", r"\$")


def lines(ax, curves, x=None, hot=()):
    """curves: name -> (n,). The names in `hot` are the first token's: in the accent."""
    hot_styles, grey_styles = itertools.cycle(STYLES), itertools.cycle(STYLES)
    for name, y in curves.items():
        y = torch.as_tensor(y).float().tolist()
        style = dict(next(hot_styles if name in hot else grey_styles))
        if name in hot:
            style.update(color=ACCENT, zorder=3)
        if len(y) > 40:
            style["marker"] = ""
        ax.plot(range(len(y)) if x is None else x, y, label=name, **style)


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
    for style, name in zip(STYLES, curves):
        y = torch.as_tensor(curves[name]).tolist()
        line = style | {"marker": ""}
        dot = style | {"color": ACCENT, "ms": 7}
        ax.plot(range(1, len(y) + 1), y, label=name, **line)
        ax.plot([1], y[:1], **dot)
    ax.set(xscale="log", yscale="log")
    dress(ax, title, legend, **{"xlabel": "position t + 1 (log)"} | labels)


def bars(ax, groups, title, hot=(), legend=None, **labels):
    """groups: name -> {label: value}, or each a (value, spread); a bar a name at each
    label."""
    ticks = list(dict.fromkeys(itertools.chain.from_iterable(groups.values())))
    width, greys = 0.8 / len(groups), iter(("0.35", "0.6", "0.8", "0.9"))
    for i, (name, group) in enumerate(groups.items()):
        shift = (i - (len(groups) - 1) / 2) * width
        color = ACCENT if name in hot else next(greys)
        x = [ticks.index(label) + shift for label in group]
        values, spreads = list(group.values()), None
        if isinstance(values[0], tuple):
            values, spreads = zip(*values)
        ax.bar(x, values, width, yerr=spreads, color=color, ecolor="black", label=name)
    ax.set_xticks(range(len(ticks)), ticks)
    ax.grid(False, axis="x")
    dress(ax, title, legend, **labels)


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
    depth = (0.03 + 0.97 * a.clamp(0, 1).sqrt())[..., None]
    return 1 - depth * (1 - torch.tensor(to_rgb(color)))


def without_frame(ax):
    """A frame would hide column 0 of a map."""
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.grid(False)


def shades(ax):
    """The scale of `attention`, drawn into narrow axes: other keys, and the sink."""
    a = torch.linspace(1, 0, 128) ** 2  # evenly spaced in shade
    image = torch.stack([shade(a, "black"), shade(a, ACCENT)], 1)
    ax.imshow(image.numpy(), aspect=24, extent=(0, 2, 0, 1), interpolation="nearest")
    without_frame(ax)
    ticks = (0, 0.05, 0.2, 0.5, 1)
    ax.set_yticks([math.sqrt(t) for t in ticks], [f"{t:g}" for t in ticks])
    ax.set_xticks([0.3, 1.7], ["others", "sink"], rotation=90)
    ax.yaxis.tick_right()
    ax.set_title("attention", fontsize=9, fontweight="normal", loc="right")


@styled
def maps(patterns, sinks, title=None) -> Figure:
    """Attention maps in one row, title -> (T, T), and the sinks of each."""
    widths = [12] * len(patterns) + [1]
    figure, axes = new(3.3 if title else 3.1, 1, len(widths), width_ratios=widths)
    for ax, (name, pattern), sink in zip(axes, patterns.items(), sinks):
        attention(ax, pattern, name, sink)
    shades(axes[-1])
    if title:
        figure.suptitle(title)
    return figure


def below(figure, entries, **how):
    """A legend below all axes. entries: label -> the look of its line."""
    handles = []
    for label, look in entries.items():
        handles.append(Line2D([], [], label=label, **look))
    figure.legend(handles=handles, loc="outside lower center", **how)


# ---------------------------------------------------------------- the chain of a model

@styled
def chain(portraits, kind) -> Figure:
    """chain.png: for up to three models (name -> `probe.portrait`) the map of the
    strongest head, and the headline of each link by layer. `kind`: what they read."""
    some = next(iter(portraits.values()))
    panels = len(portraits) + len(some["links"])
    columns = min((4, 3), key=lambda n: -panels % n)  # with fewest places left empty
    rows = math.ceil(panels / columns)
    figure, axes = new(2.75 * rows + 0.8, rows, columns, squeeze=False)
    axes = list(axes.flat)
    for name, portrait in portraits.items():
        ax = axes.pop(0)
        where = f"layer {portrait['layer']}, head {portrait['head']}"
        panel_title(ax, plain(name), f"{where}: darker is more attention")
        attention(ax, portrait["map"], None)
    for same_link in zip(*(portrait["links"] for portrait in portraits.values())):
        headline(axes.pop(0), same_link)
    for ax in axes:
        ax.axis("off")
    figure.suptitle(f"From the first token to the sink: every link, by layer ({kind})")
    entries = {
        "token 0": {"color": ACCENT},
        f"token {some['T'] // 2}": {"color": GREY},
        "baseline": DOTTED,
        "the number in the table": {"color": ACCENT, "marker": "o", "ls": ""}}
    if len(portraits) > 1:
        for style, name in zip(STYLES, portraits):
            entries[plain(name)] = {"color": "black", "ls": style["ls"]}
    below(figure, entries, ncols=len(entries), columnspacing=1.2, handlelength=1.8)
    return figure


def panel_title(ax, name, says):
    """The title of a narrow panel: a name in bold, and below it what is drawn."""
    text = textwrap.fill(says, 24)
    ax.set_title(text, x=-0.3, fontsize=9, fontweight="normal", pad=5)
    above = 8 + 11 * (text.count("\n") + 1)  # points
    ax.annotate(name, (-0.3, 1), (0, above), xycoords="axes fraction",
                textcoords="offset points", fontsize=10, fontweight="bold")


def headline(ax, models):
    """One of the "links" of `probe.portrait`, for each model."""
    link, seen = models[0], []
    for style, one in zip(STYLES, models):
        for curve, color in ((one["ordinary"], GREY), (one["first"], ACCENT)):
            seen += curve[curve.isfinite()].tolist()
            ax.plot(curve.tolist(), color=color, ls=style["ls"])
        layer = one["dot"]
        if layer is not None:
            value = one["first"][layer].item()
            ax.plot(layer, value, color=ACCENT, marker="o", clip_on=False)
    if link["baseline"] is not None:
        ax.axhline(link["baseline"], **DOTTED)
    if seen and max(seen) > max(3, 30 * min(seen)) and min(seen) > 1e-6:  # not rounding
        ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    dress(ax, None, xlabel="layer", ylabel=tex(textwrap.fill(link["label"], 26)))
    panel_title(ax, tex(link["name"], r"\mathbf"), link["says"])


# ---------------------------------------------------------------- cut and forge

@styled
def cut(found, whole) -> Figure:
    """cut.png: model -> `probe.verdicts`, a column each. Above, the share of the sink
    that a cut takes; below, the share of the two sinks that a forgery has; grey, the
    controls. `whole`: kind -> the share from which it holds, `probe.WHOLE`."""
    some = next(iter(found.values()))
    heights = [places(of_kind(some, kind))[1] for kind in whole]
    figure, axes = new(0.21 * sum(heights) + 2, 2, len(found), squeeze=False,
                       sharey="row", height_ratios=heights)
    for column, (name, verdicts) in zip(axes.T, found.items()):
        for ax, kind in zip(column, whole):
            effects(ax, of_kind(verdicts, kind), whole[kind])
        column[0].set_title(plain(name))
        column[0].set_xlabel("share of the sink that the cut takes")
        column[1].set_xlabel("share of the two sinks that is forged")
    figure.suptitle("Each link cut at token 0, and forged at an ordinary token")
    entries = [Patch(color=ACCENT, label="the link"),
               Patch(color="0.7", label="its controls"),
               Line2D([], [], color="black", ls="--", label="from here on it holds"),
               Line2D([], [], color="black", ls=":", label="partly")]
    figure.legend(handles=entries, loc="outside lower center", ncols=4)
    return figure


def of_kind(verdicts, kind):
    return [verdict for verdict in verdicts if verdict["kind"] == kind]


def places(verdicts):
    """Where the bar of each verdict is, with room for its controls; where all end."""
    room = [1.15 + len(verdict["controls"]) / 2 for verdict in verdicts]
    ends = list(itertools.accumulate(room))
    return [0, *ends[:-1]], ends[-1]


def effects(ax, verdicts, whole):
    """A bar for each verdict, and a thin grey one below it for each of its controls."""
    ticks, end = places(verdicts)
    for y, verdict in zip(ticks, verdicts):
        effect(ax, y, 0.8, verdict["share"], verdict["spread"], ACCENT)
        for i, (share, spread) in enumerate(verdict["controls"]):
            effect(ax, y + 0.65 + i / 2, 0.4, share, spread, "0.7")
        word = verdict["word"]
        if verdict["why"]:
            word += f": {verdict['why']}"
        ax.text(1.13, y, word, va="center")
    for x, ls in ((0, "-"), (whole, "--"), (whole / 2, ":")):
        ax.axvline(x, color="black", ls=ls, lw=0.9)
    ax.set_yticks(ticks, [tex(f"{v['link']}: {v['says']}") for v in verdicts])
    ax.set(xlim=(-0.22, 1.9), ylim=(end - 0.4, -0.6), xticks=(0, 0.5, 1))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(False, axis="y")


def effect(ax, y, height, share, spread, color):
    """One bar, which ends where the axes do in a model without a sink."""
    width = torch.tensor(share).clamp(-0.2, 1.1).item()
    ax.barh(y, width, height, color=color, xerr=spread or None, ecolor="black")


@styled
def matrix(rows, columns) -> Figure:
    """The cut matrix: `probe.matrix` (each edit and its controls) against
    `probe.headline_keys`. Number: after the edit. Shade: its change."""
    figure, ax = new(0.21 * len(rows) + 1.2)
    image = torch.ones(len(rows), len(columns), 3)
    for i, (_, _, before, after) in enumerate(rows):
        for j, key in enumerate(columns.values()):
            image[i, j], letters = cell(before[key], after[key], key == SINK)
            ax.text(j, i, short(after[key]), ha="center", va="center", color=letters)
    ax.imshow(image.numpy(), aspect="auto", interpolation="nearest")
    without_frame(ax)
    ax.set_xticks(range(len(columns)), [tex(name) for name in columns])
    ax.set_yticks(range(len(rows)), [tex(says) for _, says, *_ in rows], ha="left")
    for i, (label, (kind, *_)) in enumerate(zip(ax.get_yticklabels(), rows)):
        label.set_color("0.4" if kind == "control" else "black")
        if kind == "untouched":
            ax.axhline(i - 0.5, color="black", lw=1.2)
            label.set_fontweight("bold")
    ax.xaxis.tick_top()
    ax.tick_params(axis="both", length=0)
    ax.tick_params(axis="y", pad=210)  # points: as wide as the longest label
    ax.set_xlabel("number: after the edit; shade: its change, full from 100 % on")
    figure.suptitle("Every edit (grey: its controls) against every link")
    return figure


def cell(before, after, accent):
    """The colour of a cell of the matrix, by relative change, and of its number."""
    change = abs(after - before) / max(abs(before), 0.02)
    depth = 0.85 * min(change, 1.0) if math.isfinite(change) else 0.0
    color, dark = (ACCENT, 0.75) if accent else ("black", 0.5)
    shaded = 1 - depth * (1 - torch.tensor(to_rgb(color)))
    return shaded, "white" if depth > dark else "black"


def short(v):
    """Three digits; "-" for a number that does not exist."""
    if not math.isfinite(v):
        return "-"
    if abs(v) < 1000:
        return f"{v:.3g}"
    return f"{v:.0f}" if abs(v) < 1e5 else f"{v:.0e}"


# ---------------------------------------------------------------- training

@styled
def birth(rows, columns, links="links",
          title="How a sink is born, link by link") -> Figure:
    """rows of log.jsonl: the number of each column (`probe.headline_keys`) over the
    steps, as share of the way from its least to its greatest value. What is null is
    left out, and so is a column that no row has."""
    figure, ax = new(3.4)
    rows, styles = [row for row in rows if links in row], itertools.cycle(STYLES)
    for name, key in columns.items():
        if not any(key in row[links] for row in rows):
            continue
        there = [row for row in rows if row[links].get(key) is not None]
        steps = [max(row["step"], 1) for row in there]
        values = torch.tensor([row[links][key] for row in there])
        label, way = way_of(values)
        accent = dict(color=ACCENT, lw=2.2, zorder=3)
        style = accent if key == SINK else next(styles)
        ax.plot(steps[:len(way)], way, label=f"{tex(name)} ({label})", **style)
    ax.set(xscale="log", ylim=(-0.03, 1.03))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    beside = dict(loc="center left", bbox_to_anchor=(1, 0.5),
                  title="link (least to most)")
    dress(ax, title, beside, xlabel="step of training (log; step 0 is drawn at 1)",
          ylabel="way from least to most")
    return figure


def way_of(values):
    """Label and points of a line of `birth`; no points where all is rounding, as in the
    variance of a first token that is always the same."""
    if len(values) == 0 or values.max() - values.min() < 1e-6:
        return "does not move", []
    low, high = values.min().item(), values.max().item()
    way = (values - low) / (high - low)
    return f"{short(low)} to {short(high)}", way.tolist()


@styled
def curve(folder, log, kinds, baseline, optimum=None) -> None:
    """curve.png of a training, from the rows of log.jsonl: its losses, and the sink in
    each of `kinds`, {key of a row: what the windows are}. `baseline` is the sink of
    uniform attention, `optimum` the loss of a perfect predictor."""
    figure, (left, right) = new(3.2, 1, 2)
    track(left, log, lambda row: row["train_loss"], label="training",
          color=GREY, ls="--")
    track(left, log, lambda row: row["val_loss"], label="validation",
          color="black", ls="-")
    if optimum is not None:
        left.axhline(optimum, label="perfect predictor", **DOTTED)
    title = f"{plain(Path(folder).name)}: loss"
    dress(left, title, {}, xlabel="step", ylabel="nats per token")
    there = [kind for kind in kinds if any(kind in row for row in log)]
    for style, kind in zip(STYLES, there):
        track(right, log, lambda row: row.get(kind, {}).get(SINK), label=kinds[kind],
              color=ACCENT, ls=style["ls"])
    right.axhline(baseline, label="uniform attention", **DOTTED)
    says = "attention to the first token,\nstrongest head after layer 0"
    dress(right, "sink", {}, xlabel="step", ylabel=says)
    right.set_ylim(0)
    save(Path(folder) / "curve.png", figure)


def track(ax, log, value, **style):
    """A value of each evaluation over the steps; what is null is left out."""
    there = [row for row in log if value(row) is not None]
    steps = [row["step"] for row in there]
    ax.plot(steps, [value(row) for row in there], **style)
