"""The one room for drawing. A figure is for a slide: the claim is its title, the first token (the
sink) has the one accent colour, everything else is black or grey with its own kind of line.

Widths are in inches of 96 CSS pixels and no figure is wider than 8.8, a page of README: there one
point of type is one point. What a file holds is drawn without pyplot, so no backend is chosen for
anybody; chapters use pyplot as everybody does and pass its axes to the small functions below.
"""

import io
import math
import statistics
import sys
import textwrap
from pathlib import Path

import matplotlib
import torch
from cycler import cycler
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

import probe
from data.border import write_atomically
from model import record

ACCENT, GREY, WIDTH = "#e8450c", "0.45", 8.8
STYLES = [dict(zip(("color", "ls", "marker"), s)) for s in (
    ("black", "-", "o"), ("0.45", "--", "s"), ("0.6", "-.", "^"), ("black", ":", "D"),
    ("0.3", "-", "v"), ("0.6", "--", "x"), ("0.45", ":", "P"), ("black", "-.", "*"))]
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 9,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "figure.titlesize": 11,
    "axes.titleweight": "bold", "figure.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "0.92",
    "axes.axisbelow": True, "lines.linewidth": 1.4, "lines.markersize": 4.5,
    "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.dpi": 144,
    "axes.prop_cycle": cycler(color=[s["color"] for s in STYLES], ls=[s["ls"] for s in STYLES]),
}
styled = matplotlib.rc_context(STYLE)


@styled
def new(height, *shape, **how):
    """A figure of page width and its axes, without pyplot: new(3, 1, 2) has two side by side."""
    figure = Figure(figsize=(how.pop("width", WIDTH), height))
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


# ---------------------------------------------------------------- small ones, for chapters too

def dress(ax, title, legend=None, **labels):
    """Title (wrapped to the axes), labels, and a legend for a dict of its settings. A log axis of
    few decades gets plain numbers instead of one crowded power of ten."""
    ax.set(**labels)
    inches = ax.get_position().width * ax.figure.get_figwidth()
    ax.set_title(textwrap.fill(title, max(18, round(inches / 0.078))))
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        if axis.get_scale() == "log" and high / low < 1000:
            axis.set_major_locator(LogLocator(10, subs=(1, 3) if high / low > 30 else (1, 2, 5)))
            axis.set_minor_locator(NullLocator())
        if axis.get_scale() == "log" and high / low < 1e5:
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    if legend is not None:
        ax.legend(**legend)


def lines(ax, curves, x=None, hot=(), **how):
    """curves: name -> (n,). The names in `hot` are the first token's and get the accent."""
    hot_styles, grey_styles = iter(STYLES), iter(STYLES)
    for name, y in curves.items():
        y = torch.as_tensor(y).float()
        style = dict(next(hot_styles if name in hot else grey_styles))
        style |= {"color": ACCENT, "zorder": 3} if name in hot else {}
        ax.plot(range(len(y)) if x is None else x, y.tolist(), label=name, **style | how)


def by_layer(ax, curves, title, hot=(), legend=None, **labels):
    """curves: name -> (L,), or (L, H), of which each layer's largest is drawn."""
    curves = {name: v.amax(1) if v.dim() == 2 else v for name, v in curves.items()}
    lines(ax, curves, hot=hot)
    ax.xaxis.get_major_locator().set_params(integer=True)
    dress(ax, title, legend, **{"xlabel": "layer"} | labels)


def by_position(ax, curves, title, hot=0, legend=None, **labels):
    """curves: name -> (T,), on log axes; the first value of each is the first token's."""
    for style, (name, y) in zip(STYLES, curves.items()):
        y = torch.as_tensor(y).tolist()
        ax.plot(range(1, len(y) + 1), y, label=name, **style | {"marker": ""})
        ax.plot([hot + 1], y[hot:hot + 1], **style | {"color": ACCENT, "ms": 7})
    ax.set(xscale="log", yscale="log")
    dress(ax, title, {} if legend is None else legend, **{"xlabel": "position t + 1 (log)"} | labels)


def bars(ax, groups, title, hot=(), legend=None, **labels):
    """groups: name -> {label: value or (value, spread)}; one bar a name beside each label."""
    places = list(dict.fromkeys(label for group in groups.values() for label in group))
    width, greys = 0.8 / len(groups), iter(("0.35", "0.6", "0.8", "0.9"))
    for i, (name, group) in enumerate(groups.items()):
        values = [v if isinstance(v, tuple) else (v, 0) for v in group.values()]
        at = [places.index(label) + (i - (len(groups) - 1) / 2) * width for label in group]
        ax.bar(at, [v for v, _ in values], width, yerr=spread(s for _, s in values), label=name,
               color=ACCENT if name in hot else next(greys), ecolor="black")
    ax.set_xticks(range(len(places)), places)
    ax.grid(False, axis="x")
    dress(ax, title, legend, **labels)


