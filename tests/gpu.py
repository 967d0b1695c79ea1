"""What one GPU shows: how fast the models train, and how sinks are born in text of some size.

    python -m tests.gpu --minutes 9   # ends by itself, and goes on when called again
    python -m tests.gpu --render      # only tests/results/gpu.md and gpu.png, from gpu.json
    python -m tests.gpu --toy         # every path in two minutes on a CPU; its numbers mean nothing

By estimate 75 minutes of an H100, 25 of which are enough for the first seed. gpu.json is written to
--out after each piece of `plan`; what stands there, or in tests/results, is not measured again. The
text and the trainings, 0.4 GB each, are kept in out/gpu. Where the disk is slow they should lie in
memory: ATTENTION_SINK_OUT=/dev/shm/out.

The comparison: 30 million weights read Python source in windows that begin anywhere, none of them
at <|bos|>; data, order and first weights are equal for all runs of a seed. Each attention has the
learning rate of RATES that gives it the lowest held-out loss after a tenth of the steps, on a seed
that is not reported. Our margins, written when nothing had been run on a GPU, for held-out text at
the last step, in each seed:

    this setting has sinks to cure, if softmax has a sink in at least LEAST of its heads
    it can tell a cure, if gated, which is known to work (arXiv 2505.06708), has one in at most MOST
    of what softmax has
    headnorm, sigmoid, logit: measured, and told with the loss beside it; no margin
"""
import functools
import gc
import hashlib
import importlib.util
import math
import sys
import sysconfig
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from unittest import mock

import torch

import data
import probe
import train
from chapters import figures
from data import text
from data.common import (OUT, Parser, UserError, environment, pick_device, program, read_json,
                         write_atomically, write_json)
from data.windows import random_windows
from model import GPT
from tests import bench, runner
from tests.runner import RESULTS, interval_words

ATTENTIONS = ("softmax", "headnorm", "gated", "sigmoid", "logit")  # in the order of the plan
RATES, RATE_SEED, SEEDS = (5e-4, 1e-3, 2e-3), 100, range(5)
LEAST, MOST = 0.15, 1 / 3  # of the margins
NO_BOS = dict(bos=0.0, repeat=0.0, compile=True)  # and no repeated passages: plain text
COMPARED = dict(size="small", hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
                num_attention_heads=8, vocab_size=4096, seq_len=512, batch_size=64, steps=6000,
                evals=20, weight_decay=0.1, **NO_BOS)
SHAPES = {"30 M": COMPARED, "small": dict(size="small", **NO_BOS),
          "base": dict(size="base", **NO_BOS)}  # of the speed
TOY = COMPARED | dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=280,
                      num_attention_heads=2, seq_len=16, batch_size=4, steps=20, evals=2, threads=1)
MODES = {"compiled": True, "eager": False}
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # bf16, dense, by their maker
ROUNDS = 5
SPARE = 20  # seconds before the deadline from which on no new piece is begun
SHARDS = 64  # files of text, each a document


@dataclass
class Place:
    """What differs between a GPU and the toy."""
    work: Path       # of the text and the trainings
    roots: list      # folders with Python packages
    compared: dict   # settings of train.Run
    shapes: dict     # {name: the same}, of which the speed is told
    device: torch.device
    slice: float     # seconds, in which a model makes steps while the others wait
    known: Path      # gpu.json, if there is none in --out
    deadline: float = math.inf  # a time of time.monotonic()


def real() -> Place:
    device, _ = pick_device("auto")
    if device.type != "cuda":
        raise UserError("no CUDA GPU is here, and a CPU would need weeks; try --toy")
    roots = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")]
    return Place(Path(OUT) / "gpu", roots, COMPARED, SHAPES, device, 0.5, RESULTS / "gpu.json")


def toy() -> Place:
    """A model of nothing, which reads data/*.py."""
    work, roots = Path(OUT) / "gpu-toy", [Path(data.__file__).parent]
    return Place(work, roots, TOY, {"toy": TOY}, torch.device("cpu"), 0, work / "gpu.json")


def plan(place) -> dict:
    """The most telling first: {path into gpu.json: (function, arguments)}."""
    first, *others = [("speed", shape, mode) for mode in MODES for shape in place.shapes]
    jobs = {first: (speed, *first[1:])}  # it compiles what the trainings need
    for attn in ATTENTIONS:
        for lr in RATES:
            jobs["rates", attn, f"{lr:g}"] = (try_rate, attn, lr)
    for seed in SEEDS:
        for attn in ATTENTIONS:
            jobs["runs", attn, str(seed)] = (compare, attn, seed)
        if seed == 0:
            jobs |= {path: (speed, *path[1:]) for path in others}
    return jobs


