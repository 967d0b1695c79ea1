"""Every claim of the paper and every open question, measured: one real Llama, and toys.

    python -m tests.claims              train and measure what is missing, then write the tables
    python -m tests.claims --render     only the tables, from the committed JSON

`SmolLM2` is one trained model, so it has no seeds: its spread is that of 8 or 16 disjoint batches
of 8 windows of 64 tokens (in text 8, or 16 of 4 windows), random ones unless a line says text. The
others are five seeds each of models that train.py makes: `rest` is the default (heads that must
rest, read at the queries that do), `cures` its cures beside it, in five other seeds, from
rest.json, `text` is `--size tiny` (each window starts with <|bos|>, which a head can know by its
embedding), `micro` is copying (read in windows of random symbols, where nothing is to be copied).
Token k is token 10, in rest 6 (Q8: 5); the middle token is 32, in rest 8.

The hypotheses and margins in claims.csv were written down before they were measured; `place` says
where in the JSON a number stands (`value_at`). A test holds in a batch (or seed) or it does not:
*shown* means in every one, *partly* in at least half, *not here* else. A claim is shown when all
its tests are, and partly when any is at least partly.
"""

import csv
import itertools
import math
import operator
import re
import textwrap
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from statistics import fmean, median, stdev

import torch

import probe
import train
from chapters import lesson
from data.common import environment, read_json
from data.runs import read_log
from data.windows import english, random_windows, text_windows
from model import GPT, record
from tests import cures, rest, retrofit, runner, unmixed, why

FILE, HYPOTHESES = runner.RESULTS / "claims.json", runner.RESULTS / "claims.csv"
PAGES = (Path("README.md"), runner.RESULTS / "claims.md")
ATTENTIONS = ("softmax", "headnorm", "sigmoid", "gated")  # of text; of micro: tests/cures.py
LANES = {"SmolLM2": 16, "rest": 5, "cures": 5, "text": 5, "micro": 5}  # batches, seeds
K, T, REST_K = 10, 64, 6  # the token of a forgery, of so many; in windows of rest, of 16


def plan() -> dict:
    """{path into claims.json: (function, arguments)}"""
    jobs = {("environment",): (environment, torch.device("cpu"), 1)}
    for path, (kind, measure, batches) in PARTS.items():
        for batch in range(batches):
            jobs["SmolLM2", str(batch), *path] = (measure_batch, kind, measure, batch)
    for seed in range(5):
        for attn in ATTENTIONS:
            run = train.Run(attn, "tiny", seed=seed, out=f"out/claims/text-{attn}-{seed}")
            jobs["text", str(seed), attn] = (measure_seed, "text", run)
        run = train.Run(size="micro", seed=seed, out=f"out/cures/softmax-0.005-{seed}")
        jobs["micro", str(seed), "softmax"] = (measure_seed, "micro", run)
        jobs["micro", str(seed), "unmixed"] = (unmixed_seed, run)
        run = train.Run(size="rest", seed=seed, out=f"out/claims/rest-softmax-{seed}")
        jobs["rest", str(seed), "softmax"] = (rest_seed, run)
        jobs["rest", str(seed), "unmixed"] = (unmixed_seed, run)
    return jobs


# ---------------------------------------------------------------- measuring one batch or seed

