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
import itertools
import math
import operator
import os
import platform
import re
import statistics
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import probe
import train
from chapters.lesson import trained
from data import smollm2
from data.common import bar, read_json, write_json
from data.windows import english, random_windows, text_windows
from model import GPT, record
from tests import cures, retrofit
from tests.pages import fill_page, markdown

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
    runs = {}
    for lane, size in (("text", "tiny"), ("micro", "micro")):
        for seed, attn in itertools.product(range(UNITS[lane]), ATTENTIONS):
            out = str(RUNS / f"{lane}-{attn}-{seed}")
            runs[lane, attn, seed] = train.resolve(train.Run(attn, size, seed=seed, out=out))
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
    return {"random": numbers(model, *random), "text": numbers(model, *text),
            "effects": effects(model, *random), "effects in text": effects(model, *text),
            "effects at 20": effects(model, *random, 20, forge),
            "effects at 40": effects(model, *random, 40, forge),
            "agreement": agreement(model, random[0]), "screen": screen(model, random[0]),
            "tau of rows": rows_that_write(model, random[0])}


def measure_seed(lane, run):
    """One seed of a toy, one attention. `main` are the windows in which its sink is read."""
    torch.set_num_threads(1)
    model, corpus, _ = train.load_run(run.out)
    log, untrained = train.read_log(run.out), GPT(model.cfg, seed=run.seed).eval()

    def held_out(bos):
        return corpus.batch(32, T, torch.Generator().manual_seed(0), "val", bos)

    if lane == "text":
        random, main, links = random_windows(32, T, corpus.bos), held_out(1.0), "links_bos"
    else:
        random = main = corpus.rest(32, T, torch.Generator().manual_seed(0))
        links = "links_rest"
    kept = ("step", "val_loss")
    found = {"main": numbers(model, *main), "random": numbers(model, *random),
             "text": numbers(model, *held_out(0.0)), "untrained": numbers(untrained, *random),
             "val_loss": log[-1]["val_loss"], "lr": run.lr, "seconds": log[-1]["seconds"],
             "birth": [{key: row[key] for key in kept} | row[links] for row in log]}
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


# ---------------------------------------------------------------- reading the records

def units(found, lane) -> list[dict]:
    """What was measured in each batch or seed of a lane, {attn: record}, each `ready`."""
    there = (found[lane].get(str(unit)) for unit in range(UNITS[lane]))
    return [{attn: ready(record) for attn, record in unit.items()} for unit in there if unit]


def ready(record) -> dict:
    """A record in which `number` finds its places: on top `first` and `ordinary` of the windows in
    which the sink is read; every effect, with its strongest control, and nan for all shares where
    there is no sink to share; and `half`, when a number has gone half of its way."""
    found = record | record.get("main", record["random"])
    has_sink = found["first"]["sink"] > probe.SINK
    nothing = {"share": math.nan, "controls": [math.nan, math.nan], "control": math.nan}
    for name, effect in record.get("effects", {}).items():
        found[name] = effect | ({"control": max(effect["controls"])} if has_sink else nothing)
    if "birth" in record:
        found["half"] = {key: half_time(record["birth"], key) for key in
                         ("sink", "lock_gap", "norm_ratio", "neuron_contrast")}
    return found


def half_time(birth, key):
    """The first step at which a number has gone half of its way from the first to the last."""
    values = [row[key] for row in birth]
    middle = (values[0] + values[-1]) / 2
    return next(row["step"] for row, v in zip(birth, values)
                if (v - middle) * (values[-1] - middle) >= 0)


def number(unit, what) -> float:
    """What stands at a place in a record, as in "first.sink" or, where it is not softmax's,
    "sigmoid.val_loss"; or "a minus b" or "a over b" of two places."""
    for word, apply in (("minus", operator.sub), ("over", operator.truediv)):
        if f" {word} " in what:
            a, b = what.split(f" {word} ")
            return apply(number(unit, a), number(unit, b))
    keys = what.split(".")
    value = unit if keys[0] in ATTENTIONS else unit["softmax"]
    for key in keys:
        value = value[int(key) if isinstance(value, list) else key]
    return value


def numbers_of(found, lane, what) -> list[float]:
    return [number(unit, what) for unit in units(found, lane)]


