"""Which cures work where a cure can be seen: every attention at every learning rate, five seeds.

    python -m tests.cures             # trains and measures what is missing: six hours of one core
    python -m tests.cures --render    # only the tables and the figure of cures.md, from the JSON

The setting is `--size micro`: copying, ordinary first tokens. Data, order and first weights are
equal for all runs of a seed. Our criteria, written when two of the runs had been seen (softmax and
gated, 0.005, seed 0):

    the setting can tell, if under softmax SINK is passed in 4 of 5 seeds, and under gated
    attention, a cure that is known to work (arXiv 2505.06708), in none, at the same learning rate
    and at each one's best, and all of these runs have learned
    a run has learned, if its loss is at most LEARNED above that of a perfect predictor
    a cure works, if under it SINK is passed in no seed that has learned

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
from statistics import fmean, stdev

import torch
import torch.nn.functional as F

import probe
import train
from chapters import figures
from chapters.lesson import trained
from data.common import environment
from data.runs import read_log
from model import record
from tests import runner
from tests.runner import RESULTS, interval_words, mean_std_words

ATTENTIONS = ("softmax", "sigmoid", "headnorm", "gated")
SEEDS, RATES = range(5), (2.5e-3, 5e-3, 1e-2, 2e-2)
SINK, LEARNED = probe.SINK, 0.25  # attention; nats above a perfect predictor
LONG = dict(size="tiny", bos=0.0, hidden_size=96, intermediate_size=256, seq_len=128, lr=2.5e-3,
            steps=36000, evals=24, threads=1)
LONG_ATTENTIONS = ("softmax", "gated", "headnorm")
T = 64
FILE, PAGE, FIGURE = (RESULTS / name for name in ("cures.json", "cures.md", "cures_long.png"))


def plan() -> dict:
    """The long runs first, then the grid: {path into cures.json: (function, arguments)}."""
    jobs = {("environment",): (environment, torch.device("cpu"), 1)}
    for attn in LONG_ATTENTIONS:
        jobs["long", attn, "0"] = (long, attn)
    for seed in SEEDS:
        for lr in RATES:
            for attn in ATTENTIONS:
                jobs["grid", attn, f"{lr:g}", str(seed)] = (train_and_measure, attn, lr, seed)
    return jobs


# ---------------------------------------------------------------- measuring one run

def train_and_measure(attn, lr, seed) -> dict:
    """One run of the grid: two minutes on one core, if it is not trained yet."""
    out = f"out/cures/{attn}-{lr:g}-{seed}"
    model, corpus, _ = opened(train.Run(attn=attn, size="micro", lr=lr, seed=seed, out=out))
    return measure(model, corpus)


def opened(run):
    """The model, the corpus and the settings of a run, which is trained if need be."""
    trained(run, jobs=1)
    return train.load_run(run.out)


@torch.no_grad()
def measure(model, corpus) -> dict:
    """The chain, `ruler` and rank where nothing can be copied; the loss on the task, in nats per
    token above a perfect predictor on the same 1,024 windows."""
    task = corpus.task
    rest = task.rest(64, T, torch.Generator().manual_seed(0))
    tokens = task.windows(1024, T + 1, torch.Generator().manual_seed(1))
    perfect = task.token_loss(tokens.numpy())[:, 1:].mean()
    losses = [model(part[:, :-1], part[:, 1:])[1].item() for part in tokens.split(64)]
    return {"chain": probe.chain(model, rest), "ruler": ruler(model, rest),
            "rank": rank(model, rest), "excess": fmean(losses) - float(perfect)}


def ends(model, x, hidden=None):
    """(T,): the model's probability, at each position, that the passage is over, mean over windows
    x of lower case; `hidden`: a token that no later one may look at."""
    mask = None if hidden is None else hide(hidden, T)
    p = model(x, mask=mask)[0].softmax(-1)
    upper = p.shape[-1] // 2  # K letters twice, and <|bos|>
    return p[..., upper:-1].sum(-1).mean(0)


def ruler(model, rest) -> dict:
    """Does a model measure its position from token 0? Mean change of `ends` when token 0 is hidden,
    the same after moving the curve by one place, and when another token is hidden."""
    free, without, other = (ends(model, rest, hidden) for hidden in (None, 0, 5))
    changes = {"hidden": without - free,
               "hidden, moved by one": without[1:] - free[:-1],
               "token 5 hidden": other - free}
    return {name: change[1:].abs().mean().item() for name, change in changes.items()}


def hide(k, length):
    """A mask in which no later token may look at token k."""
    mask = torch.ones(length, length, dtype=torch.bool)
    mask[k + 1:, k] = False
    return mask


def rank(model, x) -> float:
    """Effective rank of the states after each layer, mean over layers: exp(-sum p_i ln p_i), p_i
    the shares of the singular values (Roy and Vetterli 2007)."""
    depth = [f"{i}.resid_post" for i in range(len(model.layers))]
    ranks = []
    for states in record(model, x, depth)[1].values():
        singular = torch.linalg.svdvals(states.flatten(0, 1))
        p = F.normalize(singular, p=1, dim=0)
        ranks.append(torch.special.entr(p).sum().exp().item())
    return fmean(ranks)


@torch.no_grad()
def long(attn) -> dict:
    """One run of LONG, 50 minutes of one core; it goes on where it was stopped. Its log, and at the
    end, in 4 x 64 held-out windows, the chain, the rank and `lookup`; the loss on 2,048 windows."""
    out = f"out/cures/long-{attn}-0"
    model, corpus, _ = opened(train.Run(**LONG, attn=attn, out=out))
    generator = torch.Generator().manual_seed(0)

    def batch():
        return corpus.batch(64, LONG["seq_len"], generator, "val", 0.0)

    log = [{key: row[key] for key in ("step", "val_loss", "links")} for row in read_log(out)]
    found = {"log": log, "chains": [], "ranks": [], "lookup": []}
    for _ in range(4):
        x, _ = batch()
        found["chains"].append(probe.chain(model, x))
        found["ranks"].append({"rank": rank(model, x)})
        found["lookup"].append(lookup(model, x))
    return found | {"losses": [model(*batch())[1].item() for _ in range(32)]}


def lookup(model, x) -> dict:
    """Is a token read for its letter? How much likelier that letter is later on because the token
    can be seen, for token 0 and, as a control, for token 5: mean over windows x and positions."""
    length = x.shape[1]

    def likely(k, mask=None):
        letter = x[:, k, None, None].expand(-1, length, 1)
        p = model(x, mask=mask)[0].softmax(-1).gather(2, letter)
        return p[:, k + 8:].mean().item()

    return {f"token {k}": likely(k) - likely(k, hide(k, length)) for k in (0, 5)}


# ---------------------------------------------------------------- tables

def cells(found, attn, lr) -> list[dict]:
    """The seeds of one attention at one learning rate."""
    there = found["grid"][attn][f"{lr:g}"]
    return [there[seed] for seed in sorted(there)]


def learned(seeds) -> tuple[int, int]:
    """How many seeds have learned, and how many of these have a sink."""
    able = [c["chain"]["sink"] for c in seeds if c["excess"] <= LEARNED]
    return len(able), sum(sink > SINK for sink in able)


def excess(run) -> float:
    return run["excess"]


def best(found, attn) -> tuple[str, list[dict]]:
    """The rates that are best for the other seeds, and every seed there."""
    return runner.best_for_others(found["grid"][attn], excess)


def best_cells(found, attn) -> list[dict]:
    return best(found, attn)[1]


def same_choice(found, attn) -> list[dict]:
    """Every seed at the rate that is best over all seeds."""
    return cells(found, attn, float(runner.best_rate(found["grid"][attn], excess)))


def gain(found, attn, chosen) -> str:
    """Loss of an attention minus softmax's, each at its best learning rate: mean and 95 % interval
    over seeds."""
    pairs = zip(chosen(found, attn), chosen(found, "softmax"), strict=True)
    gaps = [ours["excess"] - theirs["excess"] for ours, theirs in pairs]
    return f"{fmean(gaps):+.3f} ± {runner.half_interval(gaps):.3f}"


def best_table(found) -> str:
    """Every attention at its best learning rate."""
    rows = []
    for attn in ATTENTIONS:
        rates, seeds = best(found, attn)
        able, sinks = learned(seeds)
        row = [attn, rates, f"{able} of {len(seeds)}", f"{sinks} of {able}"]
        for key in ("sink", "drain", "dominance"):
            row.append(interval_words([c["chain"][key] for c in seeds]))
        for key in ("rank", "excess"):
            row.append(interval_words([c[key] for c in seeds]))
        for chosen in (best_cells, same_choice):
            row.append("-" if attn == "softmax" else gain(found, attn, chosen))
        rows.append(row)
    return runner.markdown(("± 95 % of seeds", "learning rate", "have learned",
                            "of these pass 0.3", "sink", "length of its value", "DomRatio",
                            "effective rank", "loss above perfect", "minus softmax",
                            "minus softmax, rates chosen on the same seeds"), rows)


def sinks_table(found) -> str:
    """The whole grid: the sink, and how many of the seeds that have learned pass SINK."""
    def cell(attn, lr):
        seeds = cells(found, attn, lr)
        able, sinks = learned(seeds)
        words = f"{sinks} of the {able} that learned" if able else "none learned"
        return f"{interval_words([c['chain']['sink'] for c in seeds])}; {words}"
    return runner.grid(("± 95 % of seeds", *map(str, RATES)), ATTENTIONS, RATES, cell)


def ruler_table(found) -> str:
    """In thousandths, at 0.005."""
    def cell(attn, key):
        return interval_words([1000 * c["ruler"][key] for c in cells(found, attn, 5e-3)])
    head = ("± 95 % of seeds", "token 0 hidden", "token 0 hidden, curve moved back by one place",
            "token 5 hidden")
    keys = ("hidden", "hidden, moved by one", "token 5 hidden")
    return runner.grid(head, ATTENTIONS, keys, cell)


def long_table(found) -> str:
    """The end of each run of LONG: mean and standard deviation over windows, in batches."""
    rows = []
    for attn in LONG_ATTENTIONS:
        run, row = found["long"][attn]["0"], [attn]
        for key in ("sink", "norm_ratio", "dominance", "drain"):
            row.append(mean_std_words([chain[key] for chain in run["chains"]]))
        row.append(mean_std_words([ranks["rank"] for ranks in run["ranks"]]))
        for key in ("token 0", "token 5"):
            row.append(mean_std_words([1000 * read[key] for read in run["lookup"]]))
        rows.append([*row, f"{fmean(run['losses']):.3f}",
                     "-" if attn == "softmax" else long_gap(found, attn)])
    return runner.markdown(("± sd of batches", "sink", "length of token 0", "DomRatio",
                            "length of its value",
                            "effective rank", "letter of token 0", "letter of token 5", "loss",
                            "minus softmax"), rows)


def long_gap(found, attn) -> str:
    """Loss of a run of LONG minus softmax's on the same windows: mean and standard deviation over
    batches."""
    ours, theirs = (found["long"][a]["0"]["losses"] for a in (attn, "softmax"))
    gaps = [a - b for a, b in zip(ours, theirs)]
    return f"{fmean(gaps):+.3f} ± {stdev(gaps):.3f}"


@figures.styled
def draw_long(found):
    """The birth of the sink and of the long state, or not, under each attention."""
    figure, axes = figures.new(3.2, 1, 2)
    titles = {"sink": "Text: attention to the first token", "norm_ratio": "Length of its state"}
    for ax, (key, title) in zip(axes, titles.items()):
        for style, attn in zip(figures.STYLES, LONG_ATTENTIONS):
            log = found["long"][attn]["0"]["log"]
            figures.track(ax, log, lambda row: row["links"][key], label=attn, **style | {"ms": 3})
        figures.dress(ax, title, {}, xlabel="step", ylabel=figures.tex(probe.metric(key).says))
        ax.set_ylim(0)
    return figure


def tables(found) -> dict[str, str]:
    return {"best": best_table(found), "sinks": sinks_table(found), "ruler": ruler_table(found),
            "long": long_table(found)}


def render(found) -> None:
    runner.fill_page(PAGE, tables(found))
    figures.save(FIGURE, draw_long(found))


if __name__ == "__main__":
    runner.main("cures", __doc__, FILE, plan(), render)
