"""Six measurements of the whole chain in SmolLM2, each with its JSON and its figure.

    python -m tests.measure all                  what is missing in tests/results/smollm2_*.json
    python -m tests.measure mask --again         measure once more: minutes on one core
    python -m tests.measure all --render         draw the figures from the JSON

The docstring of a measurement is its hypothesis with its margins. They were written before the
first run; the JSON says which held (`held`). Windows are 8 x 64 random tokens, whose first token
has no meaning (the paper's control), and English text where it says so. What is counted is what
RULE of probe.py counts: attention to a token of the heads that have a sink (> 0.3) at token 0 in
the untouched model, layers after 0 ("resting"), and a forged sink's share of two sinks.

Spread is the standard deviation over disjoint batches of windows: one model has no seeds.
"""
import io
import math
import os
import platform
import statistics
import sys
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from matplotlib.ticker import PercentFormatter
from PIL import Image

from chapters import figures
from chapters.figures import ACCENT, GREY
from data import smollm2
from data.border import (Parser, UserError, bar, program, read_json, say, write_atomically,
                         write_json)
from data.windows import english, llama_encoder, random_windows, text_windows
from model import GPT, make_tap, record
from probe import (SINK, TOP, Number, amplify, at_token, average, dominance, energy, kendall_tau,
                   known, later, layers, numbers, over_median, scale, see_only_itself, share, shift,
                   similar, sink_score, uniform_sink, weight_score, with_sink, wo_alignment)


RESULTS = Path(__file__).parent / "results"
SUBJECT = "smollm2"  # whose results; with RESULTS, what --llama changes
BATCHES, N, T = 8, 8, 64
TOKENS = (5, 10, 20, 40)  # where a sink is forged; the paper has 10
FACTORS = (2, 4, 8, 16, 32)


# ---------------------------------------------------------------- one pass, and what is kept

def run(model, x, ks, tap=None, y=None):
    """One forward pass on windows x (N, T) -> {k: {sink (L, H), norm_ratio (L,), dominance (L,)}}
    for the tokens ks, and the loss."""
    wanted = [n for n in numbers() if n.key in ("sink", "norm_ratio", "dominance")]
    found, loss = layers(model, x, tap, ks, y, wanted)
    return dict(zip(ks, found)) | {"loss": loss}


def shared(kind, free, found, k=0):
    """Two passes of `run` -> (the share that RULE of probe.py gives a "cut" or "forge"; attention
    to tokens 0 and k of the heads with a sink, before and after)."""
    heads = with_sink(free[0]["sink"])
    before, after = ([{"resting": later(p[i]["sink"])[heads].mean().item()} for i in (0, k)]
                     for p in (free, found))
    return share({"kind": kind, "before": before, "after": after}, T), before, after


def forged(free, found, k):
    """One intervention at token k against the untouched pass, in floats."""
    value, before, after = shared("forge", free, found, k)
    return {"share": value, "resting": after[1]["resting"], "first": after[0]["resting"],
            "strongest": later(found[k]["sink"]).max().item(),
            "norm": found[k]["norm_ratio"].max().item(), "untouched": before[1]["resting"],
            "untouched_norm": free[k]["norm_ratio"].max().item(),
            "untouched_first": before[0]["resting"]}


def spread(tables):
    """Rows of each batch [(label, {key: float})] -> rows with mean and standard deviation over
    batches, and the share of each batch."""
    rows = []
    for same in zip(*tables):
        each = [values for _, values in same]
        mean, std = average(each)
        row = same[0][0] | {"batches": len(same), "mean": mean, "std": std}
        rows.append(row | ({"each": [v["share"] for v in each]} if "share" in mean else {}))
    return rows


def pick(rows, **label):
    """The rows of `spread` that have these labels."""
    return [row for row in rows if all(row.get(key) == v for key, v in label.items())]


def column(rows, key):
    """One number of the rows of `spread` -> {mean, std} as lists."""
    return {of: [row[of][key] for row in rows] for of in ("mean", "std")}


def over_batches(tensors):
    """Tensors of the same shape, one a batch -> {mean, std} as lists."""
    x = torch.stack([t.float() for t in tensors])
    std = x.std(0) if len(x) > 1 else torch.zeros_like(x[0])
    return {"mean": x.mean(0).tolist(), "std": std.tolist()}


# ---------------------------------------------------------------- the measurements
# (model, batches) -> what goes into the JSON. batches.random and batches.text are lists of (x, y).

def mask(model, batches):
    """Token k sees only itself, as the first token does (claim 8).

    1. In all layers, at k = 5, 10, 20 and 40: its share of the two sinks is at least 25 %, and its
       longest state, over the median, at least 10 times that of the untouched model.
    2. One layer is not enough: no single layer gives 12.5 % at k = 10.
    3. What is masked after the layer that writes the large state changes nothing more: masks from
       layer 12 on give less than 12.5 %, masks from 0 to 11 at least 25 %.
    """
    L, every = len(model.layers), []
    for b, (x, _) in enumerate(batches.random):
        free, rows = run(model, x, (0, *TOKENS)), []

        def masked(k, which):
            edit = at_token(k, lambda s: see_only_itself(s, k, None, None), axis=2)
            tap = make_tap(model.cfg, {f"{i}.scores": edit for i in which})
            return forged(free, run(model, x, (0, k), tap), k)

        for k in TOKENS:
            rows.append(({"layers": "all", "k": k}, masked(k, range(L))))
        for i in bar(range(L), f"mask {b + 1}/{len(batches.random)}"):
            for name, which in (("only", [i]), ("to", range(i + 1)), ("from", range(i, L))):
                rows.append(({"layers": name, "layer": i, "k": 10}, masked(10, which)))
        every.append(rows)
    rows = spread(every)
    whole = pick(rows, layers="all")
    means = {name: column(pick(rows, layers=name), "share")["mean"]
             for name in ("only", "to", "from")}
    edge = min(11, L - 2)
    return {"rows": rows, "held": {
        "1 share": all(row["mean"]["share"] >= 0.25 for row in whole),
        "1 norm": all(row["mean"]["norm"] >= 10 * row["mean"]["untouched_norm"] for row in whole),
        "2": max(means["only"]) < 0.125,
        "3": means["from"][edge + 1] < 0.125 and means["to"][edge] >= 0.25}}