def finite(values) -> list[float]:
    """Those of the batches or seeds that have a sink."""
    return [v for v in values if math.isfinite(v)]


# ---------------------------------------------------------------- hypotheses

SMOL, TOYS = ("SmolLM2",), ("text", "micro")
ALL = SMOL + TOYS
CLAIMS = (  # claim, what is measured, lanes, `number` of a batch or seed, holds from, holds up to
    ("C1", "V_0 / median V_t of z, first layer, random tokens", ALL,
     "random.first.variance", 2, None),
    ("C1", "the same, untrained", TOYS, "untrained.first.variance", 2, None),
    ("C2", "the same on text (or on the task)", ALL, "text.first.variance", 2, None),
    ("C3", "Kendall tau: spread of z, columns of W_O that read it (paper 0.32; half is asked)", ALL,
     "first.wo_tau", 0.16, None),
    ("C3", "Kendall tau: spread of the state, rows of W_O that write into it", ALL,
     "tau of rows", 0.16, None),
    ("C4", "write of the top 5 neurons at token 0, over other tokens", ALL,
     "first.neuron_contrast", 10, None),
    ("C4", "that over the same at token 32", ALL,
     "first.neuron_contrast over ordinary.neuron_contrast", 3, None),
    ("C4", "share of these 5 that weights alone find", ALL, "screen.overlap", 0.4, None),
    ("C5", "length of the state of token 0 over the median", ALL, "first.norm_ratio", 3, None),
    ("C5", "DomRatio of token 0, largest layer, over that of token 32", ALL,
     "first.dominance over ordinary.dominance", 3, None),
    ("C6", "cosine of the normed state of token 0 between windows", SMOL + ("micro",),
     "first.direction", 0.5, None),
    ("C6", "that over the same at token 32", SMOL + ("micro",),
     "first.direction over ordinary.direction", 2, None),
    ("C7", "logit of key 0 above the others, head with the largest sink, nats", ALL,
     "first.lock_gap", 1, None),
    ("C7", "cosine of the leading query and key 0 there", ALL, "first.lock_cos", 0.5, None),
    ("C7", "attention of that head to token 0", ALL, "first.sink", 0.3, None),
    ("C8", "token 10 sees only itself: attention of the strongest head to it, times", ALL,
     "forge variance.after over forge variance.before", 3, None),
    ("C8", "its share of the two sinks", ALL, "forge variance.share", 0.25, None),
    ("C8", "the same in text", SMOL, "effects in text.forge variance.share", 0.25, None),
    ("C8", "the same at token 20", SMOL, "effects at 20.forge variance.share", 0.25, None),
    ("C8", "the same at token 40", SMOL, "effects at 40.forge variance.share", 0.25, None),
    ("C9", "variance of z_10 x 25: its share of the two sinks", ALL, "forge W_O.share", 0.25, None),
    ("C9", "that minus the share by z_10 x 5", ALL,
     "forge W_O.share minus forge W_O.controls.1", 0.1, None),
    ("C9", "the same in text", SMOL,
     "effects in text.forge W_O.share minus effects in text.forge W_O.controls.1", 0.1, None),
    ("C9", "the same at token 20", SMOL,
     "effects at 20.forge W_O.share minus effects at 20.forge W_O.controls.1", 0.1, None),
    ("C9", "the same at token 40", SMOL,
     "effects at 40.forge W_O.share minus effects at 40.forge W_O.controls.1", 0.1, None),
    ("C10", "sigmoid: strongest head, rows made to sum to 1", TOYS,
     "sigmoid.first.sink", None, 0.3),
    ("C10", "sigmoid's loss minus softmax's, each at its own learning rate", TOYS,
     "sigmoid.val_loss minus softmax.val_loss", 0.005, None),
    ("C10", "loss at T = 1,024 above that at 64: sigmoid minus softmax", ("text",),
     "sigmoid.loss at 1024 minus softmax.loss at 1024", 0.005, None),
    ("C11", "headnorm's loss minus softmax's (paper -0.039)", TOYS,
     "headnorm.val_loss minus softmax.val_loss", None, -0.005),
    ("C11", "headnorm: strongest head, attention to token 0", TOYS,
     "headnorm.first.sink", None, 0.3),
    ("C11", "DomRatio of token 0: headnorm over softmax (paper 0.41)", TOYS,
     "headnorm.first.dominance over softmax.first.dominance", None, 0.7),
    ("control", "gated, a known cure: strongest head, attention to token 0", TOYS,
     "gated.first.sink", None, 0.3),
    ("Q1", "steps to half of the sink minus steps to half of the lock", TOYS,
     "half.sink minus half.lock_gap", 0, None),
    ("Q1", "steps to half of the sink minus steps to half of the norm", TOYS,
     "half.sink minus half.norm_ratio", 0, None),
    ("Q1", "steps to half of the norm minus steps to half of the neurons", TOYS,
     "half.norm_ratio minus half.neuron_contrast", 0, None),
    ("Q2", "top 5 neurons a layer silent at token 0: share of the sink lost", ALL,
     "cut neurons.share", 0.5, None),
    ("Q2", "the same in text", SMOL, "effects in text.cut neurons.share", 0.5, None),
    ("Q2", "the same for 5 others of like weight", ALL, "cut neurons.controls.0", None, 0.25),
    ("Q3", "share by variance minus share by a shift to the same length", ALL,
     "forge W_O.share minus forge W_O.controls.0", 0.1, None),
    ("Q4", "z_0 given the RMS of the others: share of the sink lost", ALL,
     "cut W_O.share", 0.5, None),
    ("Q4", "value drain at the sink: headnorm over softmax", TOYS,
     "headnorm.first.drain over softmax.first.drain", 2, None),
    ("Q5", "headnorm's loss minus softmax's", TOYS,
     "headnorm.val_loss minus softmax.val_loss", None, 0),
    ("Q6", "trained with <|bos|> first: attention to a token that sees only itself, times",
     ("text",), "forge variance.after over forge variance.before", 3, None),
    ("Q6", "trained without: the same", SMOL + ("micro",),
     "forge variance.after over forge variance.before", 3, None),
    ("Q7", "one token's value in all heads, over heads from different windows, equal variance", ALL,
     "agreement.one token over agreement.heads apart", 1.5, None),
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
    "Q1": ("The order in time is that of the chain.", "the sink comes first"),
    "Q2": ("The super neurons carry the sink. (The paper did not silence them.)",
           "silencing them takes no more than silencing others"),
    "Q3": ("It is variance that forges a sink, and not length.", "the same length does as much"),
    "Q4": ("The RMS of the others at token 0 ends the sink; and headnorm, which gives it, ends the "
           "drain of its value.", "the sink stays, the value is drained as before"),
    "Q5": ("Headnorm lowers the loss at this scale.", "it does not"),
    "Q6": ("A token that sees only itself gets more attention, whether the model has learned to "
           "know its first token by name or not.", "nothing changes"),
    "Q7": ("What marks a token that sees only itself is that all its heads read one token.",
           "heads that read different windows, at equal variance, do as much"),
}


