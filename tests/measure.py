"""Four measurements of SmolLM2 that are too long for a chapter, each with its JSON and its figure.

    python -m tests.measure all            what is missing in tests/results/smollm2_*.json
    python -m tests.measure mask           one of them; delete its JSON to measure it anew
    python -m tests.measure all --render   measure nothing, draw the figures from the JSON

The docstring of a measurement is its hypothesis with its margins. They were written before the
first run; the JSON says which held (`held`). Windows are 8 x 64 random tokens, whose first token
has no meaning (the paper's control), and English text where it says so. Measured is what probe.py
measures: attention to a token of the heads that have a sink (> 0.3) at token 0 in the untouched
model, layers after 0, and a forged sink's share of two sinks.

Spread is the standard deviation over disjoint batches of windows: one model has no seeds.
"""
import json
import os
import platform
import statistics
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from matplotlib.ticker import PercentFormatter
from tqdm.auto import tqdm

import probe
from chapters import figures
from chapters.figures import ACCENT
from data import smollm2
from data.common import program
from data.windows import english, random_windows, text_windows
from model import GPT, compose, make_tap, record
from probe import TOP, at_token, later, sink_score
from tests import runner
from tests.unmixed import no_logits

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "smollm2.md"
BATCHES, MANY, N, T = 8, 16, 8, 64
TOKENS = (5, 10, 20, 40)  # where a sink is forged; the paper has 10
FACTORS = (2, 4, 8, 16, 32)


# ---------------------------------------------------------------- one pass, and its numbers

def look(model, x, y, tap, ks):
    """One pass over windows x (N, T): for each token of ks its sink (L, H) and norm ratio (L,);
    and the loss, None where the targets y are None."""
    wanted = [probe.metric("sink"), probe.metric("norm_ratio")]
    if y is None:
        tap = compose(tap, no_logits)
    found, loss = probe.layers(model, x, tap, ks, y, wanted)
    return dict(zip(ks, found)) | {"loss": loss}


def effect(kind, free, found, k):
    """The effect of a "cut" or "forge" at token k, from `look` at the untouched model and with it:
    its share by probe.RULE; attention to tokens 0 and k; the longest state of token k; for a cut
    the loss and the mean sink of each layer."""
    heads = probe.with_sink(free[0]["sink"])

    def attention(seen):
        return [later(seen[token]["sink"])[heads].mean().item() for token in (0, k)]

    before, after = attention(free), attention(found)
    row = {"kind": kind, "before": [{"resting": a} for a in before],
           "after": [{"resting": a} for a in after]}
    values = {"share": probe.share(row, T), "first": after[0], "resting": after[1],
              "untouched_first": before[0], "untouched": before[1],
              "norm": found[k]["norm_ratio"].max().item(),
              "untouched_norm": free[k]["norm_ratio"].max().item()}
    if kind == "cut":
        values["loss"] = found["loss"]
        for i, sink in enumerate(found[0]["sink"].mean(1).tolist()):
            values[f"sink {i}"] = sink
    return values


def measured(kind, model, windows, plan):
    """Every intervention of the plan, [(label, tap)], at the token k of its label: a row with the
    mean and the standard deviation of its effect over the batches of windows."""
    effects = [[] for _ in plan]
    for x, y in tqdm(windows, "batches", disable=None, leave=False):
        y = y if kind == "cut" else None
        free = look(model, x, y, None, (0, *TOKENS))
        for (label, tap), seen in zip(plan, effects):
            found = look(model, x, y, tap, (0, label["k"]))
            seen.append(effect(kind, free, found, label["k"]))
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
# (model, batches) -> the JSON. batches.random and batches.text are lists of (x, y).

