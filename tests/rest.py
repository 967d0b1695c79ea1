"""Heads that must rest: a sink on an ordinary first token, under five attentions.

    python -m tests.rest              # what is missing: 75 runs of a minute on one core
    python -m tests.rest --render     # only the tables of tests/results/rest.md, from the JSON

The setting is `train.py --size rest`. Data, order and first weights are equal for all runs of a
seed. What is told of a run is the *weight on token 0* that reaches the output: the mean, over the
heads of the last layer, over resting queries and over 1,024 windows, of the attention to token 0
(gated: times the gate, because a head whose gate is shut may look anywhere). Uniform attention
gives 0.11.

Our criteria, written before these seeds were trained; pilots with other seeds had given 0.97
(softmax), 0.17 to 0.32 (headnorm), and next to nothing (gated, sigmoid):

    a run has learned, if its loss at rest is at most LEARNED nats above that of a perfect
    predictor, and its loss at triggers too
    the setting can tell, if under softmax, at the rate of its lowest loss, all seeds have learned
    and every one has a weight of at least 0.9 (rates are now chosen on the other seeds)
    an attention ends the sink, if in every seed that has learned the weight is below twice that of
    uniform attention; it takes most of the sink, if in every such seed it takes at least half of
    what softmax gives token 0 above uniform attention, in windows with triggers and without; it
    does not, if in one seed it takes less than a fifth
    where less than 3 seeds have learned, nothing is said

The chain in five more seeds of softmax, its birth, cuts and forgeries: tests/claims.py.
"""
import math
from statistics import fmean

import torch
import torch.nn.functional as F

import probe
import train
from data.common import environment
from data.runs import read_config
from model import record
from tests import runner
from tests.cures import rank

SEEDS, RATES = range(10, 15), (2.5e-3, 5e-3, 1e-2)
LEARNED = 0.01  # nats above a perfect predictor, at rest and at triggers; train.py: of all, 0.02
FILE, PAGE = runner.RESULTS / "rest.json", runner.RESULTS / "rest.md"


def plan() -> dict:
    jobs = {("environment",): (environment, torch.device("cpu"), 1)}
    for lr in (RATES[1], RATES[0], RATES[2]):  # the middle one first: it is the default
        for attn in ("headnorm", "softmax", "gated", "logit", "sigmoid"):  # what is asked first
            for seed in SEEDS:
                jobs["grid", attn, f"{lr:g}", str(seed)] = (train_and_measure, attn, lr, seed)
    return jobs


# ---------------------------------------------------------------- measuring one run

def train_and_measure(attn, lr, seed) -> dict:
    """A minute of one core."""
    out = f"out/rest/{attn}-{lr:g}-{seed}"
    run = train.Run(attn=attn, size="rest", lr=lr, seed=seed, out=out)
    state = train.train(run, overwrite=True, say=lambda line: None)
    found = measure(state.model.eval(), state.corpus.task)
    enough = read_config(out)["optimal_loss"] + LEARNED
    steps = [row["step"] for row in state.log if row["val_loss"] <= enough]
    return found | {"val_loss": state.log[-1]["val_loss"], "learned at": min(steps, default=None)}


@torch.no_grad()
def measure(model, task, T=16) -> dict:
    """All numbers of a run, in fresh windows; `letters only` are windows without a trigger."""
    generator = torch.Generator().manual_seed(4321)
    x, y = task.batch(1024, T, generator)
    letters = task.rest(1024, T, generator)
    rests = task.resting(x)
    return {"chain": probe.chain(model, x[:256], queries=rests[:256]),
            "rank": rank(model, x[:256]),
            "loss": losses(model, task, x, y),
            "weights": weights(model, task, x),
            "letters only": weights(model, task, letters)}