def variance(model, batches):
    """`z_k <- mu + lambda (z_k - mu)` for each head, mu the mean over the windows of a batch,
    against `lambda z_k` (the paper's control) and a constant shift to the same length (claim 9).

    1. In all layers, at every k: the share of the two sinks grows with lambda (no step loses more
       than 2 points), and is at least 25 % at lambda 32.
    2. There, scaling and shift have less than half of it, at every k.
    3. The norm follows: at lambda 32 the longest state of token k, over the median, is at least 10
       times the untouched one.
    4. Layer 0 alone is not enough: less than 12.5 % at k = 10, at every lambda.

    k = 10 in 8 batches; the other tokens in the first 4, all layers only.
    """
    L, every, fewer = len(model.layers), [], []
    kinds = {"amplify": amplify, "scale": scale, "shift": shift}
    wide = {"0": range(1), "0-3": range(min(4, L)), "all": range(L)}
    for b, (x, _) in enumerate(batches.random):
        free, plan = run(model, x, (0, *TOKENS)), [(name, 10) for name in wide]
        rows = {10: [], "other": []}
        plan += [("all", k) for k in TOKENS if k != 10] if b < 4 else []
        for name, k in bar(plan, f"variance {b + 1}/{len(batches.random)}"):
            for kind, change in kinds.items():
                for factor in FACTORS:
                    edit = at_token(k, lambda z: change(z, k, None, None, factor))
                    tap = make_tap(model.cfg, {f"{i}.z": edit for i in wide[name]})
                    label = {"layers": name, "k": k, "kind": kind, "factor": factor}
                    found = forged(free, run(model, x, (0, k), tap), k)
                    rows[10 if k == 10 else "other"].append((label, found))
        every.append(rows[10])
        fewer += [rows["other"]] if b < 4 else []
    rows = spread(every) + spread(fewer)
    grows, wins, long = [], [], []
    for k in TOKENS:
        top = {kind: pick(rows, layers="all", k=k, kind=kind) for kind in kinds}
        shares = {kind: column(v, "share")["mean"] for kind, v in top.items()}
        steps = [after - before for before, after in zip(shares["amplify"], shares["amplify"][1:])]
        grows.append(min(steps) > -0.02 and shares["amplify"][-1] >= 0.25)
        wins.append(2 * max(shares["scale"][-1], shares["shift"][-1]) < shares["amplify"][-1])
        last = top["amplify"][-1]["mean"]
        long.append(last["norm"] >= 10 * last["untouched_norm"])
    alone = column(pick(rows, layers="0", k=10, kind="amplify"), "share")["mean"]
    return {"rows": rows, "held": {"1": all(grows), "2": all(wins), "3": all(long),
                                   "4": max(alone) < 0.125}}


def waves(model, batches):
    """Where in the depth the first token's state becomes long, and which neurons do it. c is the
    dimension in which it is largest anywhere.

    1. Its state is over 100 times as long as the median somewhere, its DomRatio above 100, and c is
       the same in every batch, random or text.
    2. Two waves: |x_0c| after the first rise falls to less than half of it, then rises to more than
       twice the first.
    3. In the layer that adds most to it, two neurons add over 80 % of what the MLP adds.
    4. Every layer after the second rise, but the last two, has a mean sink above 0.3; no layer
       before the first rise has one.
    """
    kinds = {}
    for kind in ("random", "text"):
        seen = []
        for x, _ in bar(getattr(batches, kind), f"waves, {kind}"):
            seen.append(depth(model, x))
        kinds[kind] = {"dims": [s["dim"] for s in seen], "largest": [s["largest"] for s in seen]}
        for key in ("norm", "top", "value", "rest", "dominance", "sink", "rate", "attn", "mlp",
                    "mlp_rest"):
            kinds[kind][key] = over_batches([s[key] for s in seen])
        writes = [s["writes"] for s in seen]
        kinds[kind]["writers"] = writers(*(torch.stack(w).mean(0) for w in zip(*writes)))
    found = kinds["random"]
    value = found["value"]["mean"]  # of the state that enters layer i, L + 1 of them
    sink, adds = found["sink"]["mean"], found["mlp"]["mean"]
    main = max(range(len(adds)), key=lambda i: adds[i])
    rise, first, low = first_wave(value, main)
    two = sum(w["first"] for w in found["writers"]["write"][main][:2]) / adds[main]
    dims = {*kinds["random"]["dims"], *kinds["text"]["dims"]}
    return {"kinds": kinds, "rise": rise, "first_top": first, "low": low, "main_layer": main,
            "two_neurons": two, "held": {
                "1": (max(found["norm"]["mean"]) > 100 and max(found["dominance"]["mean"]) > 100
                      and len(dims) == 1),
                "2": value[low] < value[first] / 2 and value[main + 1] > 2 * value[first],
                "3": two > 0.8,
                "4": min(sink[main + 1:-2] or [0]) > SINK and max(sink[:rise] or [0]) < SINK}}