def numbers(model, x, y, queries=None):
    """The chain of token 0 and of the ordinary token T / 2: {first, ordinary}."""
    both, loss = probe.layers(model, x, ks=(0, x.shape[1] // 2), y=y, queries=queries)
    first, ordinary = (probe.summary(found) for found in both)
    ratio = both[0]["dominance"] / both[1]["dominance"]  # (L,)
    return {"first": first | {"loss": loss}, "ordinary": ordinary,
            "DomRatio by layer": {"median": ratio.median().item(), "largest": ratio.max().item()},
            "tau of layer 0": both[0]["wo_tau"][0].item()}


def effects(model, x, y, k=K, names=(), queries=None):
    """Every cut and forgery: {"cut neurons": {share, controls, before, after}}, the last two being
    the attention of the strongest head to the token that is cut or forged."""
    found = {}
    for row in probe.cuts(model, x, y, k, names=names, queries=queries):
        name, at = f"{row['kind']} {row['link']}", int(row["token"] != 0)
        if row["control"]:
            found[name]["controls"].append(probe.share(row, T))
        else:
            found[name] = {"share": probe.share(row, T), "controls": [],
                           "before": row["before"][at]["sink"], "after": row["after"][at]["sink"]}
    return found


@torch.no_grad()
def agreement(model, x, k=K, queries=None):
    """Q7. The first layer's z_k is given one mean and, head by head, one variance over windows:

        z_k = mean + d,   d being the deviation that a token has which sees only itself,
        or the same with each head's part taken from another window: heads that disagree (of
        SmolLM2's nine heads, in eight windows, one keeps its own and two share one)

    -> attention to k of the strongest head, for both."""
    T = x.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool)
    mask[k] = torch.arange(T) == k
    free, own = (record(model, x, ["0.z"], mask=m)[1]["0.z"][:, k] for m in (None, mask))
    d = own - own.mean(0)  # (N, H, D)
    apart = [d[:, h].roll(h + 1, 0) for h in range(d.shape[1])]
    deviations = {"one token": d, "heads apart": torch.stack(apart, 1)}
    found = {}
    for name, deviation in deviations.items():
        z = free.mean(0) + deviation
        edit = probe.at_token(k, lambda _, z=z: z)
        tap = probe.make_tap(model.cfg, {"0.z": edit})
        found[name] = probe.chain(model, x, tap, k, queries=queries)["sink"]
    return found


@torch.no_grad()
def screen(model, x):
    """In the layer where the neurons' contrast at token 0 is largest: how many of the TOP most
    active there are among the TOP by weights alone."""
    contrast = probe.layers(model, x)[0][0]["neuron_contrast"]
    layer = contrast.argmax().item()
    active = probe.targets(model, x)[0].neurons[layer]
    by_weight = probe.weight_score(model.layers[layer]).topk(probe.TOP).indices
    common = set(active.tolist()) & set(by_weight.tolist())
    return {"layer": layer, "overlap": len(common) / probe.TOP}


@torch.no_grad()
def rows_that_write(model, x):
    """The other reading of claim 3: Kendall tau between the spread of each dimension of the state
    that a layer adds to and the length of the row of W_O that writes into it, mean over layers.
    (The spread of the output of W_O would prove nothing: a long row makes a large output.)"""
    names = [f"{i}.resid_pre" for i in range(len(model.layers))]
    kept = record(model, x, names)[1]
    taus = []
    for block, state in zip(model.layers, kept.values()):
        length = block.self_attn.o_proj.weight.float().norm(dim=1)
        taus.append(probe.kendall_tau(state.flatten(0, 1).std(0), length).item())
    return fmean(taus)


@cache
def real():
    """SmolLM2, the batches of each kind of windows that it reads, and the mean z of a token of that
    kind that sees only itself. English has 16 batches of 4 windows where it has not 8 of 8."""
    model, encoding = lesson.real()
    model.requires_grad_(False)
    V, ids = model.cfg.vocab_size, torch.tensor(encoding.encode_ordinary(english()))
    windows = {"random": [random_windows(8, T, V, seed=b) for b in range(LANES["SmolLM2"])],
               "text": text_windows(ids, 8, 8, T), "short text": text_windows(ids, 16, 4, T)}
    tokens = {"random": random_windows(4096, 2, V, seed=4096)[0][:, 0], "short text": ids}
    return model, windows, tokens


@cache
def unmixed_mean(kind):
    """Half a minute."""
    model, _, tokens = real()
    return unmixed.mean_alone(model, tokens[kind])


def measure_batch(kind, measure, b):
    """One of PARTS in one batch of SmolLM2."""
    model, windows, _ = real()
    return measure(model, *windows[kind][b])


def no_targets(measure, model, x, y):
    return measure(model, x)


def with_mean(measure, kind, model, x, y):
    return measure(model, x, unmixed_mean(kind), K)


forged_at = partial(effects, names=("forge variance", "forge W_O"))
controls = partial(no_targets, partial(unmixed.neurons_at_0, k=K))
PARTS = {  # of SmolLM2, {path into the record of a batch: (windows, function, number of batches)}
    ("softmax", "random"): ("random", numbers, 16),
    ("softmax", "text"): ("text", numbers, 8),
    ("softmax", "effects"): ("random", effects, 8),
    ("softmax", "effects in text"): ("text", effects, 8),
    ("softmax", "effects at 20"): ("random", partial(forged_at, k=20), 8),
    ("softmax", "effects at 40"): ("random", partial(forged_at, k=40), 8),
    ("softmax", "agreement"): ("random", partial(no_targets, agreement), 8),
    ("softmax", "screen"): ("random", partial(no_targets, screen), 8),
    ("softmax", "tau of rows"): ("random", partial(no_targets, rows_that_write), 8),
    ("answers",): ("random", partial(with_mean, unmixed.answers, "random"), 16),
    ("answers in text",): ("short text", partial(with_mean, unmixed.answers, "short text"), 16),
    ("unmixed",): ("random", partial(with_mean, unmixed.shares, "random"), 16),
    ("unmixed in text",): ("short text", partial(with_mean, unmixed.shares, "short text"), 16),
    ("neurons at 0",): ("random", controls, 16),
    ("neurons at 0 in text",): ("short text", controls, 16)}


def measure_seed(lane, run):
    """One seed of a toy, one attention. `main` are the windows in which its sink is read."""
    model, corpus, settings = cures.opened(run)
    log, untrained = read_log(run.out), GPT(model.cfg, seed=run.seed).eval()

    def held_out(bos):
        return corpus.batch(32, T, torch.Generator().manual_seed(0), "val", bos)

    if lane == "text":
        random, main, links = random_windows(32, T, corpus.bos), held_out(1.0), "links_bos"
    else:
        random = main = corpus.rest(32, T, torch.Generator().manual_seed(0))
        links = "links_rest"
    birth = [{"step": row["step"], "val_loss": row["val_loss"]} | row[links] for row in log]
    found = {"main": numbers(model, *main), "random": numbers(model, *random),
             "text": numbers(model, *held_out(0.0)), "untrained": numbers(untrained, *random),
             "val_loss": log[-1]["val_loss"], "lr": settings["lr"], "birth": birth}
    if lane == "text":
        found["loss at 1024"] = loss_at(model, corpus, 1024) - loss_at(model, corpus, T)
    if run.attn in ("softmax", "gated"):
        found |= experiments(model, *main)
    return found


def experiments(model, x, y, k=K, queries=None):
    """What else is asked of a toy, in the windows in which its sink is read."""
    return {"effects": effects(model, x, y, k, queries=queries), "screen": screen(model, x),
            "agreement": agreement(model, x, k, queries),
            "tau of rows": rows_that_write(model, x)}


def rest_seed(run):
    """One seed of the default, softmax, read at the queries that rest."""
    model, corpus, settings = cures.opened(run)
    x, y = corpus.task.batch(256, settings["seq_len"], torch.Generator().manual_seed(0))
    queries, untrained = corpus.task.resting(x), GPT(model.cfg, seed=run.seed).eval()
    birth = [{"step": row["step"]} | row["links_rest"] for row in read_log(run.out)]
    main = numbers(model, x, y, queries)
    return {"main": main, "random": main, "untrained": numbers(untrained, x, y, queries),
            "birth": birth} | experiments(model, x, y, REST_K, queries)


def unmixed_seed(run):
    """`unmixed.shares` of one seed of a task whose first token is an ordinary one. (`text` begins
    with <|bos|>: its z_0 never varies, and the sink is there.)"""
    model, corpus, settings = cures.opened(run)
    generator, length = torch.Generator().manual_seed(0), settings["seq_len"]
    if corpus.name == "copy":
        x, queries = corpus.rest(32, length, generator)[0], None
        first = corpus.rest(4096, 2, generator)[0][:, 0]
    else:
        x, _ = corpus.task.batch(256, length, generator)
        queries, first = corpus.task.resting(x), torch.arange(corpus.task.K)
    k = K if length == T else length // 4 + 1
    return unmixed.shares(model, x, unmixed.mean_alone(model, first), k, queries)


@torch.no_grad()
def loss_at(model, corpus, length, tokens=16384):
    """Validation loss in windows of another length than that of training."""
    generator = torch.Generator().manual_seed(1)
    x, y = corpus.batch(tokens // length, length, generator, "val", 1.0)
    return fmean(model(*part)[1].item() for part in zip(x.split(16), y.split(16)))


# ---------------------------------------------------------------- reading the records

def units(found, lane) -> list[dict]:
    """The records of each batch or seed of a lane, {attn: record}, each `ready`."""
    there = found.get(lane, {})
    return [{name: ready(record) for name, record in there[unit].items()} for unit in sorted(there)]


def of_rest() -> dict:
    """The seeds of rest.json as those of claims.json, each attention at its best rate."""
    found = read_json(rest.FILE)
    cells = {attn: rest.best_cells(found, attn) for attn in found["grid"]}
    return {str(i): {attn: {"first": seeds[i]["chain"], "val_loss": seeds[i]["val_loss"]}
                     for attn, seeds in cells.items()} for i in range(len(rest.SEEDS))}


def ready(record) -> dict:
    """A record in which `value_at` finds its places: on top `first` and `ordinary` of the windows
    in which the sink is read; every effect, with its strongest control, and nan for all shares
    where there is no sink to share; and `half`, when a number has gone half of its way."""
    found = record | record.get("main", record.get("random", {}))
    has_sink = found.get("first", found).get("sink", 1) > probe.SINK
    if "forge, every: both" in record and not has_sink:  # of `unmixed.shares`
        return dict.fromkeys(record, math.nan)
    nothing = {"share": math.nan, "controls": [math.nan, math.nan], "control": math.nan}
    for name, effect in record.get("effects", {}).items():
        found[name] = effect | ({"control": max(effect["controls"])} if has_sink else nothing)
    if "birth" in record:
        found["half"] = {key: runner.half_time(record["birth"], key) for key in
                         ("sink", "lock_gap", "norm_ratio", "neuron_contrast")}
    return found


OPERATIONS = {" minus ": operator.sub, " over ": operator.truediv}


def value_at(unit, place) -> float:
    """The number at a place in a record, as in "first.sink" or, where it is not softmax's,
    "sigmoid.val_loss"; or "a minus b" or "a over b" of two places."""
    for word, apply in OPERATIONS.items():
        if word in place:
            a, b = place.split(word)
            return apply(value_at(unit, a), value_at(unit, b))
    keys = place.split(".")
    value = unit if keys[0] in unit else unit["softmax"]
    for key in keys:
        value = value[int(key) if isinstance(value, list) else key]
    return value


def values_of(found, lane, place) -> list[float]:
    """Of all batches or seeds in which it was measured."""
    values = []
    for unit in units(found, lane):
        with suppress(KeyError):
            values.append(value_at(unit, place))
    return values


def with_sink_only(values) -> list[float]:
    """Without the batches or seeds that have no sink."""
    return [v for v in values if math.isfinite(v)]


# ---------------------------------------------------------------- verdicts

def judge(values, kind, margin):
    """How many values are "at least" or "at most" the margin, and the word for it."""
    holds = operator.ge if kind == "at least" else operator.le
    held = sum(holds(v, margin) for v in values)
    if held == len(values):
        return held, "shown"
    return held, "partly" if 2 * held >= len(values) else "not here"


def tests_of(found) -> list[dict]:
    """Every hypothesis in every lane: {claim, measure, lane, margin, values, held, word}."""
    with HYPOTHESES.open(encoding="utf-8") as file:
        hypotheses = list(csv.DictReader(file))
    found, rows = found | {"cures": of_rest()}, []
    for claim in hypotheses:
        kind = "at least" if claim["at least"] else "at most"
        for lane in claim["lanes"].split():
            values = values_of(found, lane, claim["place"])
            if not values:  # not measured yet
                continue
            held, word = judge(values, kind, float(claim[kind]))
            rows.append(claim | {"lane": lane, "margin": f"{kind} {claim[kind]}",
                                 "values": values, "held": held, "word": word})
    return rows


def word_of(tests) -> str:
    """shown, partly or not here, of all tests of a claim in one lane."""
    words = {t["word"] for t in tests}
    return words.pop() if len(words) == 1 and words != {"partly"} else "partly"


def in_words(values, lane) -> str:
    """Mean and spread; median and range of numbers that span more than a decade or pass 1,000."""
    there = with_sink_only(values)
    without = len(values) - len(there)
    if not there:
        return "no sink"
    least, most = min(there), max(there)
    if least > 0 and (most > 10 * least or most > 1000):
        middle, least, most = map(probe.digits, (median(there), least, most))
        text = f"median {middle} ({least} to {most})"
    else:
        words = runner.mean_std_words if lane == "SmolLM2" else runner.interval_words
        text = words(there)
    return text + (f", {without} without a sink" if without else "")


def claim_table(tests) -> str:
    """The tests of a claim, a row each; its verdict in each lane stands in the head."""
    lanes = [lane for lane in LANES if any(t["lane"] == lane for t in tests)]
    head, rows = ["measured", "holds if"], {}
    for lane in lanes:
        word = word_of([t for t in tests if t["lane"] == lane])
        head.append(f"{lane}: {word}")
    for t in tests:
        row = rows.setdefault(t["measure"], [t["measure"], t["margin"], *["-"] * len(lanes)])
        held, ties = f"{t['held']} of {len(t['values'])}", t["values"].count(0)
        tied = f", {ties} tied" if t["claim"] == "Q1" and ties else ""
        row[2 + lanes.index(t["lane"])] = f"{in_words(t['values'], t['lane'])}; {held}{tied}"
    return runner.markdown(head, rows.values())


def evaluations(found) -> str:
    """When the seeds of Q1 were looked at."""
    looks = [len(found[lane]["0"]["softmax"]["birth"]) for lane in ("micro", "rest")]
    return (f"`text` and `micro` were looked at {looks[0]} times, `rest` {looks[1]} times: a "
            "difference of less than the distance of two looks is not seen, and equal steps "
            "(*tied*) count as held.")


def chain_table(found) -> str:
    """The README's table: a row for each link of SmolLM2 that is cut and forged."""
    head = ("link", "cut", "share taken", "control", "forged", "share", "control", "cut; forged")
    rows = []
    sink = fmean(values_of(found, "SmolLM2", "first.sink"))
    for link in (link for link in probe.LINKS if link.cut):  # these can be forged, too
        cells, words = [f"**{link.name}**"], []
        for kind in ("cut", "forge"):
            share, control = (values_of(found, "SmolLM2", f"{kind} {link.name}.{key}")
                              for key in ("share", "control"))
            cells += [getattr(link, kind).says, percent(share, "SmolLM2"), f"{fmean(control):.0%}"]
            verdict = {"kind": kind, "share": fmean(share), "controls": [(fmean(control), 0)]}
            words.append(probe.judge(verdict, sink))
        rows.append([*cells, "; ".join(words)])
    return runner.markdown(head, rows)


def links_table(found) -> str:
    """A row for each link: SmolLM2 as it is, `rest` and `micro` cut and forged, with controls."""
    head = ["link", "SmolLM2, first token (an ordinary one)"]
    for lane in ("rest", "micro"):
        head += [f"{lane}, {word}" for word in ("cut", "its control", "forged", "its control")]
    rows = []
    for link in probe.LINKS:
        headline = link.numbers[0]
        first, ordinary = (fmean(values_of(found, "SmolLM2", f"{token}.{headline.key}"))
                           for token in ("first", "ordinary"))
        cells = [f"**{link.name}**: {headline.says}",
                 f"{probe.digits(first)} ({probe.digits(ordinary)})"]
        for lane, kind, key in itertools.product(("rest", "micro"), ("cut", "forge"),
                                                 ("share", "control")):
            values = values_of(found, lane, f"{kind} {link.name}.{key}")
            cells.append(percent(values, lane) if values else "-")
        rows.append(cells)
    return runner.markdown(head, rows)


def percent(values, lane) -> str:
    there = with_sink_only(values)
    spread = stdev if lane == "SmolLM2" else runner.half_interval
    mean = round(fmean(there), 2) + 0.0  # no -0 %
    return f"{mean:.0%} ± {spread(there):.0%}"


BORN = {"variance": "variance of z", "variance_out": "variance after W_O",
        "direction": "direction", "drain": "value", "sink": "sink", "lock_gap": "lock",
        "norm_ratio": "length of the state", "neuron_contrast": "neurons"}


def birth_table(found) -> str:
    """When does each number of `rest` move? Ordered by the median step."""
    births, rows = [seed["softmax"]["birth"] for seed in found["rest"].values()], []
    for key, name in BORN.items():
        first, last = (fmean(birth[at][key] for birth in births) for at in (0, -1))
        steps = [runner.half_time(birth, key) for birth in births]
        rows.append((median(steps), (name, probe.digits(first), probe.digits(last),
                                     f"{median(steps)} ({min(steps)} to {max(steps)})")))
    head = ("number at token 0", "untrained", "at the end", "step at half of its way")
    return runner.markdown(head, [row for _, row in sorted(rows)])


FOUND = """
**In a real Llama a handful of neurons a layer carries the sink.** Silence five of the 1,536 neurons
of each layer of SmolLM2 at the first token, and its sink is gone ({cut neurons.share %} ± {cut
neurons.share sd} of it: less than uniform attention is left); the next tokens get that attention.
Silence all others there instead, and it loses {neurons at 0.all others %} ± {neurons at 0.all
others sd} ([chapter 03](chapters/book/03.md)).

**A value that was not mixed with others forges one.** A token of SmolLM2 whose z is the *mean* of
tokens that see only themselves gets {unmixed.forge, every: mean only %} ± {unmixed.forge, every:
mean only sd} of the two sinks: variance, the paper's reason, is not needed to forge one. (In our
copying model it is; in the default model mean and deviation each forge a weak one: [chapter
06](chapters/book/06.md).)

**Not every link holds.** Giving the first token the RMS of the others before W_O takes {cut
W_O.share %} ± {cut W_O.share sd} of the sink, and in the first layer, on random tokens, W_O weakens
the outlier that it is said to pass on: {outlier} times the median before, {outlier after W_O} after
([claim by claim](tests/results/claims.md)).

**Where heads must rest, sigmoid ends the sink, and headnorm takes a part or most of it.** Where
they rest, the last layer's heads give the first token {softmax} of their attention under softmax,
{headnorm} under headnorm (ten seeds; {headnorm at best} in five seeds at its best learning rate, at
a loss hardly above softmax's), uniform attention 0.11; sigmoid, or softmax with one learned logit
more in its denominator, none, at a lower loss. Neither of headnorm's two effects, equal variance
and no silent output, explains that alone ([chapter 07](chapters/book/07.md)).

**Built into a finished model headnorm costs loss and need not last, and a sink may have a use.**
After 500 steps of retraining, SmolLM2 with headnorm has a sink in {left} of the heads on random
tokens and in {left in text} in Python code, in {orders} orders of the batches ([the
cures](tests/results/cures.md)), at {price} nats of loss; its control in {control left} and {control
left in text}, at {control price}; SmolLM2 trained on unchanged in {whole} and {whole in text}.
Sigmoid ({sigmoid price} nats) ends it in one of two orders, and in the dearer one it has not
healed; a learned logit costs hardly anything and leaves two fifths of it or more. Where heads count
positions from the first token, every attention tried goes on using it, and headnorm does not end
the sink.
"""  # for the README; what stands in braces is a `value_at`, of SmolLM2 where it names no lane

IN_FULL = """
**A real Llama shows most of the chain.** In SmolLM2, on random tokens, the first token's z varies
{outlier} times as much as the median (first layer, ± over batches), its state is up to
{first.norm_ratio} times as long, and {first.sink_rate %} of all heads have a sink on it. Cutting
what it averages, its neurons, its direction or its key takes {cut variance.share %}, {cut
neurons.share %}, {cut direction.share %} and {cut lock.share %} of the sink; the controls of these
four take at most 4%. (Disparity: {cut disparity.share %}, its control {cut disparity.control %};
W_O: {cut W_O.share %}.)

**A handful of neurons carries it.** (Others silenced the whole first MLP at that token: arXiv
2510.06477.) With five of 1,536 a layer silent at that one token it has no sink; the next tokens
take it over. With all *others* silent it loses {neurons at 0.all others %}, without the next five
by write {neurons at 0.6 to 10 %}, and with the write of the five turned to a random direction of
the same length {neurons at 0.turned %}. (Five of like weight take nothing, but they write only
{like carries} of the squared length that the top five write.) What happens if these are drawn anew
and the training goes on: [the cures](cures.md).

**An unmixed value forges a sink; to forge one in SmolLM2, variance is not needed.** A token that
sees only itself gets {forge variance.share %} of the two sinks. It gets {unmixed.forge, every: mean
only %} when its z is but the *mean* of tokens that see only themselves, so that nothing varies, and
{unmixed.forge, every: deviation only %} when it has the usual mean and its own deviation. Given to
token 0, that mean takes {unmixed.cut, every: mean only %} of the sink, and the usual mean with its
own deviation {unmixed.cut, every: deviation only %}. The paper says variance: amplified it gives
{forge W_O.share %}, shifted to the same length {forge W_O.controls.0 %}, scaled {forge
W_O.controls.1 %}. In our own models it is not so clear: where heads must rest the mean alone gives
{rest: unmixed.forge, every: mean only %}, the deviation alone {rest: unmixed.forge, every:
deviation only %} and neither {rest: unmixed.forge, every: neither %}; in copying only the deviation
does it ({copying}). More models, not quantised, would settle it.

**Not everything holds.** In SmolLM2, in the mean over layers, the columns of W_O do not favour the
dimensions of high variance (Kendall tau {first.wo_tau}, the paper 0.32), in the first layer they do
({tau of layer 0}, in text {text.tau of layer 0}); nor do long rows write into dimensions of the
state that vary much ({tau of rows}). In the first layer W_O weakens the outlier that it is said to
pass on ({first.variance} times the median before it, {first.variance_out} after, in text
{text.first.variance} and {text.first.variance_out}). Giving the first token the others' RMS before
W_O takes only {cut W_O.share %} of the sink. Its fixed direction is its own (cosine
{first.direction_own} less what all states share, an ordinary token {ordinary.direction_own}), its
large DomRatio less so: in the median layer {DomRatio by layer.median} times that of an ordinary
token, where it is largest {DomRatio by layer.largest} times.

**What the cures do**, and at what price: where heads must rest, [rest](rest.md); in copying, in
text and in a finished Llama, [the cures](cures.md).
"""  # the same for claims.md


def findings(found, paragraphs) -> str:
    """FOUND or IN_FULL with its numbers, means over batches or seeds."""
    def fill_in(braces):
        lane, place, how = braces.groups()
        values = with_sink_only(values_of(found, lane or "SmolLM2", place))
        mean = fmean(values)
        if how:
            return f"{mean if how == ' %' else stdev(values):.0%}"
        return probe.digits(mean) if abs(mean) >= 1 else f"{round(mean, 2) + 0.0:.2f}"

    words, lines = other_numbers(found), []
    for text in paragraphs.strip().split("\n\n"):
        text = " ".join(text.split())
        for name, says in words.items():
            text = text.replace(f"{{{name}}}", says)
        text = re.sub(r"\{(?:(\w+): )?(.+?)( %| sd)?\}", fill_in, text)
        lines.append(textwrap.fill("- " + text, 100, subsequent_indent="  ",
                                   break_long_words=False, break_on_hyphens=False))
    return "\n".join(lines)


def other_numbers(found) -> dict[str, str]:
    """The numbers of FOUND and IN_FULL that are no `value_at`: of other JSON, or in words."""
    rebuilt, of_why = read_json(retrofit.FILE), read_json(why.FILE)
    of = partial(values_of, found, "SmolLM2")

    def weight(seeds):
        return rest.interval([rest.weight(seed) for seed in seeds])

    words = {"like carries": f"{fmean(of('neurons at 0.like carries')):.2%}",
             "outlier": runner.mean_std_words(of("first.variance")),
             "outlier after W_O": runner.mean_std_words(of("first.variance_out")),
             "softmax": weight(why.runs(of_why, "softmax")),
             "headnorm": weight(why.runs(of_why, "headnorm")),
             "headnorm at best": weight(rest.best_cells(read_json(rest.FILE), "headnorm")),
             "copying": copying(found),
             "orders": str(len(retrofit.in_orders(rebuilt, "headnorm")))}
    for name, model in (("left", "headnorm"), ("control left", "scaled"), ("whole", "softmax")):
        words[name] = retrofit.shares(rebuilt, model)
        words[f"{name} in text"] = retrofit.shares(rebuilt, model, "text")
    for name, model in (("price", "headnorm"), ("control price", "scaled"),
                        ("sigmoid price", "sigmoid")):
        words[name] = retrofit.prices(rebuilt, model)
    return words


def copying(found) -> str:
    """What forges a sink in the copying model, mean and deviation, in words."""
    shares = []
    for part in ("mean only", "deviation only"):
        values = with_sink_only(values_of(found, "micro", f"unmixed.forge, every: {part}"))
        shares.append(f"{fmean(values):.0%}")
    return f"{len(values)} seeds with a sink: {' and '.join(shares)}"


def tables(found) -> dict[str, str]:
    """All blocks of the README and of claims.md, one for each claim among them."""
    blocks = {"found": findings(found, FOUND), "in full": findings(found, IN_FULL),
              "chain": chain_table(found), "links": links_table(found),
              "birth": birth_table(found),
              "evaluations": evaluations(found)}
    tests = tests_of(found)
    for claim in dict.fromkeys(t["claim"] for t in tests):
        blocks[claim] = claim_table([t for t in tests if t["claim"] == claim])
    return blocks


def render(found) -> None:
    blocks = tables(found)
    for path in PAGES:
        runner.fill_page(path, blocks)


if __name__ == "__main__":
    runner.main("claims", __doc__, FILE, plan(), render)