# ---------------------------------------------------------------- the text

def is_generated(name, words) -> bool:
    """Source that a program wrote: it says so at its beginning, or in its name, or has a line that
    nobody would write."""
    longest = max(map(len, words.splitlines()), default=0)
    return name.endswith("_pb2.py") or "generated" in words[:500].lower() or longest > 500


def gather(roots, folder) -> dict:
    """All Python source below the roots, in the order of paths, but for generated files and copies,
    dealt out to SHARDS documents in a folder -> what was found."""
    shards, seen, whole = [[] for _ in range(SHARDS)], set(), hashlib.sha256()
    for root in dict.fromkeys(map(Path, roots)):
        files = [path for path in text.walk(root, {".py"}, {"__pycache__"}) if path.exists()]
        for name, words in text.documents(root, files, skip_undecodable=True):
            content = hashlib.sha256(words.encode()).digest()
            if content in seen or is_generated(name, words):
                continue
            shards[len(seen) % SHARDS].append(words)
            seen.add(content)
            whole.update(content)
    for number, files in enumerate(filter(None, shards)):
        shard = "\n".join(files)
        write_atomically(folder / f"{number:02}.py",
                         lambda part: part.write_text(shard, encoding="utf-8"))
    size = sum(len(words.encode()) for files in shards for words in files)
    return {"files": len(seen), "bytes": size, "sha256": whole.hexdigest()}


def corpus(place, found) -> dict:
    """Gather and encode the text, if need be, and tell what it is. Raises UserError where it is
    another one than that of gpu.json."""
    begin, summary = time.monotonic(), place.work / "text.json"
    if not summary.exists():  # it is written when the folder is whole
        write_json(summary, gather(place.roots, place.work / "text"))
    here = read_json(summary)
    known = found.get("corpus")
    if known and known["sha256"] != here["sha256"]:
        raise UserError(f"gpu.json is about other Python packages than those in {summary}: begin "
                        "anew with another --out, or measure on the machine that it is of")
    facts = train.load_corpus(settings(place)).fingerprint()  # `measure` has it read once
    return known or here | facts | {"seconds": time.monotonic() - begin}


# ---------------------------------------------------------------- speed

def speed(place, found, shape, mode) -> dict | None:
    """Every attention and the two others, by turns; None if time was over before."""
    torch._dynamo.reset()  # sizes of another shape would count as dynamic
    steps, cases = {}, {}
    builds = dict.fromkeys(ATTENTIONS, GPT) | bench.OTHERS
    if importlib.util.find_spec("transformers") is None:
        del builds["LlamaForCausalLM"]
    for name, build in builds.items():
        if time.monotonic() > place.deadline:
            return None
        attn = name if build is GPT else "softmax"
        run = train.resolve(train.Run(**place.shapes[shape], attn=attn))
        try:
            steps[name], cases[name] = first_steps(run, build, MODES[mode], place.device)
        except Exception:  # such as too little memory: the others are worth their time
            traceback.print_exc()
    for _ in range(ROUNDS):
        for name, step in steps.items():
            rate = steps_a_second(step, place)
            cases[name]["rates"].append(rate * run.batch_size * run.seq_len)
    if place.shapes[shape] is not place.compared:  # whose trainings shall find it compiled
        torch._dynamo.reset()
    return {"B": run.batch_size, "T": run.seq_len, "flops": flops(run), "cases": cases}


def first_steps(run, build, compiled, device):
    """A function that makes a step, and what the first ones cost: seconds, and bytes of memory (of
    the weights, the optimiser and one step)."""
    begin, before = time.perf_counter(), torch.cuda.memory_allocated()  # 0 without a GPU
    step = bench.stepper(run, build, compiled, device)
    step()
    wait(device)
    first = time.perf_counter() - begin
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    memory = torch.cuda.max_memory_allocated() - before
    return step, {"first_step": first, "memory": memory, "rates": []}


