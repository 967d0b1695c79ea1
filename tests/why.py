"""Why does head-wise RMSNorm take a sink? Two explanations, told apart in the task rest.

    python -m tests.why               # what is missing: 120 runs of a minute on one core
    python -m tests.why --render      # only the table of tests/results/rest.md, from the JSON

    parity    the first token rests attention because its aggregated value varies most (the paper):
              where all values vary alike, there is no sink
    no-op     a head that has nothing to say rests on a token whose value is nothing: where a norm
              makes every output as long as any other, that is of no use

Headnorm brings parity and takes the no-op away. Each variant below does one of the two, both, or
neither. Weights, data and order of a seed are equal for all; seeds 10 to 14 of *softmax* and
*headnorm* are those of tests/rest.py, which had been seen when this was written, all others had
not. Told is the weight on token 0 of tests/rest.py; judged, the share taken of what softmax gives
there above uniform attention, in the same seed. Our criteria, written before:

    a variant takes the sink, if it takes at least half of it in 8 or more of 10 seeds that have
    learned; it leaves it, if it takes less than a fifth in 8 or more; else the seeds disagree
    a variant speaks against an explanation, if that says "takes" and the sink is left, or says
    "leaves" and it is taken
"""
from dataclasses import dataclass, replace
from statistics import fmean

import torch

import probe
import train
from data.common import environment, read_json
from model import GPT, Attention, RMSNorm, record
from tests import rest, runner

SEEDS = range(10, 20)
FILE = runner.RESULTS / "why.json"


@dataclass
class Variant:
    parity: str = ""  # what this explanation says of the variant: takes, or leaves
    no_op: str = ""
    norm: tuple = ()  # layers with head-wise RMSNorm
    eps: float = 1e-5  # of that norm
    level: tuple = ()  # layers with `Level`
    uniform: bool = False  # layer 0 attends to all keys alike
    readout: str = "attn_out"


VARIANTS = {
    "softmax": Variant(),
    "norm in layer 0": Variant("takes", "leaves", norm=(0,)),  # where the chain begins
    "norm in layer 2": Variant("leaves", "takes", norm=(2,)),  # where heads must rest
    "norm in layers 0 and 2": Variant("takes", "takes", norm=(0, 2)),
    # the mean square of an untrained z is 0.4 at token 0 and 0.03 at the last: these are levelled
    # nearly as before; a drained one is 0.0002, and stays short
    "headnorm, large eps": Variant("takes", "leaves", norm=(0, 1, 2), eps=0.01),
    "levelled": Variant("takes", "leaves", level=(0, 1, 2)),
    "headnorm": Variant("takes", "takes", norm=(0, 1, 2)),
    "headnorm, layer 0 uniform": Variant("takes", "takes", norm=(0, 1, 2), uniform=True),
    # written when those above were known, but for headnorm: layer 1 can begin the chain anew
    "norm in layers 0 and 1": Variant("takes", "leaves", norm=(0, 1)),
    "levelled in layers 0 and 1": Variant("takes", "leaves", level=(0, 1)),
    # written last, when all others were known: layer 0 as unequal as it can be
    "softmax, layer 0 uniform": Variant("leaves", "leaves", uniform=True),
    # here nothing has to be silent: what a head says is ignored by the layers behind it
    "softmax, readout final": Variant("leaves", "takes", readout="final"),
    "headnorm, readout final": Variant("takes", "takes", norm=(0, 1, 2), readout="final"),
}


class Level(Attention):
    """Divides z_t by sqrt(sum_s a_ts^2). Independent values of one variance then average to that
    variance at every position, but a value that is nothing stays nothing."""

    def mix(self, q, k, v, x, bias, tap):
        def level(name, value):
            value = tap(name, value)
            if name == "pattern":
                return value / value.norm(dim=-1, keepdim=True)
            return value
        return super().mix(q, k, v, x, bias, level)


# ---------------------------------------------------------------- measuring

def plan() -> dict:
    jobs = {("environment",): (environment, torch.device("cpu"), 1)}
    known = read_json(rest.FILE)["grid"]
    for name in VARIANTS:
        for seed in SEEDS:
            if str(seed) not in known.get(name, {}).get("0.005", {}):
                jobs["runs", name, str(seed)] = (train_and_measure, name, seed)
    return jobs


def build(variant: Variant, seed: int):
    """The settings of train.py's default, the changed model, its data."""
    run = train.resolve(train.Run(seed=seed))
    corpus = train.load_corpus(run)
    cfg = replace(train.model_config(run, corpus), readout=variant.readout)
    model = GPT(cfg, seed=seed)
    for i, block in enumerate(model.layers):
        attention = block.self_attn
        if i in variant.norm:
            attention.attn = "headnorm"
            attention.z_norm = RMSNorm(attention.D, variant.eps)
        if i in variant.level:
            attention.__class__ = Level  # the same weights, used otherwise
            model.fused = False  # torch's kernel does not show the pattern
    if variant.uniform:
        queries = model.layers[0].self_attn.q_proj.weight
        torch.nn.init.zeros_(queries).requires_grad_(False)
    return run, model, corpus


def train_and_measure(name: str, seed: int) -> dict:
    """A minute of one core: as tests/rest.py measures, and the parity that was reached."""
    run, model, corpus = build(VARIANTS[name], seed)
    cast = torch.autocast("cpu", enabled=False)
    state = runner.training(run, model, corpus, seed + 1)
    for _ in range(run.steps):
        train.train_step(state, cast)
    found = rest.measure(model.eval(), corpus.task)
    letters = corpus.task.rest(256, run.seq_len, torch.Generator().manual_seed(0))
    z = record(model, letters, ["0.z"])[1]["0.z"]
    return found | {"parity": probe.over_median(probe.variance(z), 0).item()}


# ---------------------------------------------------------------- the table

def runs(found, name) -> list[dict]:
    """The seeds of a variant, in order."""
    known = read_json(rest.FILE)["grid"].get(name, {}).get("0.005", {})
    seeds = known | found["runs"].get(name, {})
    return [seeds[str(seed)] for seed in SEEDS if str(seed) in seeds]


def shares(found, name) -> list[float]:
    """The share of softmax's sink that a variant takes, of each seed that has learned."""
    pairs = zip(runs(found, name), runs(found, "softmax"))
    return [rest.taken(*pair) for pair in pairs if all(map(rest.learned, pair))]


def verdict(found, name) -> str:
    """By the criteria above."""
    taken = shares(found, name)
    if len(taken) < 8:
        return "too few seeds have learned"
    if sum(share >= 0.5 for share in taken) >= 8:
        return "takes"
    if sum(share < 0.2 for share in taken) >= 8:
        return "leaves"
    return "the seeds disagree"


def table(found) -> str:
    head = ("variant", "parity says", "no-op says", "seen", "weight on token 0",
            "largest key of a query", "length of its value", "loss at rest, nats above perfect")
    rows = []
    for name, variant in VARIANTS.items():
        seeds = runs(found, name)
        rows.append((
            name, variant.parity or "-", variant.no_op or "-",
            "-" if name == "softmax" else verdict(found, name),
            rest.interval([rest.weight(seed) for seed in seeds]),
            rest.interval([fmean(seed["weights"]["largest"]) for seed in seeds]),
            rest.interval([seed["chain"]["drain"] for seed in seeds]),
            f"{fmean(seed['loss']['rest'] for seed in seeds):.4f}"))
    return runner.markdown(head, rows)


if __name__ == "__main__":
    runner.main("why", __doc__, FILE, plan(),
                lambda found: runner.fill_page(rest.PAGE, {"why": table(found)}))