def first_wave(value, main):
    """(where it rises past half of its top, its top, the low after it): indices of states before
    the layer `main`, top and low being the two between which most is lost."""
    top = max(range(main + 1), key=lambda i: value[i] - min(value[i:main + 1]))
    low = min(range(top, main + 1), key=lambda i: value[i])
    rise = next((i for i in range(top) if value[i] >= value[top] / 2), top)
    return rise, top, low


@torch.no_grad()
def depth(model, x):
    """By layer for one batch: what token 0 is, what is added to its largest dimension, by whom."""
    L = len(model.layers)
    names = ("resid_pre", "attn_out", "mlp_out", "mlp_post", "pattern")
    wanted = [f"{i}.{name}" for i in range(L) for name in names] + [f"{L - 1}.resid_post"]
    kept = record(model, x, wanted)[1]
    states = [kept[f"{i}.resid_pre"] for i in range(L)] + [kept[f"{L - 1}.resid_post"]]
    readers = [*(block.input_layernorm for block in model.layers), model.norm]
    first = torch.stack([s[:, 0].mean(0) for s in states])  # (L + 1, C)
    c = first.abs().max(0).values.argmax().item()
    scores = [sink_score(kept[f"{i}.pattern"], 0) for i in range(L)]  # (N, H) each
    turn = first[first[:, c].abs().argmax(), c].sign()  # adding: away from zero at its longest

    def into(name):  # (L, T): what `name` adds to dimension c
        return turn * torch.stack([kept[f"{i}.{name}"][..., c].mean(0) for i in range(L)])

    posts = [kept[f"{i}.mlp_post"] for i in range(L)]
    writes = torch.stack([turn * p.mean(0) * b.mlp.down_proj.weight[c]
                          for p, b in zip(posts, model.layers)])  # (L, T, F)
    return {"dim": c, "largest": first.abs().argmax(-1).tolist(),
            "norm": torch.stack([over_median(s.norm(dim=-1), 0).mean() for s in states]),
            "top": first.abs().amax(-1), "value": turn * first[:, c],
            "rest": torch.stack([s[:, 1:, c].abs().mean() for s in states]),
            "dominance": torch.stack([dominance(r(s[:, 0])).mean()
                                      for r, s in zip(readers, states)]),
            "sink": torch.stack([s.mean() for s in scores]),
            "rate": torch.stack([(s > SINK).float().mean() for s in scores]),
            "attn": into("attn_out")[:, 0], "mlp": into("mlp_out")[:, 0],
            "mlp_rest": into("mlp_out")[:, 1:].mean(-1),
            "writes": (writes[:, 0], writes[:, 1:].mean(1)),
            "energy": torch.stack([energy(p[:, 0], b.mlp.down_proj.weight).mean(0)
                                   for p, b in zip(posts, model.layers)]),
            "means": torch.stack([p[:, 1:].mean((0, 1)) for p in posts])}


def writers(first, rest, most=3):
    """(L, F) twice, what neurons add to the dimension at token 0 and at the others on average ->
    for each layer those that write most and those that erase most."""
    found = {"write": [], "erase": []}
    for at_first, at_rest in zip(first, rest):
        for name, sign in (("write", 1), ("erase", -1)):
            ids = (sign * at_first).topk(most).indices.tolist()
            found[name].append([{"neuron": n, "first": at_first[n].item(),
                                 "rest": at_rest[n].item()} for n in ids])
    return found


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
    few = list(zip(batches.random, batches.text))[:4]
    kinds, every, untouched = ("random", "text"), [], []
    seen = [[depth(model, x) for x, _ in pair] for pair in bar(few, "neurons, who writes")]
    score = torch.stack([weight_score(block) for block in model.layers])  # (L, F)
    activity = torch.stack([pair[0]["energy"] for pair in seen]).mean(0)
    sets, main = choose([pair[0] for pair in seen], score)
    plan = list(plan_silence(sets))
    for b, pair in enumerate(few):
        free = [silenced(model, x, y) for x, y in pair]
        untouched.append(({}, cut_effects(kinds, free, free)))
        rows = []
        for name, ids, tokens, value in bar(plan, f"neurons {b + 1}/{len(few)}"):
            after = []
            for (x, y), found in zip(pair, seen[b]):
                to = found["means"] if value == "mean" else torch.zeros_like(score)
                after.append(silenced(model, x, y, ids, tokens == "first", to))
            label = {"set": name, "neurons": ids, "tokens": tokens, "value": value}
            rows.append((label, cut_effects(kinds, free, after)))
        every.append(rows)
    rows, (before,) = spread(every), spread([[row] for row in untouched])
    screen = [screened(s, a) for s, a in zip(score, activity)]
    everywhere = {name: [{"layer": i, "neuron": n, "over_median": over_median_of(score[i], n),
                          "share": (activity[i, n] / activity[i].sum()).item()} for i, n in ids]
                  for name, ids in sets.items()}

    def mean(name, tokens="first", value="zero"):
        return pick(rows, set=name, tokens=tokens, value=value)[0]["mean"]

    zero, other, like = mean("writers"), mean("writers", value="mean"), mean("like")
    rise = {name: mean(name)["text loss"] - before["mean"]["text loss"]
            for name in ("writers", "like")}
    single = column(pick(rows, set="one"), "random share")["mean"]
    writing = {i for i, _ in sets["writers"]}
    same = [layer["overlap"] for layer in screen]
    elsewhere = [n for i, n in enumerate(same) if i not in writing]
    kept = [mean("erasers, early")[f"sink {i}"] for i in (main - 1, main)]
    usual = [before["mean"][f"sink {i}"] for i in (main - 1, main)]
    return {"sets": everywhere, "screen": screen, "untouched": before, "rows": rows, "held": {
        "1": (zero["random share"] >= 0.5 and zero["random norm"] < 10
              and abs(zero["random share"] - other["random share"]) < 0.1),
        "2": like["random share"] < zero["random share"] / 2,
        "3": (mean("wave two")["random share"] >= 0.5 > mean("wave one")["random share"]
              and max(single) < 0.5),
        "4": rise["writers"] >= 0.1 and abs(rise["like"]) < 0.02,
        "5": min(same[i] for i in writing) >= 1 and statistics.fmean(elsewhere) < 1,
        "6": min(kept) > SINK > max(usual)}}


