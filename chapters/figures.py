"""The one room for drawing. A figure is for a slide: the claim is its title, the first
token (the sink) has the one accent colour, all else is black or grey, with its own kind
of line.

Widths are in inches of 96 CSS pixels, and no figure is wider than 8.8, a README page:
there a point of type is a point. Files are drawn without pyplot, so that no backend is
chosen for anybody; chapters use pyplot as everybody does, and hand its axes to the
small functions below.
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

import probe
from data.common import write_atomically

SINK = "sink"  # the number of probe.LINKS that has the accent
ACCENT, GREY, WIDTH = "#e8450c", "0.45", 8.8
STYLES = [dict(zip(("color", "ls", "marker"), s)) for s in (
    ("black", "-", "o"), ("0.45", "--", "s"), ("0.6", "-.", "^"), ("black", ":", "D"),
    ("0.3", "-", "v"), ("0.6", "--", "x"), ("0.45", ":", "P"), ("black", "-.", "*"))]
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
    """Title (wrapped to the axes), labels, and a legend for a dict of its settings. A
    log axis of few decades gets plain numbers instead of one crowded power of ten."""
    ax.set(**labels)
    if title is not None:
        inches = ax.get_position().width * ax.figure.get_figwidth()
        ax.set_title(textwrap.fill(title, max(18, round(inches / 0.085))))
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        if axis.get_scale() != "log" or high / low >= 1e4:
            continue
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        if high / low < 1000:
            subs = (1, 3) if high / low > 30 else (1, 2, 5)
            axis.set_major_locator(LogLocator(10, subs=subs))
            axis.set_minor_locator(NullLocator())
    if legend is not None:
        ax.legend(**legend)


def tex(text, font=""):
    """V_k, W_O, x_0 in plain text, with a real index."""
    return re.sub(r"\b[A-Za-z]_[A-Za-z0-9]\b", lambda m: f"${font}{{{m[0]}}}$", text)


def lines(ax, curves, x=None, hot=(), **how):
    """curves: name -> (n,). The names in `hot` are the first token's: in the accent."""
    hot_styles, grey_styles = itertools.cycle(STYLES), itertools.cycle(STYLES)
    for name, y in curves.items():
        y = torch.as_tensor(y).float().tolist()
        style = dict(next(hot_styles if name in hot else grey_styles))
        style |= {"color": ACCENT, "zorder": 3} if name in hot else {}
        style |= {"marker": ""} if len(y) > 40 else {}
        ax.plot(range(len(y)) if x is None else x, y, label=name, **style | how)


def by_layer(ax, curves, title, hot=(), legend=None, **labels):
    """curves: name -> (L,), or (L, H), of which each layer's largest is drawn."""
    curves = {name: torch.as_tensor(v) for name, v in curves.items()}
    most = {name: v.amax(1) if v.dim() == 2 else v for name, v in curves.items()}
    lines(ax, most, hot=hot)
    ax.xaxis.get_major_locator().set_params(integer=True)
    dress(ax, title, legend, **{"xlabel": "layer"} | labels)


def by_position(ax, curves, title, legend=None, **labels):
    """curves: name -> (T,), on log axes; the first token of each is a large dot."""
    for style, (name, y) in zip(STYLES, curves.items()):
        y = torch.as_tensor(y).tolist()
        ax.plot(range(1, len(y) + 1), y, label=name, **style | {"marker": ""})
        ax.plot([1], y[:1], **style | {"color": ACCENT, "ms": 7})
    ax.set(xscale="log", yscale="log")
    dress(ax, title, legend, **{"xlabel": "position t + 1 (log)"} | labels)