def steps_a_second(step, place) -> float:
    step()  # brings the weights into the cache
    wait(place.device)
    count, begin = 0, time.perf_counter()
    while not count or time.perf_counter() < begin + place.slice:
        step()
        count += 1
    wait(place.device)
    return count / (time.perf_counter() - begin)


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def flops(run) -> float:
    """Of a token in training: 6 for each weight of the matrices that multiply, and the scores and
    means of causal attention, of which a query needs half."""
    cfg = train.model_config(run, data.Corpus("random", run.vocab_size, run.vocab_size - 1))
    with torch.device("meta"):
        model = GPT(cfg)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    weights -= model.embed_tokens.weight.numel()
    return 6 * (weights + cfg.num_hidden_layers * run.seq_len * cfg.hidden_size)


# ---------------------------------------------------------------- the comparison

def settings(place, attn="softmax", lr=RATES[0], seed=0, **more) -> train.Run:
    out = place.work / f"{attn}-{lr:g}-{seed}"
    return train.Run(**place.compared | more, attn=attn, lr=lr, seed=seed, out=str(out),
                     data=str(place.work / "text"), device=str(place.device))


def trained(place, run) -> train.State:
    """A training, begun or gone on with; at the deadline it stops unfinished."""
    x, _ = random_windows(8, run.seq_len, train.load_corpus(run).bos)
    begun = (Path(run.out) / "config.json").exists()
    return train.train(run, resume=begun, deadline=place.deadline, more={"links_random": x})


def try_rate(place, found, attn, lr) -> dict | None:
    """The held-out loss after a tenth of the steps; None in it, if the training has diverged."""
    steps = place.compared["steps"] // 10
    try:
        state = trained(place, settings(place, attn, lr, RATE_SEED, steps=steps, evals=1))
    except train.Diverged:
        return {"val_loss": None}
    return {"val_loss": state.log[-1]["val_loss"]} if state.finished else None


def best_rate(found, attn) -> float:
    losses = {float(lr): there["val_loss"] for lr, there in found["rates"][attn].items()}
    learned = [lr for lr, loss in losses.items() if loss is not None]  # the others have diverged
    return min(learned, key=losses.get)


def compare(place, found, attn, seed) -> dict | None:
    """One run of the comparison: its evaluations, and what it shows at the end."""
    lr = best_rate(found, attn)
    run = settings(place, attn, lr, seed)
    state = trained(place, run)
    if not state.finished:
        return None
    keys = ("step", "val_loss", "links", "links_random")
    log = [{key: row[key] for key in keys} for row in state.log]
    return {"lr": lr, "seconds": state.seconds, "log": log} | at_the_end(run, place.device)


@torch.no_grad()
def at_the_end(run, device) -> dict:
    """Losses on 32 batches of held-out text, and the chain on four of them and on four of random
    tokens."""
    model, corpus, _ = train.load_run(run.out)
    model, generator = model.to(device), torch.Generator().manual_seed(0)
    pairs = [corpus.batch(16, run.seq_len, generator, "val", 0.0) for _ in range(32)]
    losses = [model(x.to(device), y.to(device))[1].item() for x, y in pairs]
    found = {"losses": losses, "text": [], "random": []}
    for seed, (x, _) in enumerate(pairs[:4]):
        random, _ = random_windows(16, run.seq_len, corpus.bos, seed=1 + seed)
        found["text"].append(probe.chain(model, x.to(device)))
        found["random"].append(probe.chain(model, random.to(device)))
    return found


# ---------------------------------------------------------------- piece by piece

def measure(place, file) -> int:
    """What is missing in gpu.json, until the time is over -> how many pieces have failed."""
    known = file if file.exists() else place.known
    found = read_json(known) if known.exists() else {}
    torch._dynamo.config.recompile_limit = 64  # five attentions stay compiled side by side
    failed, here = [], environment(place.device, 1)
    with mock.patch.object(data, "load", functools.cache(data.load)):  # it is read once
        found |= {"corpus": corpus(place, found), "compared": place.compared, "environment": here}
        missing = {path: job for path, job in plan(place).items() if not runner.holds(found, path)}
        for path, (function, *words) in missing.items():
            if time.monotonic() > place.deadline - SPARE:
                break
            print(f"----- {' '.join(path)}")
            gc.collect()  # models that were compiled go no other way
            try:
                result = function(place, found, *words)
            except Exception:  # the next piece may go well; nobody may look on
                traceback.print_exc()
                failed.append(path)
                continue
            if result is None:
                break
            found = runner.put(found, path, result | {"device": here["device"]})
            write_json(file, found)
    left = sum(not runner.holds(found, path) for path in plan(place))
    print(f"{left} of {len(plan(place))} pieces are left; {len(failed)} failed")
    return len(failed)