def choose(seen, score):
    """The sets of `neurons`, {name: [[layer, neuron], ...]}, and the layer that adds most, from
    `depth` of several batches and the weight scores (L, F)."""
    value, adds, rest = (torch.stack([s[key] for s in seen]).mean(0)
                         for key in ("value", "mlp", "mlp_rest"))
    writes = torch.stack([s["writes"][0] for s in seen]).mean(0)  # (L, F)
    main = adds.argmax().item()
    writing = (adds > value[:-1].abs()) & (adds > 10 * rest.abs())
    writing[main] = True  # there is one in every model
    big = writing[:, None] & (writes >= adds[:, None] / 10)
    there = (value[:-1] > value.max() / 1000)[:, None]
    takes = there & (writes <= -value[:-1, None] / 10)
    sets = {"writers": big.nonzero().tolist(), "erasers": takes.nonzero().tolist()}
    relative = score / score.median(1, keepdim=True).values
    heavy = relative.flatten().topk(len(sets["writers"])).indices.tolist()
    like = []
    for i in writing.nonzero()[:, 0].tolist():
        ids = big[i].nonzero()[:, 0]
        like += [[i, n] for n in similar(score[i], ids).tolist()]
    return {"writers": sets["writers"],
            "wave one": [w for w in sets["writers"] if w[0] != main],
            "wave two": [w for w in sets["writers"] if w[0] == main],
            "weights": [list(divmod(n, score.shape[1])) for n in heavy], "like": like,
            "erasers, early": [e for e in sets["erasers"] if e[0] < main],
            "erasers, late": [e for e in sets["erasers"] if e[0] > main]}, main


def plan_silence(sets):
    """(name of the set, [[layer, neuron], ...], tokens, value) of every ablation."""
    for name, ids in sets.items():
        whole = name in ("writers", "weights", "like")
        for tokens in ("first", "all"):
            for value in ("zero", "mean") if whole else ("zero",):
                yield name, ids, tokens, value
    for name, among in (("one", "writers"), ("one by weights", "weights")):
        for one in sets[among]:
            for tokens in ("first", "all") if name == "one" else ("first",):
                yield name, [one], tokens, "zero"


def silenced(model, x, y, ids=(), first=True, to=None):
    """`run` at token 0 with the neurons `ids` set to their values in `to` (L, F)."""
    edits = {}
    for i in {i for i, _ in ids}:
        mine = torch.tensor([n for j, n in ids if j == i])

        def edit(post, i=i, mine=mine):
            post = post.clone()
            (post[:, :1] if first else post)[..., mine] = to[i, mine]
            return post

        edits[f"{i}.mlp_post"] = edit
    return run(model, x, (0,), make_tap(model.cfg, edits), y)


def cut_effects(kinds, free, after):
    """Floats of one ablation on one batch of each kind of windows, for `spread`."""
    found = {}
    for kind, before, now in zip(kinds, free, after):
        value, _, resting = shared("cut", before, now)
        found |= {f"{kind} share": value, f"{kind} resting": resting[0]["resting"],
                  f"{kind} strongest": later(now[0]["sink"]).max().item(),
                  f"{kind} norm": now[0]["norm_ratio"].max().item(),
                  f"{kind} dominance": now[0]["dominance"].max().item(),
                  f"{kind} loss": now["loss"]}
    by_layer = after[0][0]["sink"].mean(1).tolist()
    return found | {f"sink {i}": v for i, v in enumerate(by_layer)}


def over_median_of(score, n):
    return (score[n] / score.median()).item()


def screened(score, activity):
    """One layer, (F,) twice: the first TOP by weight score and by energy at token 0."""
    z = (score - score.mean()) / score.std()
    tops = {"weights": score.topk(TOP).indices.tolist(),
            "activity": activity.topk(TOP).indices.tolist()}
    found = {"overlap": len(set(tops["weights"]) & set(tops["activity"]))}
    for name, ids in tops.items():
        found[name] = [{"neuron": n, "over_median": over_median_of(score, n), "z": z[n].item(),
                        "share": (activity[n] / activity.sum()).item()} for n in ids]
    return found