# ---------------------------------------------------------------- tables

def judge(values, low, high):
    """(how many hold, the word for it)"""
    held = sum((low is None or v >= low) and (high is None or v <= high) for v in values)
    if held == len(values):
        return held, "shown"
    return held, "partly" if 2 * held >= len(values) else "not here"


def tests_of(found) -> list[dict]:
    """Every test in every lane: {claim, lane, what, margin, values, held, word}."""
    rows = []
    for claim, what, lanes, place, low, high in CLAIMS:
        margin = f"at least {low:g}" if high is None else f"at most {high:g}"
        for lane in lanes:
            values = numbers_of(found, lane, place)
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


def in_words(values) -> str:
    there = finite(values)
    if not there:
        return "no sink"
    text = probe.with_spread(*probe.spread(there))
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
                  markdown(("what was measured", "in", "holds if", "mean ± std", "holds in"), [
                      (t["what"], t["lane"], t["margin"], in_words(t["values"]),
                       f"{t['held']} of {len(t['values'])} {LANES[t['lane']]}") for t in here]), ""]
    return "\n".join(lines).replace("<|bos|>", "`<\\|bos\\|>`")


def links_table(found) -> str:
    """The README's table: a row for each link, SmolLM2 as it is, cut, its control, and micro."""
    rows, head = [], (
        "link", "SmolLM2, first token (an ordinary one)", "cut: share of the sink taken",
        "its control", "forged: share of two sinks", "its control", "own model, cut", "its control",
        "forged", "its control")
    for link in probe.LINKS:
        headline = link.numbers[0]
        first, ordinary = (numbers_of(found, "SmolLM2", f"{token}.{headline.key}")
                           for token in ("first", "ordinary"))
        cells = [f"**{link.name}**: {headline.says}", f"{probe.digits(statistics.fmean(first))} "
                 f"({probe.digits(statistics.fmean(ordinary))})"]
        for lane, kind, key in itertools.product(("SmolLM2", "micro"), ("cut", "forge"),
                                                 ("share", "control")):
            place = f"{kind} {link.name}.{key}"
            edit = getattr(link, kind)
            cells.append(percent(numbers_of(found, lane, place)) if edit else "-")
        rows.append(cells)
    return markdown(head, rows)