def spread(values):
    """Error bars, or None where there is no spread at all."""
    values = list(values)
    return values if any(values) else None


def attention(ax, pattern, title, sink=(0,)):
    """pattern (T, T), rows are queries. Keys in `sink` have the accent; the shade goes with the
    square root of attention (see `shades`); what a query cannot see is white."""
    a = torch.as_tensor(pattern).float().cpu()
    image = shade(a, "black")
    for key in sink:
        image[:, key] = shade(a[:, key], ACCENT)
    image[torch.ones_like(a).triu(1) > 0] = 1
    ax.imshow(image.numpy(), interpolation="nearest")
    ax.spines[:].set_visible(False)  # a frame would hide column 0
    ax.grid(False)
    dress(ax, title, xlabel="key", ylabel="query")


def shade(a, color):
    """Attention of any shape -> (..., 3): white to `color`, and never quite white."""
    depth = (0.03 + 0.97 * a.clamp(0, 1).sqrt())[..., None]
    return 1 - depth * (1 - torch.tensor(to_rgb(color)))


def shades(ax):
    """The scale of `attention`, to be drawn into narrow axes: other keys, and the sink."""
    a = torch.linspace(1, 0, 128) ** 2  # evenly spaced in shade
    image = torch.stack([shade(a, "black"), shade(a, ACCENT)], 1)
    ax.imshow(image.numpy(), aspect="auto", extent=(0, 2, 0, 1), interpolation="nearest")
    ticks = (0, 0.05, 0.2, 0.5, 1)
    ax.set_yticks([math.sqrt(t) for t in ticks], [f"{t:g}" for t in ticks])
    ax.set_xticks([0.5, 1.5], ["others", "sink"], rotation=90)
    ax.yaxis.tick_right()
    ax.spines[:].set_visible(False)
    ax.grid(False)
    ax.set_title("attention", fontsize=9, fontweight="normal")


# ---------------------------------------------------------------- the chain in one model

@torch.no_grad()
def portrait(model, x) -> dict:
    """What `chain` draws of one model on windows x (N, T): the numbers of probe.LINKS by layer for
    token 0 and token T / 2, and the mean attention (T, T) of the strongest head after layer 0."""
    (first, ordinary), _ = probe.layers(model, x, ks=(0, x.shape[1] // 2))
    sink = first["sink"]
    skipped = len(sink) - len(probe.later(sink))
    layer, head = divmod(probe.later(sink).nan_to_num().argmax().item(), sink.shape[1])
    layer += skipped
    pattern = record(model, x, [f"{layer}.pattern"])[1][f"{layer}.pattern"][:, head].float()
    rows = pattern / pattern.sum(-1, keepdim=True).clamp_min(1e-12)
    return {"cfg": model.cfg, "T": x.shape[1], "first": first, "ordinary": ordinary,
            "layer": layer, "head": head, "map": rows.mean(0).cpu()}


@styled
def chain(portraits, kind) -> Figure:
    """chain.png: of up to three models (name -> `portrait`) the map of the strongest head, and one
    panel for each link with its headline by layer. `kind` says which windows they saw."""
    shown = dict(list(portraits.items())[:3])
    panels = len(shown) + len(probe.LINKS)
    columns = 4 if panels in (7, 8) else 3
    rows = -(-panels // columns)
    figure, axes = new(2.75 * rows + 0.6, rows, columns, squeeze=False)
    axes = list(axes.flat)
    for name, p in shown.items():
        attention(axes.pop(0), p["map"], f"{name}: layer {p['layer']}, head {p['head']}")
    for link in probe.LINKS:
        headline(axes.pop(0), link, shown)
    for ax in axes:
        ax.axis("off")
    return figure


def headline(ax, link, portraits):
    """The first number of a link by layer. The dot is what the table of probe.py reads."""
    number, values = link.numbers[0], []
    for style, (name, p) in zip(STYLES, portraits.items()):
        for token, color in (("ordinary", GREY), ("first", ACCENT)):
            v = p[token][number.key].float()
            y = v.amax(1) if v.dim() == 2 else v
            values += y[y.isfinite()].tolist()
            ax.plot(y.tolist(), color=color, ls=style["ls"], label=f"{name}, {token}")
        null = probe.chance(number, p["cfg"], p["T"])
    if null is not None:
        ax.axhline(null, color="black", lw=0.9, ls=":", label="chance")
    ax.xaxis.get_major_locator().set_params(integer=True)
    if values and min(values) > 0 and max(values) / min(values) > 30:
        ax.set_yscale("log")
    dress(ax, f"{link.name}: {link.says}", xlabel="layer",
          ylabel=textwrap.fill(number.says, 26))