def losses(model, task, x, y) -> dict:
    """Nats above a perfect predictor, at resting queries and at triggers, from a quarter of the
    window on."""
    log_p = model(x)[0].log_softmax(-1)[..., :len(task.symbols)]
    above = -log_p.mean(-1) - math.log(len(task.symbols))  # all symbols are equally likely
    late = torch.arange(x.shape[1]) >= x.shape[1] // 4
    trigger = (x >= task.K) & late
    hit = log_p.gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return {"rest": above[task.resting(x)].mean().item(), "trigger": -hit[trigger].mean().item()}


def weights(model, task, x) -> dict:
    """Where the heads of the last layer rest: for each head the weight on token 0 that reaches the
    output, its attention to triggers and to its largest key, and which share of what does not go to
    token 0 goes to the two symbols that it likes best; and the mean attention to each position."""
    last = len(model.layers) - 1
    name, rests = f"{last}.pattern", task.resting(x)
    raw = record(model, x, [name])[1][name]  # (N, H, T, T)
    attention = raw / raw.sum(-1, keepdim=True).clamp_min(1e-30)

    def by_head(values):
        """(N, H, T) -> mean over resting queries, a number for each head."""
        return values.transpose(1, 2)[rests].mean(0).tolist()

    trigger = (x >= task.K)[:, None, None].float()
    later = attention.clone()
    later[..., 0] = 0
    symbols = (later @ F.one_hot(x)[:, None].float()).transpose(1, 2)[rests].sum(0)  # (H, V)
    return {"reaching": probe.resting_weight(model, x, rests),
            "triggers": by_head((attention * trigger).sum(-1)),
            "largest": by_head(attention.amax(-1)),
            "two symbols": (symbols.topk(2).values.sum(-1) / symbols.sum(-1)).tolist(),
            "by key": attention.transpose(1, 2)[rests].mean((0, 1)).tolist()}


# ---------------------------------------------------------------- reading the records

def weight(cell, windows="weights") -> float:
    return fmean(cell[windows]["reaching"])


def learned(cell) -> bool:
    return max(cell["loss"].values()) <= LEARNED


def best(found, attn) -> tuple[str, list[dict]]:
    """The rates that are best for the other seeds, and every seed there."""
    return runner.best_for_others(found["grid"][attn], lambda run: sum(run["loss"].values()))


def best_cells(found, attn) -> list[dict]:
    return best(found, attn)[1]