def percent(values) -> str:
    there = finite(values)
    return f"{statistics.fmean(there):.0%} ± {statistics.stdev(there):.0%}"


def losses_table(found) -> str:
    """Loss and sink of every attention in the toys."""
    rows, head = [], (
        "", "attention", "learning rate", "loss, nats per token", "minus softmax, same seed",
        "strongest head", "length of token 0", "DomRatio")
    places = ("val_loss", "val_loss minus softmax.val_loss", "first.sink", "first.norm_ratio",
              "first.dominance")
    for lane in TOYS:
        for attn in ATTENTIONS:
            cells = [in_words(numbers_of(found, lane, f"{attn}.{place}")) for place in places]
            if attn == "softmax":
                cells[1] = "-"
            rate = numbers_of(found, lane, f"{attn}.lr")[0]
            rows.append((lane, attn, f"{rate:g}", *cells))
    return markdown(head, rows)


FOUND = """
**A real Llama shows the chain.** In SmolLM2, on random tokens, the first token varies
{first.variance} times as much as the median, its state is {first.norm_ratio} times as long, and
{first.sink_rate %} of all heads have a sink on it. Cutting what it averages, its neurons, its
direction or its key takes {cut variance.share %}, {cut neurons.share %}, {cut direction.share %}
and {cut lock.share %} of the sink; the controls take next to nothing.

**A handful of neurons carries it**, which the paper did not test: with five of 1,536 a layer silent
at that one token it has no sink (the next tokens take it over; with the five silent everywhere
there is none), and five others of like weight take nothing ({cut neurons.controls.0 %}). Nor is it
missed for good: the model trained on with these five drawn anew has {healed}. Let it write without
two of them: [chapter 03](chapters/book/03.md).

**Variance forges a sink, length does not.** A token that sees only itself gets {forge
variance.share %} of the two sinks; one whose variance is amplified {forge W_O.share %}, shifted to
the same length {forge W_O.controls.0 %}, scaled {forge W_O.controls.1 %}. In the model that `python
train.py` trains (the {sinks} of 5 seeds that have a sink) it is {micro: forge variance.share %} and
{micro: forge W_O.share %}, by the shift {micro: forge W_O.controls.0 %}; there scaling does it too
({micro: forge W_O.controls.1 %}).

**Not everything holds.** In SmolLM2 the columns of W_O do not favour the dimensions of high
variance (Kendall tau {first.wo_tau}, the paper 0.32), nor do long rows write into dimensions of the
state that vary much ({tau of rows}); it weakens the outlier that it is said to pass on
({first.variance} times the median before it, {first.variance_out} after, in text
{text.first.variance} and {text.first.variance_out}). Giving the first token the others' RMS before
W_O takes only {cut W_O.share %} of the sink. A fixed direction and a large DomRatio are not its own
alone: it has {first.direction} and {first.dominance}, an ordinary token {ordinary.direction} and
{ordinary.dominance}.

**Sigmoid ends the sink, headnorm in half a setting of three, and a small sink has its uses.** With
ordinary first tokens (`python train.py`, five seeds, one learning rate) the strongest head gives
token 0 {micro: softmax.first.sink} (softmax), {micro: headnorm.first.sink} (headnorm), {micro:
gated.first.sink} (gated, a known cure) and {micro: sigmoid.first.sink} (sigmoid). But this sink is
*of use*: these models measure their place from token 0, the default one by the head that has the
sink ([chapter 07](chapters/book/07.md)). So a sink that stays here refutes no cure. After
`<|bos|>`, which a head knows by name, it is {text: softmax.first.sink}, {text:
headnorm.first.sink}, {text: gated.first.sink} and {text: sigmoid.first.sink}. In copying headnorm
has the lower loss all the same: {loss} nats against softmax, each at its best learning rate (95 %
interval; the paper: -0.039); after `<|bos|>` there is no difference ({text: headnorm.val_loss minus
softmax.val_loss}). In text without `<|bos|>`, trained for an hour (one seed), the sink is {long},
and headnorm's loss is lower again ({long loss}). Built into SmolLM2 and trained on, headnorm
ends most of it on random tokens: heads with a sink are then {retrofit}, where *scaled* brings
heads, but not tokens, to one length, so that the sink has to come back; in text it does so with one
order of batches of two. More: [the cures](tests/results/cures.md).
"""  # what stands in braces is a `number`, of SmolLM2 where it names no lane