def maps(model, batches):
    """One head three times, mean over 8 windows of random tokens: the strongest of the untouched
    model; with the TOP neurons of every layer silent, at all tokens; and with token 10 seeing only
    itself. (Silent at token 0 alone, the sink is gone from there, and the next tokens have it.)

    1. Silent everywhere, the head gives no token more than 0.2. 2. Token 10 gets over 0.25.
    """
    x, L = batches.random[0][0], len(model.layers)
    neurons = []
    for i, top in enumerate(probe.targets(model, x)[0].neurons):
        neurons += [[i, n] for n in top.tolist()]
    taps = {"as it is": None, "neurons silent": silent(model, neurons, "all"),
            "silent at token 0": silent(model, neurons, "first"),
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
    held = [max(without[:T // 2]) < 0.2, alone[10] > 0.25]
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
    L, plan = len(model.layers), []
    for k in TOKENS:
        plan.append(({"layers": "all", "k": k}, masked(model, k, range(L))))
    for i in range(L):
        for name, which in (("only", [i]), ("to", range(i + 1)), ("from", range(i, L))):
            label = {"layers": name, "layer": i, "k": 10}
            plan.append((label, masked(model, 10, which)))
    rows = measured("forge", model, batches.random[:BATCHES], plan)
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
            def stronger_z(z, change=change, by=by):
                return change(z, k, None, None, by)

            edit = at_token(k, stronger_z)
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
    every, first = range(len(model.layers)), [0]
    some = [*stronger(model, "0", first, 10), *stronger(model, "0-3", range(4), 10)]
    rows = measured("forge", model, batches.random[:BATCHES], some)
    rows += measured("forge", model, batches.random, stronger(model, "all", every, 10))
    for k in (5, 20, 40):
        rows += measured("forge", model, batches.random[:4], stronger(model, "all", every, k))
    return {"rows": rows, "held": variance_held(rows)}


def variance_held(rows):
    """Which hypotheses of `variance` hold."""
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
    return held | {"4": max(alone) < 0.125}


def lambda_table(found) -> str:
    """The whole curve at token 10, all layers: mean and standard deviation over batches."""
    rows = []
    for kind, says in (("amplify", "amplified: μ + λ (z - μ)"), ("scale", "scaled: λ z"),
                       ("shift", "shifted to the same length")):
        cells = [f"{row['mean']['share']:.0%} ± {row['std']['share']:.0%}"
                 for row in pick(found["rows"], layers="all", k=10, kind=kind)]
        rows.append([says, *cells])
    return runner.markdown(("share of two sinks", *(f"λ = {by}" for by in FACTORS)), rows)


def neurons(model, batches):
    """Which neurons their weights single out and which their writing, and what is left without
    them. In the first four batches.

    writers    add, each alone, at least a tenth of what their MLP adds to dimension c (see `waves`)
               at token 0, where an MLP doubles what stands there and adds ten times as much as at
               other tokens. "wave two" are those of the layer that adds most, "wave one" the rest
    erasers    take, each alone, at least a tenth of what stands there: before that layer ("early")
               or after it ("late")
    weights    as many as the writers, the first by weight score over the median of their layer
    like       for each writer the neuron of its layer with the nearest weight score: the control

    A neuron is set to zero or to its mean over the other tokens, at token 0 or at all tokens.

    1. The writers together, zero at token 0, take at least half of the sink, and the longest state
       over the median falls below 10. The mean does the same, within 10 points.
    2. Neurons of like weight take less than half as much.
    3. Wave two takes at least half; wave one does not, and no single neuron does.
    4. Without the writers (zero, token 0) the loss on English rises by at least 0.1 nats, without
       those of like weight by less than 0.02.
    5. Of the five first by weights and the five first by activity, at least one is the same in
       each layer that writes; in the others less than one on average.
    6. Without the early erasers (zero, token 0) the layer that adds most and the one before it keep
       a mean sink above 0.3, which they have not otherwise.
    """
    random, text = batches.random[:4], batches.text[:4]
    score = torch.stack([probe.weight_score(block) for block in model.layers])  # (L, F)
    value, writes, activity, usual = waves(model, torch.cat([x for x, _ in random]))
    sets, main = choose(value, writes, score)
    overlap = []
    for by_weight, by_activity in zip(score.topk(TOP).indices, activity.topk(TOP).indices):
        overlap.append(len(set(by_weight.tolist()) & set(by_activity.tolist())))
    plan = [({"set": "untouched", "k": 0}, None)]

    def add(name, ids, tokens, value="zero", to=None):
        label = {"set": name, "neurons": ids, "tokens": tokens, "value": value, "k": 0}
        plan.append((label, silent(model, ids, tokens, to)))

    single = [("one", [writer]) for writer in sets["writers"]]
    for name, ids in [*sets.items(), *single]:
        add(name, ids, "first")
        add(name, ids, "all")
    in_text = measured("cut", model, text, plan)
    add("writers", sets["writers"], "first", "mean", usual)
    rows = measured("cut", model, random, plan)
    writing = {layer for layer, _ in sets["writers"]}
    return {"overlap": overlap, "random": rows, "text": in_text,
            "held": neurons_held(rows, in_text, overlap, writing, main)}


def neurons_held(rows, in_text, overlap, writing, main):
    """Which hypotheses of `neurons` hold. `writing`: the layers that write; `main`: the one that
    adds most."""
    def at_token_0(rows, key):
        cut = pick(rows, tokens="first", value="zero")
        return {row["set"]: row["mean"][key] for row in cut}

    taken, norm = at_token_0(rows, "share"), at_token_0(rows, "norm")
    loss, usual = at_token_0(in_text, "loss"), in_text[0]["mean"]["loss"]
    by_mean, single = rows[-1]["mean"]["share"], means(pick(rows, set="one"))
    elsewhere = [n for i, n in enumerate(overlap) if i not in writing]
    layers = (f"sink {main - 1}", f"sink {main}")
    kept = [at_token_0(rows, key)["erasers, early"] for key in layers]
    before = [rows[0]["mean"][key] for key in layers]
    return {"1": (taken["writers"] >= 0.5 and norm["writers"] < 10
                  and abs(taken["writers"] - by_mean) < 0.1),
            "2": taken["like"] < taken["writers"] / 2,
            "3": taken["wave two"] >= 0.5 > taken["wave one"] and max(single) < 0.5,
            "4": loss["writers"] - usual >= 0.1 and abs(loss["like"] - usual) < 0.02,
            "5": min(overlap[i] for i in writing) >= 1 and statistics.fmean(elsewhere) < 1,
            "6": min(kept) > probe.SINK > max(before)}


@torch.no_grad()
def waves(model, x):
    """By layer: dimension c of token 0 (L,), the part that each neuron adds to it at every token
    (L, T, F), its energy at token 0 and its answer to others (L, F); means over windows. c is the
    dimension in which token 0 is largest anywhere; adding is away from zero."""
    L = len(model.layers)
    writes, active, usual = [], [], []
    names = [f"{i}.{name}" for i in range(L) for name in ("resid_pre", "mlp_post")]
    kept = record(model, x, names)[1]
    first = torch.stack([kept[f"{i}.resid_pre"][:, 0].mean(0) for i in range(L)])
    longest, c = divmod(first.abs().argmax().item(), first.shape[1])
    sign = first[longest, c].sign()
    for i, block in enumerate(model.layers):
        post, down = kept[f"{i}.mlp_post"], block.mlp.down_proj.weight
        writes.append(sign * post.mean(0) * down[c])
        active.append(probe.energy(post[:, 0], down).mean(0))
        usual.append(post[:, 1:].mean((0, 1)))
    return sign * first[:, c], *map(torch.stack, (writes, active, usual))


def choose(value, writes, score):
    """The sets of `neurons`, {name: [[layer, neuron], ...]}, and the layer that adds most, from
    `waves` and the weight scores (L, F)."""
    at_0, elsewhere = writes[:, 0], writes[:, 1:]
    adds = at_0.sum(-1)  # (L,)
    rest = elsewhere.sum(-1).mean(1)
    main = adds.argmax().item()
    writing = (adds > value.abs()) & (adds > 10 * rest.abs())
    big = writing[:, None] & (at_0 >= adds[:, None] / 10)
    there = value > value.max() / 1000
    takes = there[:, None] & (at_0 <= -value[:, None] / 10)
    writers = big.nonzero().tolist()
    erasers = takes.nonzero().tolist()
    relative = score / score.median(1, keepdim=True).values
    heavy = relative.flatten().topk(len(writers)).indices.tolist()
    like = []
    for i in writing.nonzero()[:, 0].tolist():
        mine = big[i].nonzero()[:, 0]
        like += [[i, n] for n in probe.similar(score[i], mine).tolist()]
    return {"writers": writers,
            "wave one": [w for w in writers if w[0] != main],
            "wave two": [w for w in writers if w[0] == main],
            "weights": [list(divmod(n, score.shape[1])) for n in heavy], "like": like,
            "erasers, early": [e for e in erasers if e[0] < main],
            "erasers, late": [e for e in erasers if e[0] > main]}, main


def silent(model, ids, tokens, to=None):
    """A tap: the neurons `ids`, [[layer, neuron], ...], answer zero, or their value in `to` (L, F),
    at token "first" or at "all"."""
    edits = {}
    for layer in {layer for layer, _ in ids}:
        mine = [n for i, n in ids if i == layer]

        def edit(post, mine=mine, values=0 if to is None else to[layer, mine]):
            post = post.clone()
            changed = post[:, :1] if tokens == "first" else post
            changed[..., mine] = values
            return post

        edits[f"{layer}.mlp_post"] = edit
    return make_tap(model.cfg, edits)


# ---------------------------------------------------------------- the figures
# (the JSON) -> Figure. The accent is token 0, or the sink that was forged.

DOTTED = {"color": "black", "ls": ":", "lw": 0.9}  # chance, or a threshold


def spreads(labels, rows, key="share"):
    """A group of figures.bars: {label: (mean, std)}."""
    return dict(zip(labels, zip(means(rows, key), stds(rows, key))))


def curve(ax, x, rows, key="share", **style):
    ax.errorbar(x, means(rows, key), stds(rows, key), elinewidth=0.8, **style)


def in_percent(ax, threshold):
    ax.axhline(threshold, label="from here on it holds", **DOTTED)
    ax.yaxis.set_major_formatter(PercentFormatter(1))


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


@figures.styled
def draw_neurons(found):
    figure, (sink, loss, by_layer) = figures.new(7.6, 3, 1)
    at_0 = pick(found["random"], tokens="first", value="zero")
    in_text, everywhere = (pick(found["text"], tokens=tokens, value="zero")
                           for tokens in ("first", "all"))
    labels = [set_name(row) for row in at_0]
    shares = {"random tokens": spreads(labels, at_0), "English": spreads(labels, in_text)}
    figures.bars(sink, shares, "Five neurons write the sink; no single one carries it",
                 ["random tokens"], {}, ylabel="share of the sink taken")
    sink.tick_params(labelbottom=False)
    in_percent(sink, 0.5)
    losses = {"silent at token 0": spreads(labels, in_text, "loss"),
              "silent at all tokens": spreads(labels, everywhere, "loss")}
    figures.bars(loss, losses, "What text loses without them (dotted: untouched)", (), {},
                 ylabel="loss on English, nats")
    loss.axhline(found["text"][0]["mean"]["loss"], **DOTTED)
    draw_sinks(by_layer, [found["random"][0], *at_0])
    return figure


def set_name(row):
    """The name of a set of neurons, in narrow lines."""
    layer, neuron = row["neurons"][0]
    says = f"{row['set']} ({len(row['neurons'])})"
    if row["set"] == "one":
        says = f"{neuron} of layer {layer}"
    return textwrap.fill(says, 7, break_long_words=False)


def draw_sinks(ax, rows):
    """Attention to token 0 by layer, without some of the sets."""
    styles = {"untouched": (ACCENT, "-"), "writers": ("black", "-"), "wave one": ("0.45", "--"),
              "wave two": ("0.45", ":"), "erasers, early": ("0.3", "-.")}
    for name, (color, ls) in styles.items():
        row = pick(rows, set=name)[0]
        keys = [key for key in row["mean"] if key.startswith("sink ")]
        mean, std = ([row[of][key] for key in keys] for of in ("mean", "std"))
        label = name if name == "untouched" else f"without {name}"
        ax.errorbar(range(len(keys)), mean, std, elinewidth=0.8, color=color, ls=ls, label=label)
    ax.axhline(probe.uniform_sink(T), **DOTTED)
    figures.dress(ax, "Wave one carries the sinks of layers 2 to 10, wave two most of those from "
                  "12 on", {"loc": "upper center", "ncols": 5, "columnspacing": 1},
                  xlabel="layer", ylabel="attention to token 0", ylim=(0, 1))


# ---------------------------------------------------------------- command line

MEASUREMENTS = {"maps": (maps, draw_maps), "mask": (mask, draw_mask),
                "variance": (variance, draw_variance), "neurons": (neurons, draw_neurons)}


def smollm2_and_windows():
    """The model, and disjoint batches of each kind of windows."""
    folder = smollm2.fetch()
    model = GPT.from_llama(folder).eval().requires_grad_(False)
    ids = smollm2.encoding(folder).encode_ordinary(english())
    random = [random_windows(N, T, model.cfg.vocab_size, seed=b) for b in range(MANY)]
    return model, SimpleNamespace(random=random, text=text_windows(ids, BATCHES, N, T))


def path(name, kind="json"):
    return RESULTS / f"smollm2_{name}.{kind}"


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
