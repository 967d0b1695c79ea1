"""Every claim of the paper and every open question, measured: one real Llama, and two kinds of toy.

    python -m tests.claims              train and measure what is missing, then write the tables
    python -m tests.claims --render     only the tables, from the committed JSON

Three subjects. `SmolLM2` is one trained model, so it has no seeds: its spread is that of 8 disjoint
batches of 8 windows of 64 tokens, random ones unless a line says text. `text` and `micro` are five
seeds each of models that train.py makes: `text` is its default (each window starts with <|bos|>,
which a head can know by its embedding), `micro` is `--size micro` (copying; first tokens are
ordinary, and are read in windows of random symbols, where nothing is to be copied).

The hypotheses and margins in CLAIMS were written down before they were measured. A test holds in a
batch (or seed) or it does not: *shown* means in every one, *partly* in at least half, *not here*
else. A claim is shown when all its tests are, and partly when any is at least partly.
"""

import argparse
import json
import math
import os
import platform
import statistics
import textwrap
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

import probe
import train
from chapters.lesson import trained
from data import smollm2
from data.border import fill, read_json, write_atomically, write_json
from data.windows import english, random_windows, text_windows
from model import GPT, record
from tests import cures

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "claims.json"
RUNS = Path("out/claims")
LANES = {"SmolLM2": "batches", "text": "seeds", "micro": "seeds"}
ATTENTIONS = ("softmax", "headnorm", "sigmoid", "gated")
UNITS = {"SmolLM2": 8, "text": 5, "micro": 5}
K, T = 10, 64


# ---------------------------------------------------------------- measuring one batch or seed

def plan() -> dict[tuple, train.Run]:
    """(lane, attn, seed) -> the run."""
    size = {"text": "tiny", "micro": "micro"}
    runs = {}
    for lane in size:
        for seed in range(UNITS[lane]):
            for attn in ATTENTIONS:
                run = train.Run(attn=attn, size=size[lane], seed=seed)
                folder = str(RUNS / f"{lane}-{attn}-{seed}")
                runs[lane, attn, seed] = train.resolve(replace(run, out=folder))
    return runs


