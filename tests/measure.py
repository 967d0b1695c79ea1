"""Three measurements of SmolLM2 that are too long for a chapter, each with its JSON and its figure.

    python -m tests.measure all            what is missing in tests/results/smollm2_*.json
    python -m tests.measure mask           one of them; delete its JSON to measure it anew
    python -m tests.measure all --render   measure nothing, draw the figures from the JSON

The docstring of a measurement is its hypothesis with its margins. They were written before the
first run; the JSON says which held (`held`). Windows are 8 x 64 random tokens, whose first token
has no meaning (the paper's control). Measured is what probe.py measures: attention to a token of
the heads that have a sink (> 0.3) at token 0 in the untouched model, layers after 0, and a forged
sink's share of two sinks.

Spread is the standard deviation over disjoint batches of windows: one model has no seeds.
"""
import json
import os
import platform
import sys
import time
from functools import partial

import torch
from tqdm.auto import tqdm

import probe
from chapters import figures
from chapters.figures import ACCENT, DOTTED
from data import smollm2
from data.common import program
from data.windows import random_windows
from model import GPT, compose, make_tap, record
from probe import at_token, later, sink_score
from tests import runner
from tests.unmixed import no_logits

PAGE = runner.RESULTS / "smollm2.md"
BATCHES, MANY, N, T = 8, 16, 8, 64
TOKENS = (5, 10, 20, 40)  # where a sink is forged; the paper has 10
FACTORS = (2, 4, 8, 16, 32)


# ---------------------------------------------------------------- one pass, and its numbers

def look(model, x, tap, ks):
    """One pass over windows x (N, T): for each token of ks its sink (L, H) and norm ratio (L,)."""
    wanted = [probe.metric("sink"), probe.metric("norm_ratio")]
    found, _ = probe.layers(model, x, compose(tap, no_logits), ks, wanted=wanted)
    return dict(zip(ks, found))


def effect(free, found, k):
    """The effect of a forgery at token k, from `look` at the untouched model and with it: its share
    by probe.RULE; attention to tokens 0 and k; the longest state of token k."""
    heads = probe.with_sink(free[0]["sink"])

    def attention(seen):
        return [later(seen[token]["sink"])[heads].mean().item() for token in (0, k)]

    before, after = attention(free), attention(found)
    row = {"kind": "forge", "before": [{"resting": a} for a in before],
           "after": [{"resting": a} for a in after]}
    return {"share": probe.share(row, T), "first": after[0], "resting": after[1],
            "untouched_first": before[0], "untouched": before[1],
            "norm": found[k]["norm_ratio"].max().item(),
            "untouched_norm": free[k]["norm_ratio"].max().item()}


def measured(model, windows, plan):
    """Every forgery of the plan, [(label, tap)], at the token k of its label: a row with the mean
    and the standard deviation of its effect over the batches of windows."""
    effects = [[] for _ in plan]
    for x, _ in tqdm(windows, "batches", disable=None, leave=False):
        free = look(model, x, None, (0, *TOKENS))
        for (label, tap), seen in zip(plan, effects):
            seen.append(effect(free, look(model, x, tap, (0, label["k"])), label["k"]))
    rows = []
    for (label, _), seen in zip(plan, effects):
        mean, std = probe.average(seen)
        rows.append(label | {"batches": len(seen), "mean": mean, "std": std})
    return rows


def pick(rows, **label):
    """The rows of `measured` that have these labels."""
    return [row for row in rows if label.items() <= row.items()]


def means(rows, key="share"):
    return [row["mean"][key] for row in rows]


def stds(rows, key="share"):
    return [row["std"][key] for row in rows]


# ---------------------------------------------------------------- the measurements
# (model, batches) -> the JSON; batches of random windows (x, y).