def findings(found) -> str:
    """FOUND with its numbers, means over batches or seeds."""
    def fill_in(braces):
        lane, place, as_percent = braces.groups()
        mean = statistics.fmean(finite(numbers_of(found, lane or "SmolLM2", place)))
        return f"{mean:.0%}" if as_percent else probe.digits(mean)

    sinks = len(finite(numbers_of(found, "micro", "cut lock.share")))
    of_cures, lines = read_json(cures.FILE), []
    words = {"sinks": str(sinks), "retrofit": retrofit.shares(read_json(retrofit.FILE)),
             "healed": retrofit.healed(read_json(retrofit.FILE)),
             "loss": cures.gain(of_cures), "long": cures.long_sinks(of_cures),
             "long loss": cures.long_gap(of_cures, "headnorm")}
    for text in FOUND.strip().split("\n\n"):
        for name, says in words.items():
            text = text.replace(f"{{{name}}}", says)
        text = re.sub(r"\{(?:(\w+): )?(.+?)( %)?\}", fill_in, " ".join(text.split()))
        lines.append(textwrap.fill("- " + text, 100, subsequent_indent="  ",
                                   break_long_words=False, break_on_hyphens=False))
    return "\n".join(lines)


def tables(found) -> dict[str, str]:
    return {"found": findings(found), "links": links_table(found), "claims": page(found),
            "losses": losses_table(found)}


PAGES = (Path("README.md"), RESULTS / "claims.md")


def render() -> None:
    blocks = tables(read_json(FILE))
    for path in PAGES:
        fill_page(path, blocks)


# ---------------------------------------------------------------- command line

def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--render", action="store_true", help="only the tables, from the JSON")
    parser.add_argument("--jobs", type=int, default=2, help="at a time, one thread each (2)")
    args = parser.parse_args()
    if not args.render:
        measure(args.jobs)
    render()


def measure(jobs) -> None:
    """Train what is missing, measure what is not yet in claims.json, write it after each."""
    found = read_json(FILE) if FILE.exists() else {}
    found["environment"] = {"torch": torch.__version__, "python": platform.python_version(),
                            "cores": os.cpu_count(), "machine": platform.machine()}
    runs, waiting = plan(), []
    trained(*runs.values(), jobs=jobs)
    with ProcessPoolExecutor(jobs) as pool:
        for b in range(UNITS["SmolLM2"]):
            place = found.setdefault("SmolLM2", {}).setdefault(str(b), {})
            if not place:
                waiting.append((place, "softmax", pool.submit(measure_batch, b)))
        for (lane, attn, seed), run in runs.items():
            place = found.setdefault(lane, {}).setdefault(str(seed), {})
            if attn not in place:
                waiting.append((place, attn, pool.submit(measure_seed, lane, run)))
        for place, attn, job in bar(waiting, "measured"):
            place[attn] = job.result()
            write_json(FILE, found)


if __name__ == "__main__":
    main()