def wo(model, batches):
    """Kendall tau of W_O by layer, both ways to read claim 3 (0.32 in Llama-2-7B).

    columns       spread of each dimension of z, and the length of the column of W_O that reads it
    columns, z_0  the same, spread over windows of z at token 0 alone
    rows          spread of each dimension of the state that the layer adds to (resid_pre), and the
                  length of the row of W_O that writes into it
    rows, out     spread of each dimension of what is added (attn_out) and that length: a long row
                  makes a large output whatever comes in, so this is no evidence by itself
    rows, shuffled  the same with the directions of the rows dealt out anew, each of its old length

    1. Columns: the mean over layers is between -0.1 and 0.1. 2. Rows: it is above 0.1, and above
    three standard deviations of chance in at least two thirds of the layers.
    """
    L, every = len(model.layers), {}
    for x, _ in bar(batches.random, "wo"):
        names = [f"{i}.{name}" for i in range(L) for name in ("z", "resid_pre", "attn_out")]
        kept, taus = record(model, x, names)[1], []
        for i, block in enumerate(model.layers):
            z, state, out = (kept[f"{i}.{name}"] for name in ("z", "resid_pre", "attn_out"))
            weight = block.self_attn.o_proj.weight.detach()
            rows = weight.norm(dim=1)
            deal = torch.randperm(len(rows), generator=torch.Generator().manual_seed(i))
            dealt = z.flatten(2) @ (F.normalize(weight, dim=1)[deal] * rows[:, None]).T
            taus.append({"columns": wo_alignment(z, weight),
                         "rows, shuffled": kendall_tau(dealt.flatten(0, 1).std(0), rows),
                         "columns, z_0": kendall_tau(z[:, 0].flatten(1).std(0),
                                                     weight.norm(dim=0)),
                         "rows": kendall_tau(state.flatten(0, 1).std(0), rows),
                         "rows, out": kendall_tau(out.flatten(0, 1).std(0), rows)})
        for name in taus[0]:
            every.setdefault(name, []).append(torch.stack([layer[name] for layer in taus]))
    found = {name: over_batches(v) for name, v in every.items()}
    n = model.cfg.hidden_size
    null = math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1)))  # n independent pairs
    average = {name: statistics.fmean(v["mean"]) for name, v in found.items()}
    above = statistics.fmean(float(tau > 3 * null) for tau in found["rows"]["mean"])
    return {"tau": found, "null_std": null, "average": average, "rows_above": above, "held": {
        "1": abs(average["columns"]) < 0.1, "2": average["rows"] > 0.1 and above >= 2 / 3}}