def maps(model, batches):
    """One head three times, mean over 8 windows of random tokens: the strongest of the untouched
    model; with the TOP neurons of every layer silent, at all tokens; and with token 10 seeing only
    itself. (Silent at token 0 alone, the sink is gone from there, and the next tokens have it.)

    1. Silent everywhere, the head gives no token more than 0.2. 2. Token 10 gets over 0.25.
    """
    x, L = batches[0][0], len(model.layers)
    targets, edit = probe.targets(model, x), next(probe.planned("cut neurons"))[2]
    top = {i: few.tolist() for i, few in enumerate(targets[0].neurons)}
    taps = {"as it is": None, "neurons silent": probe.silent(model, top),
            "silent at token 0": probe.intervene(model, edit, *targets, 0, T),
            "token 10 alone": masked(model, 10, range(L))}
    found = {"maps": {}, "attention": {}}
    for name, tap in taps.items():
        patterns = record(model, x, [f"{i}.pattern" for i in range(L)], tap)[1]
        if tap is None:
            sinks = [sink_score(p, 0).mean(0) for p in patterns.values()]
            layer, head = probe.strongest(torch.stack(sinks))
        pattern = patterns[f"{layer}.pattern"][:, head]
        found["maps"][name] = pattern.mean(0).tolist()
        scores = [sink_score(pattern[:, None], t).mean().item() for t in range(T - 1)]
        found["attention"][name] = scores
    without, alone = (found["attention"][name] for name in ("neurons silent", "token 10 alone"))
    held = [max(without) < 0.2, alone[10] > 0.25]
    return found | {"layer": layer, "head": head, "held": held}


def masked(model, k, which):
    """A tap: in these layers token k sees only itself."""
    edit = at_token(k, lambda scores: probe.see_only_itself(scores, k, None, None), axis=2)
    return make_tap(model.cfg, {f"{i}.scores": edit for i in which})


def mask(model, batches):
    """Token k sees only itself, as the first token does (claim 8).

    1. In all layers, at k = 5, 10, 20 and 40: its share of the two sinks is at least 25 %, and its
       longest state, over the median, at least 10 times that of the untouched model.
    2. One layer is not enough: no single layer gives 12.5 % at k = 10.
    3. What is masked after the layer that writes the large state changes nothing more: masks from
       layer 12 on give less than 12.5 %, masks from 0 to 11 at least 25 %.
    """
    L = len(model.layers)
    plan = [({"layers": "all", "k": k}, masked(model, k, range(L))) for k in TOKENS]
    for i in range(L):
        for name, which in (("only", [i]), ("to", range(i + 1)), ("from", range(i, L))):
            label = {"layers": name, "layer": i, "k": 10}
            plan.append((label, masked(model, 10, which)))
    rows = measured(model, batches[:BATCHES], plan)
    only, to, after = (means(pick(rows, layers=name)) for name in ("only", "to", "from"))
    whole = [row["mean"] for row in pick(rows, layers="all")]
    held = {"1 share": all(row["share"] >= 0.25 for row in whole),
            "1 norm": all(row["norm"] >= 10 * row["untouched_norm"] for row in whole),
            "2": max(only) < 0.125,
            "3": after[12] < 0.125 and to[11] >= 0.25}
    return {"rows": rows, "held": held}


KINDS = {"amplify": probe.amplify, "scale": probe.scale, "shift": probe.shift}


def stronger(model, name, which, k):
    """The plan of `variance` for token k in the layers `which`."""
    found = []
    for kind, change in KINDS.items():
        for by in FACTORS:
            edit = at_token(k, partial(change, p=k, found=None, layer=None, factor=by))
            label = {"layers": name, "k": k, "kind": kind, "factor": by}
            found.append((label, make_tap(model.cfg, {f"{i}.z": edit for i in which})))
    return found