# ---------------------------------------------------------------- the page

NOT_YET = "not measured yet"
PAGE = """\
# On one GPU

Measured by `python -m tests.gpu` ([JSON](gpu.json)).

## How fast is a training step?

The models take turns with the same random tokens and the same `train.train_step`, in bf16 where it
helps (autocast); medians of {rounds} rounds. *Share of the peak*: of the card's bf16 arithmetic,
for 6 operations a weight that multiplies, and half of the scores, as causal attention needs.
*Memory*: of the weights, the optimiser and a step. *First step*: seconds until it is done,
compiling included (what was compiled for an earlier model may be used again). Softmax, headnorm,
gated and the two others use torch's kernel, `scaled_dot_product_attention`. For sigmoid and logit
torch has none: their T x T weights are written out in memory.

{speed}

Our aims: at least 45 % of the peak for base with softmax, compiled; the speed of either of the
others; headnorm and gated in at most 1.05 of softmax's time, sigmoid in 1.3.

## Which attention has a sink in text?

{setting}

Held-out loss after a tenth of the steps, on a seed of its own, by learning rate:

{rates}

At the end of the training, on held-out text unless it says random tokens. A head *has a sink* if
its mean attention to the first token is above 0.3; the other columns are those of [the
cures](cures.md). ± is the 95 % interval over seeds:

{ends}

Our margins: a sink in at least {least:.0%} of softmax's heads, and at most {most:.0%} as many under
gated, in each seed.

{verdict}

{figure}
"""


def page(found) -> str:
    runs = found.get("runs", {})
    figure = "![Share of heads with a sink while the models train](gpu.png)"
    return PAGE.format(
        rounds=ROUNDS, least=LEAST, most=MOST, setting=setting(found),
        speed=speed_tables(found["speed"]) if "speed" in found else NOT_YET,
        rates=rates_table(found["rates"]) if "rates" in found else NOT_YET,
        ends=ends_table(runs) if runs else NOT_YET, verdict=verdict(runs),
        figure=figure if runs else NOT_YET)


def setting(found) -> str:
    c, read = found["compared"], found["corpus"]
    return f"""\
{c['num_hidden_layers']} layers of width {c['hidden_size']} learn from {c['steps']:,} steps of
{c['batch_size']} windows of {c['seq_len']} tokens, which begin anywhere and never at `<|bos|>`. The
text is Python source, {read['files']:,} files of {read['bytes'] / 1e6:.1f} MB together:
{read['train_tokens'] / 1e6:.1f} million tokens to learn from, and {read['val_tokens'] / 1e6:.1f}
million, of other files, held out. Left out were copies, and generated files: those that say so in
their first 500 characters or in their name (`_pb2.py`), or have a line of more than 500."""


def speed_tables(speeds) -> str:
    parts = []
    for shape, modes in speeds.items():
        for mode, there in modes.items():
            parts += [f"**{shape}, {mode}**, {there['B']} windows of {there['T']} tokens, "
                      f"{there['device']}:", speed_table(there)]
    return "\n\n".join(parts)


def speed_table(there) -> str:
    peak, rows = PEAKS.get(there["device"]), []
    speeds = {name: median(case["rates"]) for name, case in there["cases"].items()}
    softmax = speeds.get("softmax", math.nan)
    for name, rate in speeds.items():
        case, share = there["cases"][name], "-"
        if peak and name in ATTENTIONS:  # the others have other weights
            share = f"{rate * there['flops'] / peak:.0%}"
        rows.append([name, f"{rate / 1000:,.0f}", f"{softmax / rate:.2f}", share,
                     f"{case['memory'] / 1e9:.1f}", f"{case['first_step']:.1f}"])
    head = ("", "thousand tokens a second", "time, softmax = 1", "share of the peak",
            "memory, GB", "first step, s")
    return runner.markdown(head, rows)


def rates_table(rates) -> str:
    def cell(attn, lr):
        loss = rates[attn].get(f"{lr:g}", {}).get("val_loss")
        return f"{loss:.3f}" if loss else "-"
    return runner.grid(("", *map(str, RATES)), rates, RATES, cell)


def heads(run, windows="text") -> float:
    """The share of heads that have a sink at the end of a run."""
    return fmean(chain["sink_rate"] for chain in run[windows])