def bars(ax, groups, title, hot=(), legend=None, **labels):
    """groups: name -> {label: value or (value, spread)}; a bar a name at each label."""
    places = list(dict.fromkeys(itertools.chain.from_iterable(groups.values())))
    width, greys = 0.8 / len(groups), iter(("0.35", "0.6", "0.8", "0.9"))
    for i, (name, group) in enumerate(groups.items()):
        shift = (i - (len(groups) - 1) / 2) * width
        color = ACCENT if name in hot else next(greys)
        for label, value in group.items():
            value, spread = value if isinstance(value, tuple) else (value, None)
            ax.bar(places.index(label) + shift, value, width, yerr=spread, color=color,
                   ecolor="black", label=name if label == next(iter(group)) else None)
    ax.set_xticks(range(len(places)), places)
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
    handles = [Line2D([], [], label=label, **look) for label, look in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", **how)


# ---------------------------------------------------------------- the chain of a model

@torch.no_grad()
def portrait(model, x) -> dict:
    """What `chain` draws of one model on windows x (N, T): the numbers of probe.LINKS
    by layer for token 0 and token T / 2, and the mean attention (T, T) of the strongest
    head after layer 0, rows made to sum to 1."""
    patterns = []
    both, _ = probe.layers(model, x, keep_in(patterns), ks=(0, x.shape[1] // 2))
    return picture(model.cfg, both, patterns)


def keep_in(patterns):
    """A tap that appends the pattern (N, H, T, T) of each layer to a list."""
    def keep(name, value):
        if name.endswith(".pattern"):
            patterns.append(value.float())
        return value
    return keep


def picture(cfg, both, patterns) -> dict:
    """`portrait`, from one pass of probe.layers and what `keep_in` has kept of it."""
    first, ordinary = both
    layer, head = probe.strongest(first["sink"])
    rows = patterns[layer][:, head]
    rows = rows / rows.sum(-1, keepdim=True).clamp_min(1e-12)
    return {"cfg": cfg, "T": rows.shape[-1], "first": first, "ordinary": ordinary,
            "layer": layer, "head": head, "map": rows.mean(0).cpu()}


@styled
def chain(portraits, kind) -> Figure:
    """chain.png: of the first three models (name -> `portrait`) the map of the
    strongest head, and for each link its headline by layer. `kind`: what they read."""
    shown = dict(list(portraits.items())[:3])
    panels = len(shown) + len(probe.LINKS)
    columns = min((4, 3), key=lambda n: -panels % n)  # with fewest places left empty
    rows = math.ceil(panels / columns)
    figure, axes = new(2.75 * rows + 0.8, rows, columns, squeeze=False)
    axes = list(axes.flat)
    for name, p in shown.items():
        where = f"layer {p['layer']}, head {p['head']}: darker is more attention"
        claim(axes[0], name, where)
        attention(axes.pop(0), p["map"], None)
    for link in probe.LINKS:
        headline(axes.pop(0), link, shown)
    for ax in axes:
        ax.axis("off")
    figure.suptitle(f"From the first token to the sink: every link, by layer ({kind})")
    middle = next(iter(shown.values()))["T"] // 2
    entries = {"token 0": {"color": ACCENT}, f"token {middle}": {"color": GREY},
               "chance": {"color": "black", "ls": ":", "lw": 0.9},
               "the number in the table": {"color": "black", "marker": "o", "ls": ""}}
    for style, name in zip(STYLES, shown if len(shown) > 1 else ()):
        entries[name] = {"color": "black", "ls": style["ls"]}
    below(figure, entries, ncols=len(entries), columnspacing=1.2, handlelength=1.8)
    return figure


def claim(ax, name, says):
    """The title of a narrow panel: a name in bold, and below it what it says."""
    text = textwrap.fill(says, 24)
    ax.set_title(tex(text), x=-0.3, fontsize=9, fontweight="normal", pad=5)
    above = 8 + 11 * (text.count("\n") + 1)  # points
    ax.annotate(tex(name, r"\mathbf"), (-0.3, 1), (0, above), xycoords="axes fraction",
                textcoords="offset points", fontsize=10, fontweight="bold")


def headline(ax, link, portraits):
    """The first number of a link by layer; of numbers by head, a layer's largest."""
    number, seen = link.numbers[0], []
    for style, (name, p) in zip(STYLES, portraits.items()):
        for token, color in (("ordinary", GREY), ("first", ACCENT)):
            v = p[token][number.key].float()
            y = v.amax(1) if v.dim() == 2 else v
            seen += y[y.isfinite()].tolist()
            ax.plot(y.tolist(), color=color, ls=style["ls"])
        largest = y.nan_to_num().argmax().item()
        where = {"first": 0, "largest": largest, "sink head": p["layer"]}
        if number.read in where:
            value = probe.summary(p["first"])[number.key]
            ax.plot(where[number.read], value, color=ACCENT, marker="o", clip_on=False)
    null = probe.baseline(number, p["cfg"], p["T"])
    if null is not None:
        ax.axhline(null, color="black", lw=0.9, ls=":")
    if seen and max(seen) > max(3, 30 * min(seen)) and min(seen) > 1e-6:  # not rounding
        ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    dress(ax, None, xlabel="layer", ylabel=tex(textwrap.fill(number.says, 26)))
    claim(ax, link.name, link.says)


# ---------------------------------------------------------------- cut and forge

@styled
def cut(found) -> Figure:
    """cut.png: model -> `probe.verdicts`, a column each. Above, the share of the sink
    that a cut takes; below, the share of the two sinks that a forgery has; grey, the
    controls."""
    some = next(iter(found.values()))
    heights = [places([v for v in some if v["kind"] == kind])[1]
               for kind in probe.WHOLE]
    figure, axes = new(0.21 * sum(heights) + 2, 2, len(found), squeeze=False,
                       sharey="row", height_ratios=heights)
    for column, (name, verdicts) in zip(axes.T, found.items()):
        for ax, (kind, whole) in zip(column, probe.WHOLE.items()):
            effects(ax, [v for v in verdicts if v["kind"] == kind], whole)
        column[0].set_title(name)
        column[0].set_xlabel("share of the sink that the cut takes")
        column[1].set_xlabel("share of the two sinks that is forged")
    figure.suptitle("Each link cut at token 0, and forged at an ordinary token")
    entries = [Patch(color=ACCENT, label="the link"),
               Patch(color="0.7", label="its controls"),
               Line2D([], [], color="black", ls="--", label="from here on it holds"),
               Line2D([], [], color="black", ls=":", label="partly")]
    figure.legend(handles=entries, loc="outside lower center", ncols=4)
    return figure


def places(verdicts):
    """Where the bar of each verdict is, with room for its controls; where all end."""
    ends = list(itertools.accumulate(1.15 + len(v["controls"]) / 2 for v in verdicts))
    return [0, *ends[:-1]], ends[-1]


def effects(ax, verdicts, whole):
    """A bar for each verdict, and a thin grey one below it for each of its controls."""
    ticks, end = places(verdicts)

    def bar(y, height, share, spread, color):
        share = torch.tensor(share).clamp(-0.2, 1.1)  # beyond: models without a sink
        ax.barh(y, share.item(), height, color=color, xerr=spread or None,
                ecolor="black")

    for y, v in zip(ticks, verdicts):
        bar(y, 0.8, v["share"], v["spread"], ACCENT)
        for i, (share, spread) in enumerate(v["controls"]):
            bar(y + 0.65 + i / 2, 0.4, share, spread, "0.7")
        ax.text(1.46, y, v["word"], ha="right", va="center")
    for x, ls in ((0, "-"), (whole, "--"), (whole / 2, ":")):
        ax.axvline(x, color="black", ls=ls, lw=0.9)
    ax.set_yticks(ticks, [tex(f"{v['link']}: {v['says']}") for v in verdicts])
    ax.set(xlim=(-0.22, 1.48), ylim=(end - 0.4, -0.6), xticks=(0, 0.5, 1))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(False, axis="y")


@styled
def matrix(tables) -> Figure:
    """All of `probe.cuts`, means over `tables` (batches or seeds): each edit and its
    controls against the headline of each link. Number: after it. Shade: its change."""
    keys, rows = probe.headline_keys(), list(probe.matrix(tables))
    figure, ax = new(0.21 * len(rows) + 1.2)
    image = torch.ones(len(rows), len(keys), 3)
    for i, (*_, before, after) in enumerate(rows):
        for j, key in enumerate(keys.values()):
            color, letters = (ACCENT, 0.75) if key == SINK else ("black", 0.5)
            change = abs(after[key] - before[key]) / max(abs(before[key]), 0.02)
            depth = 0.85 * min(change, 1.0) if math.isfinite(change) else 0.0
            image[i, j] = 1 - depth * (1 - torch.tensor(to_rgb(color)))
            ax.text(j, i, short(after[key]), ha="center", va="center",
                    color="white" if depth > letters else "black")
    ax.imshow(image.numpy(), aspect="auto", interpolation="nearest")
    without_frame(ax)
    ax.set_xticks(range(len(keys)), [tex(name) for name in keys])
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


def short(v):
    return f"{v:.0e}" if 1e5 < abs(v) < math.inf else probe.digits(v)


# ---------------------------------------------------------------- training

@styled
def birth(rows, links="links", title="How a sink is born, link by link") -> Figure:
    """rows of log.jsonl: the headline of every link over the steps, as share of the way
    from its least to its greatest value. What is null there is left out."""
    figure, ax = new(3.4)
    rows, styles = [row for row in rows if links in row], itertools.cycle(STYLES)
    for link in probe.LINKS:
        key = link.numbers[0].key
        style = dict(color=ACCENT, lw=2.2, zorder=3) if key == SINK else next(styles)
        there = [row for row in rows if row[links].get(key) is not None]
        values = torch.tensor([row[links][key] for row in there])
        if len(there) == 0 or values.max() - values.min() < 1e-6:
            # only rounding: so is the variance of a first token that is always the same
            ax.plot([], label=f"{tex(link.name)} (does not move)", **style)
            continue
        low, high = values.min().item(), values.max().item()
        way = (values - low) / (high - low)
        label = f"{tex(link.name)} ({probe.digits(low)} to {probe.digits(high)})"
        steps = [max(row["step"], 1) for row in there]
        ax.plot(steps, way.tolist(), label=label, **style)
    ax.set(xscale="log", ylim=(-0.03, 1.03))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    beside = dict(loc="center left", bbox_to_anchor=(1, 0.5))
    dress(ax, title, beside | {"title": "link (least to most)"},
          xlabel="step of training (log; step 0 is drawn at 1)",
          ylabel="way from least to most")
    return figure


@styled
def curve(folder, log, optimum=None) -> None:
    """curve.png of a training: its losses, and the sink in each kind of windows."""
    from train import KINDS, read_config  # here, because train.py imports this file
    run, _ = read_config(folder)
    number = probe.metric(SINK)
    figure, (left, right) = new(3.2, 1, 2)
    for key, label, color, ls in (("train_loss", "training", GREY, "--"),
                                  ("val_loss", "validation", "black", "-")):
        track(left, log, lambda row: row[key], label=label, color=color, ls=ls)
    if optimum is not None:
        left.axhline(optimum, color="black", lw=0.9, ls=":", label="perfect predictor")
    title = f"{Path(folder).name}: loss"
    dress(left, title, {}, xlabel="step", ylabel="nats per token")
    kinds = (kind for kind in KINDS if any(kind in row for row in log))
    for style, kind in zip(STYLES, kinds):
        track(right, log, lambda row: row.get(kind, {}).get(SINK), label=KINDS[kind],
              color=ACCENT, ls=style["ls"])
    null = probe.baseline(number, run, run.seq_len)  # a Run has the fields of Config
    right.axhline(null, color="black", lw=0.9, ls=":", label="chance")
    dress(right, SINK, {}, xlabel="step", ylabel=tex(textwrap.fill(number.says, 30)))
    right.set_ylim(0)
    save(Path(folder) / "curve.png", figure)


def track(ax, log, value, **style):
    """A value of each evaluation over the steps; what is null is left out."""
    there = [row for row in log if value(row) is not None]
    ax.plot([row["step"] for row in there], [value(row) for row in there], **style)