def variance(model, batches):
    """`z_k <- mu + lambda (z_k - mu)` for each head, mu the mean over the windows of a batch,
    against `lambda z_k` (the paper's control) and a constant shift to the same length (claim 9).

    1. In all layers, at every k: the share of the two sinks grows with lambda (no step loses more
       than 2 points), and is at least 25 % at lambda 32.
    2. There, scaling and shift have less than half of it, at every k.
    3. The norm follows: at lambda 32 the longest state of token k, over the median, is at least 10
       times the untouched one.
    4. Layer 0 alone is not enough: less than 12.5 % at k = 10, at every lambda.

    k = 10 in 8 batches, in all layers in 16; the other tokens in the first 4, all layers only.
    """
    every = range(len(model.layers))
    some = [*stronger(model, "0", [0], 10), *stronger(model, "0-3", range(4), 10)]
    rows = measured(model, batches[:BATCHES], some)
    rows += measured(model, batches, stronger(model, "all", every, 10))
    for k in (5, 20, 40):
        rows += measured(model, batches[:4], stronger(model, "all", every, k))
    held = {"1": True, "2": True, "3": True}
    for k in TOKENS:
        amplified, scaled, shifted = (means(pick(rows, layers="all", k=k, kind=kind))
                                      for kind in KINDS)
        most = amplified[-1]
        steps = [after - before for before, after in zip(amplified, amplified[1:])]
        held["1"] &= min(steps) > -0.02 and most >= 0.25
        held["2"] &= 2 * max(scaled[-1], shifted[-1]) < most
        last = pick(rows, layers="all", k=k, kind="amplify", factor=32)[0]["mean"]
        held["3"] &= last["norm"] >= 10 * last["untouched_norm"]
    alone = means(pick(rows, layers="0", kind="amplify"))
    return {"rows": rows, "held": held | {"4": max(alone) < 0.125}}


def lambda_table(found) -> str:
    """The whole curve at token 10, all layers: mean and standard deviation over batches."""
    rows = []
    for kind, says in (("amplify", "amplified: μ + λ (z - μ)"), ("scale", "scaled: λ z"),
                       ("shift", "shifted to the same length")):
        cells = [f"{row['mean']['share']:.0%} ± {row['std']['share']:.0%}"
                 for row in pick(found["rows"], layers="all", k=10, kind=kind)]
        rows.append([says, *cells])
    return runner.markdown(("share of two sinks", *(f"λ = {by}" for by in FACTORS)), rows)


# ---------------------------------------------------------------- the figures
# (the JSON) -> Figure. The accent is token 0, or the sink that was forged.

def spreads(labels, rows, key="share"):
    """A group of figures.bars: {label: (mean, std)}."""
    return dict(zip(labels, zip(means(rows, key), stds(rows, key))))


def curve(ax, x, rows, key="share", **style):
    ax.errorbar(x, means(rows, key), stds(rows, key), elinewidth=0.8, **style)


def in_percent(ax, threshold):
    ax.axhline(threshold, label="from here on it holds", **DOTTED)
    ax.yaxis.set_major_formatter(figures.PERCENT)


def draw_maps(found):
    titles = {"as it is": "as it is", "neurons silent": "5 neurons a layer silent",
              "token 10 alone": "token 10 sees only itself"}
    patterns = {says: found["maps"][name] for name, says in titles.items()}
    return figures.maps(patterns, [(0,), (0,), (0, 10)])


@figures.styled
def draw_mask(found):
    figure, (left, right) = figures.new(3.6, 1, 2, width_ratios=[3, 4])
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
    whole = pick(found["rows"], layers="all")
    labels = [f"k = {row['k']}" for row in whole]
    groups = {"token 0, untouched": spreads(labels, whole, "untouched_first"),
              "token 0, k masked": spreads(labels, whole, "first"),
              "token k, untouched": spreads(labels, whole, "untouched"),
              "token k, sees only itself": spreads(labels, whole, "resting")}
    figures.bars(left, groups, "A token that sees only itself becomes a second sink",
                 ["token k, sees only itself"], below, ylabel="attention of the heads with a sink")
    styles = {"only": ("only layer l", "0.45", "--"), "to": ("layers 0 to l", ACCENT, "-"),
              "from": ("layers l to the last", "black", "-.")}
    for name, (label, color, ls) in styles.items():
        rows = pick(found["rows"], layers=name)
        curve(right, range(len(rows)), rows, color=color, ls=ls, label=label)
    in_percent(right, 0.25)
    figures.dress(right, "Masked up to layer 2 it has half of that sink, up to 10 all; one layer "
                  "is not enough", below, xlabel="l", ylabel="share of the two sinks, k = 10")
    return figure