def ends_table(runs) -> str:
    rows = []
    for attn, seeds in runs.items():
        runs_of = list(seeds.values())
        row = [attn, str(len(seeds)), f"{runs_of[0]['lr']:g}"]
        for windows in ("text", "random"):
            row.append(interval_words([100 * heads(run, windows) for run in runs_of]))
        for key in ("sink", "norm_ratio", "dominance", "drain"):
            row.append(interval_words([fmean(c[key] for c in run["text"]) for run in runs_of]))
        loss = fmean(fmean(run["losses"]) for run in runs_of)
        rows.append([*row, f"{loss:.3f}", gap(seeds, runs.get("softmax", {}))])
    head = ("", "seeds", "learning rate", "% of heads with a sink", "the same, random tokens",
            "attention of the strongest head", "length of token 0", "DomRatio",
            "length of its value", "loss", "minus softmax")
    return runner.markdown(head, rows)


def gap(seeds, base) -> str:
    """Loss minus softmax's, of the same seeds."""
    both = seeds.keys() & base.keys()
    gaps = [fmean(seeds[seed]["losses"]) - fmean(base[seed]["losses"]) for seed in both]
    if seeds is base or not gaps:
        return "-"
    spread = f" ± {runner.half_interval(gaps):.3f}" if len(gaps) > 1 else ""
    return f"{fmean(gaps):+.3f}{spread}"


def verdict(runs) -> str:
    """What the margins say, seed by seed."""
    lines = []
    for seed in map(str, SEEDS):
        shares = {attn: heads(runs[attn][seed]) for attn in runs if seed in runs[attn]}
        told = ", ".join(f"{attn} {share:.0%}" for attn, share in shares.items())
        if not {"softmax", "gated"} <= shares.keys():
            said = NOT_YET
        elif shares["softmax"] < LEAST:
            said = "softmax has too few sinks to tell of a cure"
        else:
            most = shares["gated"] <= MOST * shares["softmax"]
            said = f"softmax has sinks, gated {'within' if most else 'above'} its margin"
        lines.append(f"- seed {seed}: {said}" + (f" ({told})" if told else ""))
    return "\n".join(lines)


@figures.styled
def draw(runs):
    """The share of heads with a sink over the steps, in each run, on text and random tokens."""
    figure, axes = figures.new(3.2, 1, 2)
    titles = {"links": "Held-out text", "links_random": "Random tokens"}
    for ax, (kind, title) in zip(axes, titles.items()):
        for style, (attn, seeds) in zip(figures.STYLES, runs.items()):
            for label, run in zip([attn, *["_"] * len(seeds)], seeds.values()):
                figures.track(ax, run["log"], lambda row: row[kind]["sink_rate"], label=label,
                              **style | {"ms": 3, "lw": 1})
        figures.dress(ax, title, {}, xlabel="step", ylabel="heads with a sink")
        ax.yaxis.set_major_formatter(figures.PERCENT)
        ax.set_ylim(0)
    return figure


def render(folder) -> None:
    """gpu.md and gpu.png beside gpu.json, if that is there."""
    file = folder / "gpu.json"
    if not file.exists():
        print(f"{file} is not there: nothing was measured on a GPU, and there is no page to write")
        return
    found = read_json(file)
    written = page(found)
    write_atomically(folder / "gpu.md", lambda part: part.write_text(written, encoding="utf-8"))
    if "runs" in found:
        figures.save(folder / "gpu.png", draw(found["runs"]))


def main(words=None) -> int:
    parser = Parser("-m tests.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=math.inf, help="end within this time")
    parser.add_argument("--out", metavar="FOLDER", help="of gpu.json, gpu.md and gpu.png (default: "
                        "tests/results)")
    parser.add_argument("--render", action="store_true", help="measure nothing: only the page")
    parser.add_argument("--toy", action="store_true", help="every path at no size, on a CPU; kept "
                        "in out/gpu-toy")
    args = parser.parse_args(words)
    if args.render:
        render(Path(args.out or RESULTS))
        return 0
    place = toy() if args.toy else real()
    place.deadline = time.monotonic() + 60 * args.minutes
    folder = Path(args.out or place.known.parent)
    stance = "force_eager" if args.toy else "default"  # to compile takes minutes on a CPU
    with torch.compiler.set_stance(stance):
        failed = measure(place, folder / "gpu.json")
    render(folder)
    return min(failed, 1)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # what was printed before a kill is not lost
    sys.exit(program("tests.gpu", main))