def heads(model, batches):
    """Every head's leading query direction u_1 (before rotation) and the key of token k, k = 0 and
    an ordinary one, T/2 (claim 7).

    1. Of the heads that have a sink at token 0, at least 90 % have q.k_0 > 0 (after rotation) for
       more than 95 % of their queries; of those with cos(u_1, k_0) > 0.5, too.
    2. At the ordinary token the share of positive queries is below 70 % on average.
    3. cos(u_1, k_0) orders heads by their sink: Kendall tau above 0.2 over the heads of layers
       after 0.
    """
    positive = Number("positive", "", lambda a: (a["scores"][:, :, a.k + 1:, a.k] > 0).float()
                      .mean((0, 2)), "sink head")
    wanted = {"cos": "lock_cos", "positive": "positive", "sink": "sink"}
    chosen = [n for n in [*numbers(), positive] if n.key in wanted.values()]
    every = [layers(model, x, ks=(0, T // 2), wanted=chosen)[0]
             for x, _ in bar(batches.random, "heads")]
    found = {}
    for token, same in zip(("first", "ordinary"), zip(*every)):
        found[token] = {name: over_batches([f[key] for f in same]) for name, key in wanted.items()}
    cos, positive, sink = (torch.tensor(found["first"][key]["mean"]) for key in
                           ("cos", "positive", "sink"))
    plain = torch.tensor(found["ordinary"]["positive"]["mean"]).mean().item()
    has, aligned, always = sink > SINK, cos > 0.5, positive > 0.95

    def part(of):  # of no heads at all, none
        return always[of].float().mean().nan_to_num().item()

    tau = kendall_tau(later(cos).flatten(), later(sink).flatten()).item()
    return {"heads": found, "with_sink": has.sum().item(), "sink_positive": part(has),
            "aligned": aligned.sum().item(), "aligned_positive": part(aligned),
            "all_positive": always.float().mean().item(), "ordinary_positive": plain, "tau": tau,
            "held": {"1": part(has) >= 0.9 and part(aligned) >= 0.9, "2": plain < 0.7,
                     "3": tau > 0.2}}


def maps(model, batches):
    """One head three times, mean over 8 windows of random tokens: the strongest of the untouched
    model; with the TOP neurons of every layer silent, at all tokens; and with token 10 seeing only
    itself. (Silent at token 0 alone, the sink is gone from there, and the next tokens have it.)

    1. Silent everywhere, the head gives no token more than 0.2. 2. Token 10 gets over 0.25.
    """
    x = batches.random[0][0]
    story, _ = known(model, x)
    L, k = len(model.layers), 10

    def quiet(i):
        return lambda post: post.index_fill(-1, story.neurons[i], 0)

    edits = {
        "as it is": {},
        "neurons silent": {f"{i}.mlp_post": quiet(i) for i in range(L)},
        "silent at token 0": {f"{i}.mlp_post": at_token(0, lambda p, i=i: quiet(i)(p[:, 0]))
                              for i in range(L)},
        "token 10 alone": {f"{i}.scores": at_token(k, lambda s: see_only_itself(s, k, None, 0), 2)
                           for i in range(L)}}
    where, found = None, {"maps": {}, "attention": {}}
    for name, changes in edits.items():
        patterns = [f"{i}.pattern" for i in range(L)]
        kept = record(model, x, patterns, tap=make_tap(model.cfg, changes))[1]
        if where is None:
            sink = torch.stack([sink_score(p, 0).mean(0) for p in kept.values()])
            where = divmod(sink[1:].argmax().item(), sink.shape[1])
            found |= {"layer": where[0] + 1, "head": where[1]}
        pattern = kept[f"{found['layer']}.pattern"][:, found["head"]]
        found["maps"][name] = pattern.mean(0).tolist()
        found["attention"][name] = [sink_score(pattern[:, None], t).mean().item()
                                    for t in range(T - 1)]
    silent, alone = (found["attention"][name] for name in ("neurons silent", "token 10 alone"))
    return found | {"held": [max(silent[:T // 2]) < 0.2, alone[k] > 0.25]}


# ---------------------------------------------------------------- the figures
# (what stands in the JSON) -> Figure. The accent is token 0, or the sink that was forged.

TITLES = {
    "mask": "Masked up to layer 2 it has half of that sink, up to 10 all; one layer is not enough",
    "variance": "Amplified variance forges a sink, most at λ = 8; scaling and shift stay behind",
    "neurons": "Five neurons write the sink", "loss": "What text loses without them",
    "erasers": "Wave one carries the sinks of layers 2 to 10, wave two most of those from 12 on"}
NAMES = {"weights": "first by weight", "like": "like weight: control"}
DOTTED = {"color": "black", "ls": ":", "lw": 0.9}  # chance, or a threshold


def band(ax, found, **style):
    """{mean, std} by layer: a line with its spread."""
    mean, std = torch.tensor(found["mean"]), torch.tensor(found["std"])
    x = range(len(mean))
    ax.plot(x, mean, **style)
    ax.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.2, lw=0)


def draw_maps(found):
    titles = {"as it is": "as it is", "neurons silent": "5 neurons a layer silent",
              "token 10 alone": "token 10 sees only itself"}
    patterns = {says: torch.tensor(found["maps"][name]) for name, says in titles.items()}
    return figures.maps(patterns, [(0,), (0,), (0, 10)])


@figures.styled
def draw_waves(found):
    figure, axes = figures.new(8.4, 4, 1, sharex=True, height_ratios=[2, 3, 2, 2])
    state, writes, ratios, sink = axes
    for kind, ls in (("random", "-"), ("text", "--")):
        f = found["kinds"][kind]
        band(state, {"mean": [abs(v) for v in f["value"]["mean"]], "std": f["value"]["std"]},
             color=ACCENT, ls=ls)
        band(state, f["rest"], color=GREY, ls=ls)
        band(ratios, f["norm"], color=ACCENT, ls=ls)
        band(ratios, f["dominance"], color="black", ls=ls)
        band(sink, f["sink"], color=ACCENT, ls=ls)
    f = found["kinds"]["random"]
    c = f["dims"][0]
    writes.bar([i + 0.5 for i in range(len(f["mlp"]["mean"]))], f["mlp"]["mean"], 0.7, color=ACCENT)
    for i, adds in enumerate(f["mlp"]["mean"]):
        if abs(adds) > 50:  # what is smaller is no wave
            top = f["writers"]["write" if adds > 0 else "erase"][i]
            ids = [str(w["neuron"]) for w in top if w["first"] / adds > 0.1]
            writes.annotate(", ".join(ids), (i + 0.5, adds), (0, 3 if adds > 0 else -3),
                            textcoords="offset points", ha="center", rotation=90,
                            va="bottom" if adds > 0 else "top")
    state.set_yscale("log")
    ratios.set_yscale("log")
    writes.set_yscale("symlog", linthresh=10)
    writes.set(ylim=(-1e10, 1e12), yticks=[-1e4, -100, 0, 100, 1e4])
    sink.axhline(uniform_sink(found["tokens"]), **DOTTED)
    for ax in axes:
        ax.axvspan(10, 12, color="0.93", zorder=0)
    figures.dress(state, f"Dimension {c} of the state: written, erased, written again", None,
                  ylabel=f"|$x_{{{c}}}$|")
    figures.dress(writes, "What each MLP adds to it at token 0, and the neurons that do most of it",
                  None, ylabel="added, away from 0")
    figures.dress(ratios, "Meanwhile token 0 is long, and nearly one dimension", None,
                  ylabel="length, DomRatio")
    figures.dress(sink, "The sink goes when the state is erased (grey), and comes back with it",
                  None, xlabel="layer", ylabel="attention to token 0")
    entries = {"token 0: state, length over the median, mean sink": {"color": ACCENT},
               "other tokens": {"color": GREY}, "DomRatio of token 0": {"color": "black"},
               "random tokens": {"color": "black", "lw": 0.9},
               "English": {"color": "black", "lw": 0.9, "ls": "--"},
               "chance": DOTTED}
    figures.below(figure, entries, ncols=3)
    return figure


@figures.styled
def draw_wo(found):
    figure, ax = figures.new(3.6)
    looks = {"columns": ("black", "-", "columns that read z"),
             "columns, z_0": (ACCENT, "-", "the same, z of token 0 alone"),
             "rows": ("0.45", "--", "rows that write into the state"),
             "rows, out": ("0.6", "-.", "rows, against what they write"),
             "rows, shuffled": ("0.6", ":", "the same with shuffled directions")}
    for name, (color, ls, label) in looks.items():
        band(ax, found["tau"][name], color=color, ls=ls,
             label=f"{label}: {found['average'][name]:.2f}")
    null = found["null_std"]
    ax.axhspan(-2 * null, 2 * null, color="0.9", zorder=0, label="two deviations of chance")
    title = "W$_O$ does not read most where z varies most, nor write where the state does"
    figures.dress(ax, title,
                  {"loc": "center left", "bbox_to_anchor": (1, 0.5),
                   "title": "Kendall tau, mean of the layers"},
                  xlabel="layer", ylabel="spread against length")
    return figure


@figures.styled
def draw_heads(found):
    figure, axes = figures.new(4, 1, 2, sharex=True)
    for token, style in (("ordinary", {"color": "0.6", "marker": "x"}),
                         ("first", {"color": ACCENT, "marker": "o"})):
        f = {key: torch.tensor(v["mean"]).flatten() for key, v in found["heads"][token].items()}
        has = f["sink"] > SINK
        for ax, key in zip(axes, ("positive", "sink")):
            for of, face in ((has, style["color"]), (~has, "none")):
                look = {"facecolors": face, "edgecolors": style["color"]} if token == "first" else {
                    "color": style["color"]}
                ax.scatter(f["cos"][of], f[key][of], 16, marker=style["marker"], lw=0.8, **look)
    axes[1].axhline(SINK, **DOTTED)
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    figures.dress(axes[0], "Nearly every query of nearly every head has a positive product with "
                  "the first key", None, ylabel="queries with q·k > 0, after rotation",
                  xlabel="cos of the leading query and the key")
    figures.dress(axes[1], f"The better aligned, the stronger the sink (tau {found['tau']:.2f})",
                  None, ylabel="attention to the token",
                  xlabel="cos of the leading query and the key")
    dot = {"ls": "", "marker": "o", "color": ACCENT}
    figures.below(figure, {"token 0, a head with a sink (> 0.3)": dot,
                           "token 0, a head without": dot | {"mfc": "none"},
                           "token 32": {"ls": "", "marker": "x", "color": "0.6"}}, ncols=3)
    return figure


@figures.styled
def draw_mask(found):
    figure, (left, right) = figures.new(3.6, 1, 2, width_ratios=[3, 4])
    whole = pick(found["rows"], layers="all")
    for name, key, color in (("token 0, untouched", "untouched_first", "0.3"),
                             ("token 0, k masked", "first", "0.55"),
                             ("token k, untouched", "untouched", "0.8"),
                             ("token k, sees only itself", "resting", ACCENT)):
        place = {"first": 1, "untouched": 2, "resting": 3}.get(key, 0)
        at = [i + (place - 1.5) * 0.2 for i in range(len(whole))]
        bars = column(whole, key)
        left.bar(at, bars["mean"], 0.2, color=color, label=name, yerr=bars["std"], ecolor="black")
    left.set_xticks(range(len(whole)), [f"k = {row['k']}" for row in whole])
    left.grid(False, axis="x")
    looks = {"only": (GREY, "--", "only layer l"), "to": (ACCENT, "-", "layers 0 to l"),
             "from": ("black", "-.", "layers l to the last")}
    for name, (color, ls, label) in looks.items():
        band(right, column(pick(found["rows"], layers=name), "share"), color=color, ls=ls,
             label=label)
    right.axhline(0.25, label="from here on it holds", **DOTTED)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
    figures.dress(left, "A token that sees only itself becomes a second sink", below,
                  ylabel="attention of the heads with a sink")
    figures.dress(right, TITLES["mask"], below, xlabel="l", ylabel="share of the two sinks, k = 10")
    return figure


@figures.styled
def draw_variance(found):
    figure, axes = figures.new(5.4, 2, 4, sharex=True, sharey="row")
    looks = {"amplify": (ACCENT, "-"), "scale": ("0.3", "--"), "shift": ("0.55", "-.")}
    columns = [("layer 0", [("0", 10)]), ("layers 0 to 3", [("0-3", 10)]),
               ("all layers", [("all", 10)]),
               ("all, k = 5, 20, 40", [("all", k) for k in TOKENS if k != 10])]
    for (title, lines), (top, bottom) in zip(columns, axes.T):
        for kind, (color, ls) in looks.items():
            for layers_, k in lines:
                rows = pick(found["rows"], layers=layers_, k=k, kind=kind)
                for ax, key in ((top, "share"), (bottom, "norm")):
                    ax.errorbar(FACTORS, *column(rows, key).values(), color=color, ls=ls,
                                marker=".", capsize=2)
        top.axhline(0.25, **DOTTED)
        figures.dress(top, title)
        bottom.set(xlabel="λ")
        for ax in (top, bottom):
            ax.set_xscale("log", base=2)
            ax.set_xticks(FACTORS, [str(f) for f in FACTORS])
    axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1))
    axes[0, 0].set_ylabel("share of the two sinks")
    axes[1, 0].set_yscale("log")
    axes[1, 0].set_ylim(0.8)
    axes[1, 0].set_ylabel("longest state over the median")
    figure.suptitle(TITLES["variance"])
    entries = {"amplify": "μ + λ (z − μ)", "scale": "λ z, the paper's control",
               "shift": "shifted to the same length"}
    entries = {label: dict(zip(("color", "ls"), looks[kind])) for kind, label in entries.items()}
    figures.below(figure, entries | {"from here on it holds": DOTTED}, ncols=4)
    return figure


@figures.styled
def draw_neurons(found):
    figure, axes = figures.new(7, 2, 2, height_ratios=[3, 2])
    (left, right), below = axes[0], axes[1]
    rows = [pick(found["rows"], set=name, tokens="first", value="zero")[0]
            for name in found["sets"]]
    rows += pick(found["rows"], set="one", tokens="first")
    labels = [f"{NAMES.get(row['set'], row['set'])} ({len(row['neurons'])})" if row["set"] != "one"
              else "only {} of layer {}".format(*row["neurons"][0][::-1]) for row in rows]
    y = list(range(len(rows)))
    base = found["untouched"]["mean"]["text loss"]
    for shift_, (kind, color) in zip((-0.2, 0.2), (("random", ACCENT), ("text", "0.6"))):
        shares = column(rows, f"{kind} share")
        left.barh([i + shift_ for i in y], shares["mean"], 0.4, xerr=shares["std"], color=color,
                  label={"random": "random tokens", "text": "English"}[kind])
    for shift_, (tokens, color) in zip((-0.2, 0.2), (("first", "0.6"), ("all", "0.2"))):
        rise = []
        for row in rows:
            same = pick(found["rows"], set=row["set"], neurons=row["neurons"], tokens=tokens,
                        value="zero")
            rise.append(same[0]["mean"]["text loss"] - base)
        right.barh([i + shift_ for i in y], rise, 0.4, color=color,
                   label={"first": "silent at token 0", "all": "silent at all tokens"}[tokens])
    left.set_yticks(y, labels)
    right.set_yticks(y, [])
    for ax in (left, right):
        ax.invert_yaxis()
        ax.grid(False, axis="y")
    left.axvline(0.5, **DOTTED)
    left.xaxis.set_major_formatter(PercentFormatter(1))
    figures.dress(left, TITLES["neurons"], {"loc": "lower right"}, xlabel="share of the sink taken")
    figures.dress(right, TITLES["loss"], {"loc": "lower right"},
                  xlabel=f"rise of the loss on English, nats (untouched {base:.2f})")
    grid = below[0].get_gridspec()
    for ax in below:
        ax.remove()
    ax = figure.add_subplot(grid[1, :])
    looks = {"untouched": (ACCENT, "-"), "writers": ("black", "-"), "wave one": ("0.45", "--"),
             "wave two": ("0.45", ":"), "erasers, early": ("0.3", "-.")}
    for name, (color, ls) in looks.items():
        row = found["untouched"] if name == "untouched" else pick(
            found["rows"], set=name, tokens="first", value="zero")[0]
        layers_ = range(sum(key.startswith("sink ") for key in row["mean"]))
        band(ax, {f: [row[f][f"sink {i}"] for i in layers_] for f in ("mean", "std")},
             color=color, ls=ls, label=name if name == "untouched" else f"without {name}")
    ax.axhline(uniform_sink(found["tokens"]), **DOTTED)
    figures.dress(ax, TITLES["erasers"], {"loc": "center left", "bbox_to_anchor": (1, 0.5)},
                  xlabel="layer", ylabel="attention to token 0")
    return figure


# ---------------------------------------------------------------- command line

MEASUREMENTS = {"maps": maps, "mask": mask, "variance": variance, "waves": waves,
                "neurons": neurons, "wo": wo, "heads": heads}
DRAWN = {"maps": draw_maps, "mask": draw_mask, "variance": draw_variance, "waves": draw_waves,
         "neurons": draw_neurons, "wo": draw_wo, "heads": draw_heads}


def settings():
    source = {"model": smollm2.PACKAGE, "file": smollm2.GGUF}
    return {**(source if SUBJECT == "smollm2" else {"model": SUBJECT}), "windows": N, "tokens": T,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "hardware": f"1 thread of a {os.cpu_count()}-core CPU, float32"}


def draw_windows(vocab_size, encode, batches=BATCHES):
    """The windows of every measurement: `batches` disjoint batches of each kind."""
    random = [random_windows(N, T, vocab_size, seed=b) for b in range(batches)]
    return SimpleNamespace(random=random, text=text_windows(encode(english()), batches, N, T))


def rounded(value):
    """Four digits are enough, and keep the JSON small."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def path(name, kind="json"):
    return RESULTS / f"{SUBJECT}_{name}.{kind}"


def with_palette(png):
    """The same picture in 64 colours: a third of the bytes."""
    small = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return small.getvalue()


def main(argv=None):
    p = Parser("-m tests.measure", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("which", nargs="+", choices=[*MEASUREMENTS, "all"])
    p.add_argument("--llama", metavar="FOLDER", help="another checkpoint in the format of Llama; "
                   "its results go to out/ and the name of the folder")
    p.add_argument("--again", action="store_true", help="measure what is there already, too")
    p.add_argument("--render", action="store_true", help="measure nothing, draw the figures")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    if args.llama:
        global RESULTS, SUBJECT
        SUBJECT = Path(args.llama).resolve().name
        RESULTS = Path("out") / SUBJECT
    model = None
    for name in MEASUREMENTS if "all" in args.which else args.which:
        if not args.render and (args.again or not path(name).exists()):
            if model is None:
                folder = Path(args.llama) if args.llama else smollm2.fetch()
                model = GPT.from_llama(folder).eval().requires_grad_(False)
                encode = (llama_encoder(folder) if args.llama
                          else smollm2.encoding(folder).encode_ordinary)
                if encode is None:
                    raise UserError("these measurements need text, and so a tokenizer.json")
                batches = draw_windows(model.cfg.vocab_size, encode)
            measure = MEASUREMENTS[name]
            begin = time.process_time()
            found = settings() | {"hypothesis": measure.__doc__} | measure(model, batches)
            found["cpu_seconds"] = round(time.process_time() - begin)
            write_json(path(name), rounded(found))
            say(f"{name}: held: {found['held']}")
        found = read_json(path(name))
        content = with_palette(figures.png(DRAWN[name](found)))
        write_atomically(path(name, "png"), lambda part: part.write_bytes(content))
    return 0


if __name__ == "__main__":
    sys.exit(program("measure", main))