@figures.styled
def draw_variance(found):
    figure, axes = figures.new(5.4, 2, 4, sharex=True, sharey="row")
    styles = {"amplify": {"color": ACCENT, "ls": "-"}, "scale": {"color": "0.3", "ls": "--"},
              "shift": {"color": "0.55", "ls": "-."}}
    columns = {"layer 0": ("0", [10]), "layers 0 to 3": ("0-3", [10]), "all layers": ("all", [10]),
               "all, k = 5, 20, 40": ("all", [5, 20, 40])}
    for (title, (which, tokens)), (top, bottom) in zip(columns.items(), axes.T):
        for kind, style in styles.items():
            for k in tokens:
                rows = pick(found["rows"], layers=which, k=k, kind=kind)
                curve(top, FACTORS, rows, "share", **style)
                curve(bottom, FACTORS, rows, "norm", **style)
        in_percent(top, 0.25)
        top.set_title(title)
        bottom.set_xscale("log", base=2)
        bottom.set_xticks(FACTORS, FACTORS)
        bottom.set_xlabel("λ")
    bottom.set(yscale="log", ylim=(0.8, None))
    axes[0, 0].set_ylabel("share of the two sinks")
    axes[1, 0].set_ylabel("longest state over the median")
    figure.suptitle("Amplified variance forges a sink, most at λ = 8; scaling and shift stay "
                    "behind")
    legend = {"μ + λ (z − μ)": styles["amplify"], "λ z, the paper's control": styles["scale"],
              "shifted to the same length": styles["shift"], "from here on it holds": DOTTED}
    figures.below(figure, legend, ncols=4)
    return figure


# ---------------------------------------------------------------- command line

MEASUREMENTS = {"maps": (maps, draw_maps), "mask": (mask, draw_mask),
                "variance": (variance, draw_variance)}


def smollm2_and_windows():
    """The model, and disjoint batches of random windows."""
    model = GPT.from_llama(smollm2.fetch()).eval().requires_grad_(False)
    return model, [random_windows(N, T, model.cfg.vocab_size, seed=b) for b in range(MANY)]


def path(name, kind="json"):
    return runner.RESULTS / f"smollm2_{name}.{kind}"


def result(name) -> dict:
    """The JSON of a measurement. Four digits are enough."""
    measure, _ = MEASUREMENTS[name]
    begin = time.process_time()
    found = measure(*smollm2_and_windows())
    found |= {"model": smollm2.PACKAGE, "file": smollm2.GGUF, "windows": N, "tokens": T,
              "versions": {"torch": torch.__version__, "python": platform.python_version()},
              "hardware": f"1 thread of a {os.cpu_count()}-core CPU, float32",
              "hypothesis": measure.__doc__,
              "cpu_seconds": round(time.process_time() - begin)}
    return json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}"))


def render(name, found) -> None:
    figures.save(path(name, "png"), MEASUREMENTS[name][1](found))
    if name == "variance":
        runner.fill_page(PAGE, {"lambda": lambda_table(found)})


def main(words=None):
    parser = runner.parser("measure", __doc__)
    parser.add_argument("which", nargs="+", choices=[*MEASUREMENTS, "all"])
    args = parser.parse_args(words)
    for name in MEASUREMENTS:
        if name in args.which or "all" in args.which:
            runner.run(path(name), {(): (result, name)}, partial(render, name), args)
    return 0


if __name__ == "__main__":
    sys.exit(program("measure", main))
