"""Which cures work where a cure can be seen: every attention at every learning rate, five seeds.

    python -m tests.cures             # trains and measures what is missing: seven hours of one core
    python -m tests.cures --render    # only the tables of tests/results/cures.md, from the JSON

The setting is `--size micro`: copying, ordinary first tokens. Data, order and first weights are
equal for all runs of a seed. What was asked for, written when two of the runs had been seen
(softmax and gated, 0.005, seed 0):

    the setting can tell, if under softmax SINK is passed in 4 of 5 seeds, and under gated
    attention, a cure that is known to work (arXiv 2505.06708), in none, at the same learning rate
    and at each one's best, and all of these runs have learned
    a run has learned, if its loss is at most LEARNED above that of a perfect predictor
    a cure works, if under it SINK is passed in no seed that has learned

Seen in the first five seeds: at step 889 there was a sink under softmax and headnorm, and none
under gated and sigmoid. Written before fresh seeds (FRESH) were run to that step:

    SINK is passed under softmax and under headnorm in 4 of 5 seeds at least, under gated and under
    sigmoid in none

LONG is the paper's own setting, as far as an hour of one core goes: text, windows from any place,
no <|bos|>. Written when seed 0 of softmax and gated had been seen to step 8,308 (sinks 0.15 and
0.13, states 2.5 and 1.3 times as long as the median). Of headnorm an unfinished run was known (at
step 27,000 a sink of 0.31, softmax 0.25, in a smaller evaluation):

    at the end the strongest head gives token 0 at least 0.25 under softmax, and under gated at most
    half of what it gives under softmax; its state is at least twice as long as the median under
    softmax, and at most 1.5 times under gated
    headnorm cures, if it stays below the same two margins as gated; it does not, if it reaches
    those of softmax
"""
import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import probe
import train
from chapters import figures
from chapters.lesson import trained
from data.common import bar, read_json, write_json
from model import ATTENTIONS, Attention, record
from tests.pages import fill_page, markdown, mean_std

SEEDS, RATES = range(5), (2.5e-3, 5e-3, 1e-2, 2e-2)
SINK, LEARNED, REACHED = probe.SINK, 0.25, 1.6  # attention; nats above perfect; nats
EARLY, FRESH = 889, range(5, 10)
LONG = dict(size="tiny", bos=0.0, hidden_size=96, intermediate_size=256, seq_len=128, lr=2.5e-3,
            steps=36000, evals=24, threads=1)
LONG_PLAN = [("softmax", 0), ("gated", 0), ("headnorm", 0)]  # attention, seed
T = 64
RESULTS = Path("tests/results")
FILE, PAGE, FIGURE = (RESULTS / name for name in ("cures.json", "cures.md", "cures_long.png"))


def run_of(attn, lr, seed) -> train.Run:
    run = train.Run(attn=attn, size="micro", lr=lr, seed=seed)
    return train.resolve(replace(run, out=f"out/cures/{attn}-{lr:g}-{seed}"))


# ---------------------------------------------------------------- headnorm, taken apart

def frozen_gain(self, cfg):
    """Headnorm without its gain."""
    whole_init(self, cfg)
    self.z_norm.weight.requires_grad_(False)


def large_eps(self, cfg):
    """z / sqrt(mean z^2 + 1): a short z stays short, so that a drained value is a no-op again."""
    whole_init(self, cfg)
    self.z_norm.eps = 1.0


def all_heads_at_once(self, q, k, v, x, bias, tap):
    """One norm over the heads of a layer: a head may be silent, if another is not."""
    z = softmax_mix(self, q, k, v, x, bias, tap)
    return self.z_norm.weight * F.rms_norm(z, z.shape[-2:], eps=1e-5)


def values_instead(self, q, k, v, x, bias, tap):
    """The norm on each value, before they are averaged: no value is drained, and z keeps its
    variance discrepancy."""
    return softmax_mix(self, q, k, self.z_norm(v), x, bias, tap)


def softmax_mix(self, *args):
    with mock.patch.object(self, "attn", "softmax"):
        return whole_mix(self, *args)


whole_init, whole_mix = Attention.__init__, Attention.mix
VARIANTS = {  # of headnorm: what is replaced in Attention, and by what
    "without gain": ("__init__", frozen_gain),
    "eps = 1": ("__init__", large_eps),
    "all heads at once": ("mix", all_heads_at_once),
    "on the values": ("mix", values_instead),
}
VARIANT_RATE, VARIANT_SEEDS = 1e-2, range(3)