def uniform(T=16) -> float:
    """The weight of uniform attention on token 0, mean over the places where a query may rest."""
    return probe.uniform_sink(T, T // 4)


def taken(ours, softmax, windows="weights") -> float:
    """The share of softmax's sink that an attention takes, in one seed."""
    here, there = weight(ours, windows), weight(softmax, windows)
    return (there - here) / (there - uniform())


def interval(values, decimals=2) -> str:
    """Mean and 95 % interval over seeds."""
    return f"{fmean(values):.{decimals}f} ± {runner.half_interval(values):.{decimals}f}"


def verdict(found, attn) -> str:
    """By the criteria above, at the best rate."""
    ours, softmax = best_cells(found, attn), best_cells(found, "softmax")
    pairs = [(a, b) for a, b in zip(ours, softmax) if learned(a) and learned(b)]
    if len(pairs) < 3:
        return "has not learned"
    if max(weight(a) for a, _ in pairs) < 2 * uniform():
        return "ends it"
    least = min(taken(*pair, windows) for pair in pairs for windows in ("weights", "letters only"))
    if least >= 0.5:
        return "takes most of it"
    return "does not take it" if least < 0.2 else "takes a part"


def price(found) -> str:
    """What each loss is beside softmax's, each at its best rate, in a sentence."""
    said, softmax = [], best_cells(found, "softmax")
    for attn in (attn for attn in found["grid"] if attn != "softmax"):
        pairs = zip(best_cells(found, attn), softmax)
        gaps = [ours["val_loss"] - theirs["val_loss"] for ours, theirs in pairs]
        said.append(f"{attn} {fmean(gaps):+.4f} ± {runner.half_interval(gaps):.4f}")
    return f"Loss over all targets minus softmax's, nats: {', '.join(said)}."


# ---------------------------------------------------------------- the page

def comparison(found) -> str:
    """Every attention at its best rate: mean and 95 % interval over seeds."""
    head = ("", "rate", "learned", "weight on token 0", "in windows of letters only",
            "strongest head", "largest key of a query", "on triggers", "verdict")
    rows = []
    for attn in found["grid"]:
        rates, seeds = best(found, attn)
        able = sum(map(learned, seeds))
        weights = [seed["weights"] for seed in seeds]
        rows.append((
            attn, rates, f"{able} of {len(seeds)}",
            interval([weight(seed) for seed in seeds]),
            interval([weight(seed, "letters only") for seed in seeds]),
            interval([max(w["reaching"]) for w in weights]),
            interval([fmean(w["largest"]) for w in weights]),
            interval([fmean(w["triggers"]) for w in weights]),
            "-" if attn == "softmax" else verdict(found, attn)))
    return runner.markdown(head, rows)


def chain_table(found) -> str:
    """What else there is to see in the same runs."""
    shown = {"sink": "share of its own attention to token 0, strongest head",
             "variance": "variance of z over the median, first layer",
             "norm_ratio": "norm over the median", "dominance": "DomRatio",
             "direction": "cosine between windows", "drain": "length of its value"}
    head = ("", *shown.values(), "effective rank", "loss at rest, nats above perfect",
            "at triggers")
    rows = []
    for attn in found["grid"]:
        seeds = best_cells(found, attn)
        chain = [interval([seed["chain"][key] for seed in seeds]) for key in shown]
        loss = [interval([seed["loss"][key] for seed in seeds], 4) for key in ("rest", "trigger")]
        rows.append((attn, *chain, interval([seed["rank"] for seed in seeds]), *loss))
    return runner.markdown(head, rows)


def places(found, attn, windows="weights") -> list[list[float]]:
    """Where the heads rest at the rate of train.py, a list of seeds each: on token 0, on 1 to 3, on
    later ones, on two symbols, on one key."""
    seeds = [seed[windows] for seed in found["grid"][attn][f"{RATES[1]:g}"].values()]
    parts = [[sum(seed["by key"][part]) for seed in seeds]
             for part in (slice(1), slice(1, 4), slice(4, None))]
    return parts + [[fmean(seed[key]) for seed in seeds] for key in ("two symbols", "largest")]


def where_table(found) -> str:
    """At the rate of train.py: how fast each learns, and where its heads rest."""
    head = ("", "learned at step", "token 0", "tokens 1 to 3", "later tokens",
            "of these, on two symbols", "largest key of a query")
    rows, apart = [], []
    for attn, rates in found["grid"].items():
        steps = [str(seed["learned at"]) for seed in rates[f"{RATES[1]:g}"].values()]
        there, alone = (places(found, attn, kind) for kind in ("weights", "letters only"))
        rows.append((attn, ", ".join(steps), *map(interval, there)))
        apart += [abs(fmean(a) - fmean(b)) for a, b in zip(there, alone)]
    return (f"{runner.markdown(head, rows)}\n\nIn windows of letters only no mean differs by more "
            f"than {max(apart):.2f}.")


def grid_table(found) -> str:
    """The weight on token 0 at every rate."""
    def cell(attn, lr):
        seeds = found["grid"][attn][f"{lr:g}"].values()
        return interval([weight(seed) for seed in seeds])
    return runner.grid(("", *map(str, RATES)), found["grid"], RATES, cell)


def tables(found) -> dict[str, str]:
    return {"rest": comparison(found), "price": price(found), "chain": chain_table(found),
            "where": where_table(found), "grid": grid_table(found)}


if __name__ == "__main__":
    runner.main("rest", __doc__, FILE, plan(), lambda found: runner.fill_page(PAGE, tables(found)))