def numbers(model, x, y):
    """The chain of token 0 and of the ordinary token T / 2: {first, ordinary}."""
    both, loss = probe.layers(model, x, ks=(0, T // 2), y=y)
    first, ordinary = (probe.summary(found) for found in both)
    return {"first": first | {"loss": loss}, "ordinary": ordinary}


def effects(model, x, y, k=K, names=()):
    """Every cut and forgery: {"cut neurons": {share, controls, before, after}}, the last two being
    the attention of the strongest head to the token that is cut or forged."""
    rows, found = probe.cuts(model, x, y, k, names=names), {}
    for row in rows:
        name, at = f"{row['kind']} {row['link']}", int(row["token"] != 0)
        if row["control"]:
            found[name]["controls"].append(probe.share(row, T))
        else:
            before, after = (row[when][at]["sink"] for when in ("before", "after"))
            found[name] = {"share": probe.share(row, T), "controls": [],
                           "before": before, "after": after}
    return found


@torch.no_grad()
def agreement(model, x, k=K):
    """Q7. The first layer's z_k is given one mean and, head by head, one variance over windows:

        z_k = mean + d,   d being the deviation that a token has which sees only itself,
        or the same with each head's part taken from another window: heads that disagree

    -> attention to k of the strongest head, for both."""
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    mask[k] = torch.arange(x.shape[1]) == k
    free, own = (record(model, x, ["0.z"], mask=m)[1]["0.z"][:, k] for m in (None, mask))
    d = own - own.mean(0)  # (N, H, D)
    apart = torch.stack([d[:, h].roll(h + 1, 0) for h in range(d.shape[1])], 1)
    found = {}
    for name, z in (("one token", free.mean(0) + d), ("heads apart", free.mean(0) + apart)):
        tap = probe.make_tap(model.cfg, {"0.z": probe.at_token(k, lambda _, z=z: z)})
        found[name] = probe.chain(model, x, tap, k=k)["sink"]
    return found


@torch.no_grad()
def screen(model, x):
    """In the layer where the neurons' contrast at token 0 is largest: how many of the TOP most
    active there are among the TOP by weights alone, and the largest weight's z-score."""
    contrast = probe.layers(model, x)[0][0]["neuron_contrast"]
    layer = contrast.argmax().item()
    block, name = model.layers[layer], f"{layer}.mlp_post"
    post = record(model, x, [name])[1][name][:, 0]
    score = probe.weight_score(block)
    active = probe.energy(post, block.mlp.down_proj.weight).mean(0).topk(probe.TOP).indices
    by_weight = score.topk(probe.TOP).indices
    common = len(set(active.tolist()) & set(by_weight.tolist()))
    return {"layer": layer, "overlap": common / probe.TOP,
            "z": ((score.max() - score.mean()) / score.std()).item()}


@torch.no_grad()
def rows_that_write(model, x):
    """The other reading of claim 3: Kendall tau between the spread of each dimension of the state
    that a layer adds to and the length of the row of W_O that writes into it, mean over layers.
    (The spread of what is written would prove nothing: a long row makes a large output.)"""
    names = [f"{i}.resid_pre" for i in range(len(model.layers))]
    kept = record(model, x, names)[1]
    taus = []
    for block, state in zip(model.layers, kept.values()):
        length = block.self_attn.o_proj.weight.float().norm(dim=1)
        taus.append(probe.kendall_tau(state.flatten(0, 1).std(0), length).item())
    return statistics.fmean(taus)


def measure_batch(b):
    """One batch of SmolLM2."""
    torch.set_num_threads(1)
    folder = smollm2.fetch()
    model, encode = GPT.from_llama(folder).eval(), smollm2.encoding(folder).encode_ordinary
    random = random_windows(8, T, model.cfg.vocab_size, seed=b)
    text = text_windows(encode(english()), UNITS["SmolLM2"], 8, T)[b]
    forge = "forge variance", "forge W_O"
    return {"softmax": {
        "random": numbers(model, *random), "text": numbers(model, *text),
        "effects": effects(model, *random), "effects in text": effects(model, *text),
        "effects at 20": effects(model, *random, 20, forge),
        "effects at 40": effects(model, *random, 40, forge),
        "agreement": agreement(model, random[0]), "screen": screen(model, random[0]),
        "tau of rows": rows_that_write(model, random[0])}}


def measure_seed(job):
    """One seed of a toy, one attention: the windows in which its sink is read come first."""
    torch.set_num_threads(1)
    lane, run = job
    model, corpus, _ = train.load_run(run.out)
    null = GPT(model.cfg, seed=run.seed).eval()
    draw = lambda bos: corpus.batch(32, T, torch.Generator().manual_seed(0), "val", bos)
    rest = lambda: corpus.rest(32, T, torch.Generator().manual_seed(0))
    random = rest() if corpus.task else random_windows(32, T, corpus.bos)
    main = draw(1.0) if lane == "text" else random
    log = train.read_log(run.out)
    found = {"main": numbers(model, *main), "random": numbers(model, *random),
             "text": numbers(model, *draw(0.0)), "untrained": numbers(null, *random),
             "val_loss": log[-1]["val_loss"], "lr": run.lr, "seconds": log[-1]["seconds"],
             "birth": [{"step": row["step"], "val_loss": row["val_loss"],
                        **row["links_bos" if lane == "text" else "links_rest"]} for row in log]}
    if lane == "text":
        found["loss at 1024"] = loss_at(model, corpus, 1024) - loss_at(model, corpus, T)
    if run.attn in ("softmax", "gated"):
        found |= {"effects": effects(model, *main), "screen": screen(model, main[0]),
                  "agreement": agreement(model, main[0]),
                  "tau of rows": rows_that_write(model, main[0])}
    return found


@torch.no_grad()
def loss_at(model, corpus, length, tokens=16384):
    """Validation loss in windows of another length than that of training."""
    generator = torch.Generator().manual_seed(1)
    x, y = corpus.batch(tokens // length, length, generator, "val", 1.0)
    return statistics.fmean(model(a, b)[1].item() for a, b in zip(x.split(16), y.split(16)))


def half_time(birth, key):
    """The first step at which a number has gone half of its way from the first to the last."""
    values = [row[key] for row in birth]
    middle = (values[0] + values[-1]) / 2
    return next(row["step"] for row, v in zip(birth, values)
                if (v - middle) * (values[-1] - middle) >= 0)


# ---------------------------------------------------------------- hypotheses

def main_of(r):
    return r["softmax"]["main" if "main" in r["softmax"] else "random"]


def at(key, windows=None, token="first", attn="softmax"):
    """A number of the chain; windows None: those in which the sink of the lane is read."""
    return lambda r: (r[attn][windows] if windows else (
        r[attn]["main"] if "main" in r[attn] else r[attn]["random"]))[token][key]


def over(key, windows=None):
    """A number at token 0 over the same at the ordinary token."""
    return lambda r: at(key, windows)(r) / at(key, windows, "ordinary")(r)


def has_sink(r):
    return main_of(r)["first"]["sink"] > probe.SINK


def effect(name, control=None, where="effects"):
    """The share of a cut or forgery; with `control`, how far above its control of that number. nan
    without a sink at token 0: there is nothing to share."""
    def of(r):
        e = r["softmax"][where][name]
        if not has_sink(r):
            return math.nan
        return e["share"] - (e["controls"][control] if control is not None else 0.0)
    return of


def control_of(name, number=0):
    return lambda r: r["softmax"]["effects"][name]["controls"][number] if has_sink(r) else math.nan


def times(name):
    return lambda r: (lambda e: e["after"] / e["before"])(r["softmax"]["effects"][name])


def own(attn, key):
    return lambda r: r[attn][key]


def form(name):
    return lambda r: r["softmax"]["agreement"][name]


def minus(a, b):
    return lambda r: a(r) - b(r)


def divided(a, b):
    return lambda r: a(r) / b(r)


def birth(first, then):
    return lambda r: (half_time(r["softmax"]["birth"], then)
                      - half_time(r["softmax"]["birth"], first))


SMOL, TOYS = ("SmolLM2",), ("text", "micro")
ALL = SMOL + TOYS
CLAIMS = (  # claim, what is measured, lanes, number of one batch or seed, holds from, holds up to
    ("C1", "V_0 / median V_t of z, first layer, random tokens", ALL,
     at("variance", "random"), 2, None),
    ("C1", "the same, untrained", TOYS, at("variance", "untrained"), 2, None),
    ("C2", "the same on text (or on the task)", ALL, at("variance", "text"), 2, None),
    ("C3", "Kendall tau: spread of z, columns of W_O that read it (paper 0.32; half is asked)", ALL,
     at("wo_tau"), 0.16, None),
    ("C3", "Kendall tau: spread of the state, rows of W_O that write into it", ALL,
     own("softmax", "tau of rows"), 0.16, None),
    ("C4", "write of the top 5 neurons at token 0, over other tokens", ALL,
     at("neuron_contrast"), 10, None),
    ("C4", "that over the same at token 32", ALL, over("neuron_contrast"), 3, None),
    ("C4", "share of these 5 that weights alone find", ALL,
     lambda r: r["softmax"]["screen"]["overlap"], 0.4, None),
    ("C5", "length of the state of token 0 over the median", ALL, at("norm_ratio"), 3, None),
    ("C5", "DomRatio of token 0, largest layer, over that of token 32", ALL,
     over("dominance"), 3, None),
    ("C6", "cosine of the normed state of token 0 between windows", SMOL + ("micro",),
     at("direction"), 0.5, None),
    ("C6", "that over the same at token 32", SMOL + ("micro",), over("direction"), 2, None),
    ("C7", "logit of key 0 above the others, head with the largest sink, nats", ALL,
     at("lock_gap"), 1, None),
    ("C7", "cosine of the leading query and key 0 there", ALL, at("lock_cos"), 0.5, None),
    ("C7", "attention of that head to token 0", ALL, at("sink"), 0.3, None),
    ("C8", "token 10 sees only itself: attention of the strongest head to it, times", ALL,
     times("forge variance"), 3, None),
    ("C8", "its share of the two sinks", ALL, effect("forge variance"), 0.25, None),
    ("C8", "the same in text", SMOL, effect("forge variance", where="effects in text"), 0.25, None),
    ("C8", "the same at token 20", SMOL,
     effect("forge variance", where="effects at 20"), 0.25, None),
    ("C8", "the same at token 40", SMOL,
     effect("forge variance", where="effects at 40"), 0.25, None),
    ("C9", "variance of z_10 x 25: its share of the two sinks", ALL,
     effect("forge W_O"), 0.25, None),
    ("C9", "that minus the share by z_10 x 5", ALL, effect("forge W_O", 1), 0.1, None),
    ("C9", "the same in text", SMOL, effect("forge W_O", 1, "effects in text"), 0.1, None),
    ("C9", "the same at token 20", SMOL, effect("forge W_O", 1, "effects at 20"), 0.1, None),
    ("C9", "the same at token 40", SMOL, effect("forge W_O", 1, "effects at 40"), 0.1, None),
    ("C10", "sigmoid: strongest head, rows made to sum to 1", TOYS,
     at("sink", attn="sigmoid"), None, 0.3),
    ("C10", "sigmoid's loss minus softmax's, each at its own learning rate", TOYS,
     minus(own("sigmoid", "val_loss"), own("softmax", "val_loss")), 0.005, None),
    ("C10", "loss at T = 1,024 above that at 64: sigmoid minus softmax", ("text",),
     minus(own("sigmoid", "loss at 1024"), own("softmax", "loss at 1024")), 0.005, None),
    ("C11", "headnorm's loss minus softmax's (paper -0.039)", TOYS,
     minus(own("headnorm", "val_loss"), own("softmax", "val_loss")), None, -0.005),
    ("C11", "headnorm: strongest head, attention to token 0", TOYS,
     at("sink", attn="headnorm"), None, 0.3),
    ("C11", "DomRatio of token 0: headnorm over softmax (paper 0.41)", TOYS,
     divided(at("dominance", attn="headnorm"), at("dominance")), None, 0.7),
    ("control", "gated, a known cure: strongest head, attention to token 0", TOYS,
     at("sink", attn="gated"), None, 0.3),
    ("Q1", "steps to half of the sink minus steps to half of the lock", TOYS,
     birth("lock_gap", "sink"), 0, None),
    ("Q1", "steps to half of the sink minus steps to half of the norm", TOYS,
     birth("norm_ratio", "sink"), 0, None),
    ("Q1", "steps to half of the norm minus steps to half of the neurons", TOYS,
     birth("neuron_contrast", "norm_ratio"), 0, None),
    ("Q2", "top 5 neurons a layer silent at token 0: share of the sink lost", ALL,
     effect("cut neurons"), 0.5, None),
    ("Q2", "the same in text", SMOL, effect("cut neurons", where="effects in text"), 0.5, None),
    ("Q2", "the same for 5 others of like weight", ALL, control_of("cut neurons"), None, 0.25),
    ("Q3", "share by variance minus share by a shift to the same length", ALL,
     effect("forge W_O", 0), 0.1, None),
    ("Q4", "z_0 given the RMS of the others: share of the sink lost", ALL,
     effect("cut W_O"), 0.5, None),
    ("Q4", "value drain at the sink: headnorm over softmax", TOYS,
     divided(at("drain", attn="headnorm"), at("drain")), 2, None),
    ("Q5", "headnorm's loss minus softmax's", TOYS,
     minus(own("headnorm", "val_loss"), own("softmax", "val_loss")), None, 0),
    ("Q6", "trained with <|bos|> first: attention to a token that sees only itself, times",
     ("text",),
     times("forge variance"), 3, None),
    ("Q6", "trained without: the same", SMOL + ("micro",), times("forge variance"), 3, None),
    ("Q7", "one token's value in all heads, over heads from different windows, equal variance", ALL,
     divided(form("one token"), form("heads apart")), 1.5, None),
)
SAYS = {  # claim -> what the paper says (or the question), and what would have refuted it
    "C1": ("Causal averaging leaves the first token a variance outlier.",
           "the ratio is 1: position 0 varies like any other"),
    "C2": ("It is there whatever is read. (How large it is depends on that.)",
           "text, or a task, has no outlier"),
    "C3": ("W_O favours the dimensions of high variance.",
           "tau is 0, as for a random matrix"),
    "C4": ("A few super neurons, seen in the weights, answer to the first token alone.",
           "they answer to an ordinary token as well, or weights do not tell them"),
    "C5": ("They make its state long, and large in few dimensions.",
           "its length and DomRatio are those of an ordinary token"),
    "C6": ("RMSNorm makes that one fixed direction, whatever the token.",
           "first tokens differ from each other as much as others do"),
    "C7": ("The queries of later heads lock on its key: a sink.", "queries do not prefer key 0"),
    "C8": ("A token that may see only itself becomes a sink.", "its attention stays as it was"),
    "C9": ("More variance at a token makes a sink, the same token scaled does not.",
           "scaling does as much, or neither does anything"),
    "C10": ("Sigmoid attention: no sink, a higher loss, and worse in longer windows.",
            "a sink, or an equal loss"),
    "C11": ("Head-wise RMSNorm before W_O: a lower loss, no sink, less disparity.",
            "an equal or higher loss, or a sink"),
    "control": ("Gated attention is known to cure (arXiv 2505.06708): where it does not, "
                "the setting is no test of a cure.", "the sink is as before"),
    "Q1": ("Is the order in time that of the chain?", "the sink comes first"),
    "Q2": ("Do the super neurons carry the sink? (The paper did not silence them.)",
           "silencing them takes no more than silencing others"),
    "Q3": ("Is it variance that forges a sink, or length?", "the same length does as much"),
    "Q4": ("Is it parity at token 0 that cures, or that a drained value is no longer nothing?",
           "neither changes anything"),
    "Q5": ("Does headnorm lower the loss at this scale?", "it does not"),
    "Q6": ("Does a model that knows its first token by name pass the mask intervention? One "
           "that does not?", "both, or neither"),
    "Q7": ("Is what marks a token that sees only itself that its heads bring one value?",
           "heads that disagree, at equal variance, do as much"),
}


# ---------------------------------------------------------------- tables

def units(found, lane):
    """One record for each batch or seed: {attn: numbers}."""
    return [found[lane][str(u)] for u in range(UNITS[lane]) if str(u) in found[lane]]


def judge(values, low, high):
    """(how many hold, the word for it)"""
    held = sum((low is None or v >= low) and (high is None or v <= high) for v in values)
    if held == len(values):
        return held, "shown"
    return held, "partly" if 2 * held >= len(values) else "not here"


def tests_of(found) -> list[dict]:
    """Every test in every lane: {claim, lane, what, margin, values, held, word}."""
    rows = []
    for claim, what, lanes, number, low, high in CLAIMS:
        margin = f"at least {low:g}" if high is None else f"at most {high:g}"
        for lane in lanes:
            values = [number(r) for r in units(found, lane)]
            held, word = judge(values, low, high)
            rows.append(dict(claim=claim, lane=lane, what=what, margin=margin, values=values,
                             held=held, word=word))
    return rows


def word_of(tests) -> str:
    """shown, partly or not here, of all tests of a claim in one lane."""
    words = [t["word"] for t in tests]
    if all(word == "shown" for word in words):
        return "shown"
    return "not here" if all(word == "not here" for word in words) else "partly"


def spread(values) -> str:
    there = [v for v in values if math.isfinite(v)]
    if not there:
        return "no sink"
    text = probe.with_spread(statistics.fmean(there), statistics.stdev(there) if there[1:] else 0)
    without = len(values) - len(there)
    return text + (f" ({without} without a sink)" if without else "")


def page(found) -> str:
    """claims.md: claim by claim, what the paper says, what was measured, what was seen."""
    tests, lines = tests_of(found), []
    for claim, (says, refuted) in SAYS.items():
        here = [t for t in tests if t["claim"] == claim]
        lanes = dict.fromkeys(t["lane"] for t in here)
        seen = ", ".join(f"**{word_of([t for t in here if t['lane'] == lane])}** in {lane}"
                         for lane in lanes)
        lines += [f"## {claim}: {says}", "", f"{seen[0].upper() + seen[1:]}. "
                  f"It would be refuted if {refuted}.", "",
                  "| what was measured | in | holds if | mean ± std | holds in |",
                  "|---|---|---|---|---|"]
        lines += [f"| {t['what']} | {t['lane']} | {t['margin']} | {spread(t['values'])} "
                  f"| {t['held']} of {len(t['values'])} {LANES[t['lane']]} |" for t in here]
        lines.append("")
    return "\n".join(lines).replace("<|bos|>", "`<\\|bos\\|>`")


def links_table(found) -> str:
    """The README's table: a row for each link, SmolLM2 as it is, cut, its control, and micro."""
    lines = ["| link | SmolLM2, first token (an ordinary one) | cut: share of the sink taken | its "
             "control | forged: share of two sinks | its control | own model, cut | forged |",
             "|---|---|---|---|---|---|---|---|"]
    for link in probe.LINKS:
        n = link.numbers[0]
        mean = lambda token: statistics.fmean(
            r["softmax"]["random"][token][n.key] for r in units(found, "SmolLM2"))
        cells = []
        for lane in ("SmolLM2", "micro"):
            for kind in ("cut", "forge"):
                values = [r["softmax"]["effects"].get(f"{kind} {link.name}")
                          for r in units(found, lane) if has_sink(r)]
                there = [v for v in values if v]
                cells.append(percent([v["share"] for v in there]))
                if lane == "SmolLM2":
                    cells.append(percent([max(v["controls"]) for v in there]))
        lines.append(f"| **{link.name}**: {n.says} | {probe.digits(mean('first'))} "
                     f"({probe.digits(mean('ordinary'))}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(values) -> str:
    if not values:
        return "-"
    std = statistics.stdev(values) if values[1:] else 0
    return f"{statistics.fmean(values):.0%} ± {std:.0%}"


def losses_table(found) -> str:
    """Loss and sink of every attention in the toys."""
    lines = ["| | attention | learning rate | loss, nats per token | minus softmax, same seed | "
             "strongest head | length of token 0 | DomRatio |", "|---|---|---|---|---|---|---|---|"]
    for lane in TOYS:
        for attn in ATTENTIONS:
            r = [u for u in units(found, lane) if attn in u]
            key = lambda name: spread([u[attn]["main"]["first"][name] for u in r])
            gap = spread([u[attn]["val_loss"] - u["softmax"]["val_loss"] for u in r])
            loss = spread([u[attn]["val_loss"] for u in r])
            lines.append(f"| {lane} | {attn} | {r[0][attn]['lr']:g} | {loss} | "
                         f"{'-' if attn == 'softmax' else gap} | {key('sink')} | "
                         f"{key('norm_ratio')} | {key('dominance')} |")
    return "\n".join(lines)


FOUND = (  # the README's five bullets; what stands in braces comes from claims.json
    "**A real Llama shows the chain.** In SmolLM2, on random tokens, the first token varies "
    "{variance} times as much as the median, its state is {norm} times as long, and {heads} of "
    "all heads have a sink on it. Cutting what it averages, its neurons, its direction or its "
    "key takes {cut_variance}, {cut_neurons}, {cut_direction} and {cut_lock} of the sink; the "
    "controls take next to nothing.",
    "**A handful of neurons carries it**, which the paper did not test: with five of 1,536 a "
    "layer silent at that one token it has no sink (the next tokens take it over; with the five "
    "silent everywhere there is none), and five others of like weight take nothing ({others}). "
    "Let the model write without two of them: [chapter 03](chapters/book/03.md).",
    "**Variance forges a sink, length does not.** A token that sees only itself gets {itself} "
    "of the two sinks; one whose variance is amplified {amplified}, shifted to the same length "
    "{shifted}, scaled {scaled}. In the model that `python train.py` trains (the {sinks} of 5 "
    "seeds that have a sink) it is {toy_itself} and {toy_amplified}, by the shift {toy_shifted}; "
    "there scaling does it too ({toy_scaled}).",
    "**Not everything holds.** In SmolLM2 the columns of W_O do not favour the dimensions of "
    "high variance (Kendall tau {tau}, the paper 0.32), nor do the rows that write ({rows}); it "
    "weakens the outlier that it is said to pass on ({variance} times the median before it, "
    "{out} after, in text {text_variance} and {text_out}). Giving the first token the others' "
    "RMS before W_O takes only {cut_W_O} of the sink. A fixed direction and a large DomRatio "
    "are not its own alone: it has {direction} and {dominance}, an ordinary token "
    "{direction_ordinary} and {dominance_ordinary}.",
    "**Sigmoid ends the sink, headnorm does not, and a small sink has its uses.** With ordinary "
    "first tokens (`python train.py`, five seeds, one learning rate) the strongest head gives "
    "token 0 {micro_softmax} (softmax), {micro_headnorm} (headnorm), {micro_gated} (gated, a known "
    "cure) and {micro_sigmoid} (sigmoid). But this sink is a *ruler*: hide token 0, and the model "
    "measures its place from token 1 ([chapter 07](chapters/book/07.md)). No cure takes away what "
    "is in use, so a sink that stays here refutes none. After `<|bos|>`, which a head knows by "
    "name, it is {text_softmax}, {text_headnorm}, {text_gated} and {text_sigmoid}. Headnorm has "
    "the lower loss all the same: {loss} nats against softmax, each at its best learning rate "
    "(95 % interval; the paper: -0.039). More: [the cures](tests/results/cures.md).",)


def findings(found) -> str:
    """FOUND with its numbers, means over batches or seeds."""
    def mean(lane, number):
        values = [number(r) for r in units(found, lane)]
        return statistics.fmean(v for v in values if math.isfinite(v))

    S, M = "SmolLM2", "micro"
    percents = {f"cut_{link.name}": (S, effect(f"cut {link.name}")) for link in probe.LINKS
                if link.cut}
    percents |= {
        "heads": (S, at("sink_rate")), "others": (S, control_of("cut neurons")),
        "itself": (S, effect("forge variance")),
        "toy_itself": (M, effect("forge variance")), "amplified": (S, effect("forge W_O")),
        "shifted": (S, control_of("forge W_O")), "scaled": (S, control_of("forge W_O", 1)),
        "toy_amplified": (M, effect("forge W_O")), "toy_shifted": (M, control_of("forge W_O")),
        "toy_scaled": (M, control_of("forge W_O", 1))}
    plain = {
        "variance": (S, at("variance")), "norm": (S, at("norm_ratio")), "tau": (S, at("wo_tau")),
        "rows": (S, own("softmax", "tau of rows")), "out": (S, at("variance_out")),
        "text_variance": (S, at("variance", "text")), "text_out": (S, at("variance_out", "text")),
        "direction": (S, at("direction")),
        "dominance": (S, at("dominance")),
        "direction_ordinary": (S, at("direction", token="ordinary")),
        "dominance_ordinary": (S, at("dominance", token="ordinary"))}
    for lane in TOYS:
        plain |= {f"{lane}_{a}": (lane, at("sink", attn=a)) for a in ATTENTIONS}
    values = {name: f"{mean(*v):.0%}" for name, v in percents.items()}
    values |= {name: probe.digits(mean(*v)) for name, v in plain.items()}
    values["sinks"] = sum(has_sink(r) for r in units(found, M))
    values["loss"] = cures.gain(read_json(cures.FILE))
    return "\n".join(textwrap.fill("- " + text.format(**values), 100, subsequent_indent="  ",
                                   break_long_words=False, break_on_hyphens=False)
                     for text in FOUND)


def tables(found) -> dict[str, str]:
    return {"found": findings(found), "links": links_table(found), "claims": page(found),
            "losses": losses_table(found)}


PAGES = (Path("README.md"), RESULTS / "claims.md")


def render() -> None:
    blocks = tables(read_json(FILE))
    for path in PAGES:
        text = fill(path.read_text(encoding="utf-8"), blocks)
        write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------- command line

def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--render", action="store_true", help="only the tables, from the JSON")
    parser.add_argument("--jobs", type=int, default=2, help="at a time, one thread each (2)")
    parser.add_argument("--lane", choices=LANES, help="only this one; the others stay as they are")
    args = parser.parse_args()
    if not args.render:
        measure(args.jobs, [args.lane] if args.lane else list(LANES))
    render()


def measure(jobs, lanes) -> None:
    """Train what is missing, measure what is not yet in claims.json, write it after each."""
    found = read_json(FILE) if FILE.exists() else {}
    found["environment"] = {"torch": torch.__version__, "python": platform.python_version(),
                            "cores": os.cpu_count(), "machine": platform.machine()}
    runs = {key: run for key, run in plan().items() if key[0] in lanes}
    trained(*runs.values(), jobs=jobs)
    with ProcessPoolExecutor(jobs) as pool:
        waiting = []
        for lane in lanes:
            there = found.setdefault(lane, {})
            if lane == "SmolLM2":
                waiting += [(lane, str(b), None, pool.submit(measure_batch, b))
                            for b in range(UNITS[lane]) if str(b) not in there]
        for (lane, attn, seed), run in runs.items():
            if attn not in found[lane].get(str(seed), {}):
                waiting.append((lane, str(seed), attn, pool.submit(measure_seed, (lane, run))))
        for lane, unit, attn, job in waiting:
            numbers_ = job.result() if attn is None else {attn: job.result()}
            found[lane].setdefault(unit, {}).update(numbers_)
            write_json(FILE, found)
            print(f"measured {lane} {unit} {attn or ''}", flush=True)


if __name__ == "__main__":
    main()