def train_variant(name, seed):
    """Train and measure one of VARIANTS."""
    run = run_of("headnorm", VARIANT_RATE, seed)
    run.out = f"out/cures/{name.replace(' ', '_')}-{seed}"
    with mock.patch.object(Attention, *VARIANTS[name]):
        return train_and_measure(run)


def train_and_measure(run) -> dict:
    """Two minutes on one core."""
    result = train.train(run, overwrite=True, say=lambda text: None)
    return measure(result.model, result.corpus, result.log)


# ---------------------------------------------------------------- measuring one run

def early(attn, seed) -> dict:
    """The sink after the first EARLY steps of a training, 30 seconds on one core."""
    run = train.Run(attn=attn, size="micro", seed=seed, steps=EARLY, evals=1)
    run.out = f"out/cures/early-{attn}-{seed}"

    def usual(step, run, rate=train.learning_rate):  # as if it went on
        return rate(step, replace(run, steps=train.SIZES["micro"]["steps"]))

    with mock.patch.object(train, "learning_rate", usual):
        result = train.train(run, overwrite=True, say=lambda text: None)
    rest = result.corpus.task.rest(64, T, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return {"chain": probe.chain(result.model, rest), "ruler": ruler(result.model, rest),
                "val_loss": result.log[-1]["val_loss"]}


def long(attn, seed) -> dict:
    """One run of LONG, 50 minutes of one core; it goes on where it was stopped. Its log, and at the
    end, in 4 x 64 held-out windows, the chain, the effective rank of the states and `lookup`; and
    the loss on 2,048 windows."""
    out = f"out/cures/long-{attn}-{seed}"
    trained(train.Run(**LONG, attn=attn, seed=seed, out=out), jobs=1)
    torch.set_num_threads(1)
    (model, corpus, _), rows = train.load_run(out), train.read_log(out)
    length = LONG["seq_len"]
    generator = torch.Generator().manual_seed(0)
    chains, ranks, read = [], [], []
    with torch.no_grad():
        for _ in range(4):
            x, _ = corpus.batch(64, length, generator, "val", 0.0)
            chains.append(probe.chain(model, x))
            ranks.append(ranks_of(model, x))
            read.append(lookup(model, x))
        losses = [model(*corpus.batch(64, length, generator, "val", 0.0))[1].item()
                  for _ in range(32)]
    log = [{"step": row["step"], "val_loss": row["val_loss"], "links": row["links"]}
           for row in rows]
    return {"log": log, "chains": chains, "ranks": ranks, "lookup": read, "losses": losses,
            "seconds": rows[-1]["seconds"],
            "parameters": sum(p.numel() for p in model.parameters())}


def lookup(model, x) -> dict:
    """Is a token read for its letter? How much likelier that letter is later on because the token
    can be seen, for token 0 and, as a control, for token 5: mean over windows x and positions."""
    def likely(k, mask=None):
        letter = x[:, k, None, None].expand(-1, x.shape[1], 1)
        return model(x, mask=mask)[0].softmax(-1).gather(2, letter)[:, k + 8:].mean().item()

    return {f"token {k}": likely(k) - likely(k, hide(k, x.shape[1])) for k in (0, 5)}


def hide(k, length):
    """A mask in which no later token may look at token k."""
    mask = torch.ones(length, length, dtype=torch.bool)
    mask[k + 1:, k] = False
    return mask


def ranks_of(model, x) -> dict:
    """Effective rank of the states after each layer, mean over layers."""
    depth = [f"{i}.resid_post" for i in range(len(model.layers))]
    states = record(model, x, depth)[1].values()
    return {"rank": statistics.fmean(effective_rank(s) for s in states),
            "rank without token 0": statistics.fmean(effective_rank(s[:, 1:]) for s in states)}


def effective_rank(states):
    """(N, T, C) -> exp(-sum p_i ln p_i), p_i the shares of the singular values (Roy and Vetterli
    2007)."""
    share = F.normalize(torch.linalg.svdvals(states.flatten(0, 1)), p=1, dim=0)
    return torch.special.entr(share).sum().exp().item()


@torch.no_grad()
def measure(model, corpus, log) -> dict:
    """The chain where nothing can be copied, the loss on the task above that of a perfect
    predictor, and what training looked like."""
    generator = torch.Generator().manual_seed(0)
    rest = corpus.task.rest(64, T, generator)
    losses = [row["val_loss"] for row in log]
    return {
        "chain": probe.chain(model, rest), "ruler": ruler(model, rest), **ranks_of(model, rest),
        "excess": excess(model, corpus, T), "excess at 2T": excess(model, corpus, 2 * T),
        "rise": max(b - min(losses[:i + 1]) for i, b in enumerate(losses[1:])),
        "birth": [{"step": row["step"], "val_loss": row["val_loss"],
                   "sink": row["links_rest"]["sink"]} for row in log]}


def ends(model, x, hidden=None):
    """(T,): how likely the model thinks at each position that the passage is over, mean over
    windows x of lower case; `hidden`: a token that no later one may look at."""
    mask = None if hidden is None else hide(hidden, T)
    p = model(x, mask=mask)[0].softmax(-1)
    upper = p.shape[-1] // 2  # K letters twice, and <|bos|>
    return p[..., upper:-1].sum(-1).mean(0)


def ruler(model, rest) -> dict:
    """Is token 0 what a model measures its position from? Mean change of `ends` when token 0 is
    hidden, the same after moving the curve by one place, and when another token is hidden."""
    free, without, other = (ends(model, rest, hidden) for hidden in (None, 0, 5))
    return {"hidden": (without - free)[1:].abs().mean().item(),
            "hidden, moved by one": (without[1:] - free[:-1])[1:].abs().mean().item(),
            "token 5 hidden": (other - free)[1:].abs().mean().item()}


@torch.no_grad()
def excess(model, corpus, length) -> float:
    """Nats per token above a perfect predictor on the same windows, 1,024 of T = 64 or as many
    tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = corpus.task.windows(1024 * T // length, length + 1, generator)
    perfect = corpus.task.token_loss(tokens.numpy())[:, 1:].mean()
    parts = tokens.split(64)
    return statistics.fmean(model(p[:, :-1], p[:, 1:])[1].item() for p in parts) - float(perfect)


# ---------------------------------------------------------------- tables

def cells(found, attn, lr) -> list[dict]:
    """The seeds of one attention at one learning rate."""
    there = found["grid"][attn].get(f"{lr:g}", {})
    return [there[seed] for seed in sorted(there)]


def sink(cell):
    return cell["chain"]["sink"]


def learned(cell):
    return cell["excess"] <= LEARNED


def best_rate(found, attn) -> float:
    """The learning rate of the lowest mean loss."""
    return min(RATES, key=lambda lr: statistics.fmean(c["excess"] for c in cells(found, attn, lr)))


def grid_table(found, show) -> str:
    rows = [[attn, *(show(cells(found, attn, lr)) for lr in RATES)] for attn in ATTENTIONS]
    return markdown(["", *(f"{lr:g}" for lr in RATES)], rows)


def show_sinks(seeds) -> str:
    able = [c for c in seeds if learned(c)]
    above = sum(sink(c) > SINK for c in able)
    of = f"{above} of the {len(able)} that learned" if able else "none learned"
    return f"{mean_std([sink(c) for c in seeds])}; {of}"


def steps_to(cell, loss=REACHED):
    """The step at which the validation loss falls to `loss`, on a line between evaluations."""
    rows = cell["birth"]
    for a, b in zip(rows, rows[1:]):
        if b["val_loss"] <= loss:
            share = (a["val_loss"] - loss) / (a["val_loss"] - b["val_loss"])
            return a["step"] + share * (b["step"] - a["step"])
    return None


def paired(ours, theirs) -> str:
    """Mean difference over seeds and its 95 % interval (Student's t)."""
    gaps = [a - b for a, b in zip(ours, theirs)]
    t95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}[len(gaps)]
    half = t95 * statistics.stdev(gaps) / len(gaps) ** 0.5
    return f"{statistics.fmean(gaps):+.3f} ± {half:.3f}"


def gain(found) -> str:
    """Loss of headnorm minus softmax, each at its best learning rate."""
    return paired(*([c["excess"] for c in cells(found, attn, best_rate(found, attn))]
                    for attn in ("headnorm", "softmax")))


def comparison(found, rate) -> str:
    """Every attention at a rate of its own: rate {attn: learning rate}."""
    rows, head = [], (
        "", "learning rate", "sink", "passes 0.3", "length of token 0", "DomRatio", "value drain",
        "effective rank (without token 0)", "loss above perfect", "minus softmax", "at T = 128",
        "steps to a loss of 1.6", "largest rise of the loss")
    base = [c["excess"] for c in cells(found, "softmax", rate["softmax"])]
    for attn in ATTENTIONS:
        seeds = cells(found, attn, rate[attn])
        chain = lambda key: mean_std([c["chain"][key] for c in seeds])
        steps = [s for s in map(steps_to, seeds) if s is not None]
        rank = (f"{mean_std([c['rank'] for c in seeds])} "
                f"({mean_std([c['rank without token 0'] for c in seeds])})")
        minus = "-" if attn == "softmax" else paired([c["excess"] for c in seeds], base)
        rows.append((
            attn, f"{rate[attn]:g}", chain("sink"),
            f"{sum(sink(c) > SINK for c in seeds)} of {len(seeds)}", chain("norm_ratio"),
            chain("dominance"), chain("drain"), rank, mean_std([c["excess"] for c in seeds]), minus,
            mean_std([c["excess at 2T"] for c in seeds]),
            f"{statistics.fmean(steps):,.0f} ({len(steps)} of {len(seeds)})" if steps else "-",
            mean_std([max(0.0, c["rise"]) for c in seeds])))
    return markdown(head, rows)


def births_table(found, lr=5e-3) -> str:
    """The sink while a model learns, at the learning rate of `--size micro`."""
    rows = []
    for attn in ATTENTIONS:
        evaluations = zip(*(c["birth"] for c in cells(found, attn, lr)))  # each of all seeds
        shown = [same for same in evaluations if same[0]["step"] >= 200]
        rows.append([attn, *(mean_std([row["sink"] for row in same]) for same in shown)])
    return markdown(["", *(f"step {same[0]['step']:,}" for same in shown)], rows)


def early_table(found) -> str:
    """At step EARLY, fresh seeds; the ruler in thousandths."""
    rows = []
    for attn in ATTENTIONS:
        seeds = [found["early"][attn][str(seed)] for seed in FRESH]
        above = sum(sink(c) > SINK for c in seeds)
        rows.append((
            attn, mean_std([sink(c) for c in seeds]), f"{above} of {len(seeds)}",
            mean_std([c["chain"]["drain"] for c in seeds]),
            mean_std([c["val_loss"] for c in seeds]),
            *(mean_std([1000 * c["ruler"][key] for c in seeds])
              for key in ("hidden", "token 5 hidden"))))
    return markdown(("", "sink", "passes 0.3", "value drain", "validation loss", "token 0 hidden",
                     "token 5 hidden"), rows)


def ruler_table(found) -> str:
    """In thousandths, at 0.005."""
    rows = []
    for attn in ATTENTIONS:
        seeds = [c["ruler"] for c in cells(found, attn, 5e-3)]
        rows.append([attn, *(mean_std([1000 * r[key] for r in seeds]) for key in seeds[0])])
    return markdown(("", "token 0 hidden", "the same, moved by one place", "token 5 hidden"), rows)


def variants_table(found) -> str:
    rows, whole = [], cells(found, "headnorm", VARIANT_RATE)[:len(VARIANT_SEEDS)]
    for name in ("headnorm", *VARIANTS):
        there = found["variants"].get(name)
        seeds = [there[seed] for seed in sorted(there)] if there else whole
        chain = (mean_std([c["chain"][key] for c in seeds])
                 for key in ("sink", "drain", "dominance"))
        loss = [[c["excess"] for c in both] for both in (seeds, whole)]
        minus = paired(*loss) if there else "-"
        rows.append((name, *chain, mean_std(loss[0]), minus))
    return markdown(("headnorm", "sink", "value drain", "DomRatio", "loss above perfect",
                     "minus headnorm"), rows)


def long_table(found) -> str:
    """The end of each run of LONG: mean and standard deviation over windows, in batches."""
    rows = []
    for attn, seed in LONG_PLAN:
        run = found["long"][attn][str(seed)]
        chain = (mean_std([c[key] for c in run["chains"]])
                 for key in ("sink", "norm_ratio", "dominance", "drain"))
        rank = (mean_std([r[key] for r in run["ranks"]]) for key in run["ranks"][0])
        read = (mean_std([1000 * r[key] for r in run["lookup"]]) for key in run["lookup"][0])
        rows.append((attn, *chain, *rank, *read, f"{statistics.fmean(run['losses']):.3f}",
                     "-" if attn == "softmax" else long_gap(found, attn)))
    return markdown(("", "sink", "length of token 0", "DomRatio", "value drain", "effective rank",
                     "without token 0", "letter of token 0", "of token 5", "loss",
                     "minus softmax"), rows)


def long_gap(found, attn) -> str:
    """Loss of a run of LONG minus softmax's on the same windows, ± twice its standard error."""
    ours, theirs = (found["long"][a]["0"]["losses"] for a in (attn, "softmax"))
    gaps = [a - b for a, b in zip(ours, theirs)]
    error = statistics.stdev(gaps) / len(gaps)**0.5
    return f"{statistics.fmean(gaps):+.3f} ± {2 * error:.3f}"


def long_sinks(found) -> str:
    """The sink of each run of LONG, in words."""
    def sink_of(attn, seed):
        chains = found["long"][attn][str(seed)]["chains"]
        return statistics.fmean(c["sink"] for c in chains)
    *most, last = (f"{sink_of(attn, seed):.2f} ({attn})" for attn, seed in LONG_PLAN)
    return f"{', '.join(most)} and {last}"


@figures.styled
def draw_long(found):
    """The birth of the sink and of the long state, or not, under each attention."""
    figure, axes = figures.new(3.2, 1, 2)
    for ax, key, title in zip(axes, ("sink", "norm_ratio"), (
            "Text: attention to the first token", "Length of its state")):
        number = probe.metric(key)
        for style, (attn, seed) in zip(figures.STYLES, LONG_PLAN):
            log = found["long"][attn][str(seed)]["log"]
            figures.track(ax, log, lambda row: row["links"][key], label=attn, **style | {"ms": 3})
        figures.dress(ax, title, {}, xlabel="step", ylabel=figures.tex(number.says))
        ax.set_ylim(0)
    return figure


def search_table(found) -> str:
    """Every configuration that was tried on the way, in the order of the trials."""
    rows = []
    for r in found["search"]:
        numbers = (f"{r[key]:.2f}" for key in ("sink", "drain", "val_loss"))
        largest = f"{r['largest']:.2f}" if "largest" in r else "-"  # of a training, once not kept
        rows.append((r["task"], r["attn"], r["changed"], str(r["seed"]), *numbers, largest))
    return markdown(("task", "attention", "changed", "seed", "sink", "value drain", "loss",
                     "largest sink"), rows)


def verdict(found) -> str:
    """Whether the setting can tell, and what it tells."""
    best, rows = {attn: best_rate(found, attn) for attn in ATTENTIONS}, []
    for title, rate in (("softmax's best", dict.fromkeys(ATTENTIONS, best["softmax"])),
                        ("its own best", best)):
        for attn in ATTENTIONS:
            seeds = cells(found, attn, rate[attn])
            able = [sink(c) for c in seeds if learned(c)]
            rows.append((f"{title}, {rate[attn]:g}", attn, f"{len(able)} of {len(seeds)}",
                         str(sum(a > SINK for a in able)), mean_std(able) if able else "-"))
    return markdown(("learning rate", "attention", "seeds that have learned", "of these pass 0.3",
                     "their strongest head"), rows)


def tables(found) -> dict[str, str]:
    best = {attn: best_rate(found, attn) for attn in ATTENTIONS}
    return {"verdict": verdict(found), "sinks": grid_table(found, show_sinks),
            "losses": grid_table(found, lambda seeds: mean_std([c["excess"] for c in seeds])),
            "same": comparison(found, dict.fromkeys(ATTENTIONS, best["softmax"])),
            "best": comparison(found, best), "variants": variants_table(found),
            "births": births_table(found), "early": early_table(found),
            "ruler": ruler_table(found), "long": long_table(found),
            "search": search_table(found)}


# ---------------------------------------------------------------- command line

def main():
    parser = argparse.ArgumentParser(description="the cures, over a grid")
    parser.add_argument("--render", action="store_true", help="only the tables, from the JSON")
    parser.add_argument("--jobs", type=int, default=2, help="at a time, one thread each (2)")
    args = parser.parse_args()
    if not args.render:
        work(args.jobs)
    found = read_json(FILE)
    fill_page(PAGE, tables(found))
    figures.save(FIGURE, draw_long(found))


def work(jobs) -> None:
    """Train and measure what is not yet in cures.json; write it after each run."""
    found, plan = {"early": {}, "long": {}} | read_json(FILE), []
    for attn, seed in LONG_PLAN:
        plan.append((found["long"].setdefault(attn, {}), seed, long, attn, seed))
    for seed in SEEDS:
        for lr in RATES:
            for attn in ATTENTIONS:
                place = found["grid"].setdefault(attn, {}).setdefault(f"{lr:g}", {})
                plan.append((place, seed, train_and_measure, run_of(attn, lr, seed)))
    for seed in VARIANT_SEEDS:
        for name in VARIANTS:
            place = found["variants"].setdefault(name, {})
            plan.append((place, seed, train_variant, name, seed))
    for seed in FRESH:
        for attn in ATTENTIONS:
            plan.append((found["early"].setdefault(attn, {}), seed, early, attn, seed))
    with ProcessPoolExecutor(jobs) as pool:
        waiting = [(place, seed, pool.submit(*job)) for place, seed, *job in plan
                   if str(seed) not in place]
        for place, seed, job in bar(waiting, "runs"):
            place[str(seed)] = job.result()
            write_json(FILE, found)


if __name__ == "__main__":
    main()
