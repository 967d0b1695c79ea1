"""Find and check the recipe: every run that stands behind the defaults of train.py.

    python -m tests.recipe                 train what is missing (resumable), then write the three files
    python -m tests.recipe --only grid     one part of the plan; --jobs 2 runs at a time, one thread each

Then measures (`probe.py`, seed 0 of each attention) and cuts (`probe.py --cut`, all softmax seeds) what it trained.
Writes tests/results/*.json, birth.png (the links over the steps), chain.png and cut.png there, and the tables of
README.md and tests/results/recipe.md. Seeds are 0, 1, 2, ...: none is picked. What must hold was fixed before
the runs (`TARGETS`).
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import bench

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RUNS = HERE.parent / "out" / "recipe"

PARTS = ("grid", "default", "ordinary", "copy")
ATTENTIONS = ("softmax", "headnorm", "sigmoid")
# Learning rates: two for all, and a third on the side where the loss still fell.
GRID = {"softmax": (1.25e-3, 2.5e-3, 5e-3), "headnorm": (1.25e-3, 2.5e-3, 5e-3), "sigmoid": (2.5e-3, 5e-3, 1e-2)}
TARGETS = {"sink_rate": 0.2, "sink_best_layer_rate": 0.5, "norm_ratio": 5.0, "dom_first_over_rest": 3.0}
KEPT = ("variance_ratio_raw", "spread_ratio", "neuron_share_top5", "neuron_share_rest", "norm_ratio", "dom_ratio_first",
        "dom_ratio_rest", "dom_ratio_max", "norm_direction_cos", "lock_cos", "lock_positive", "lock_gap", "sink_rate",
        "sink_best_layer_rate", "sink_alpha_max", "sink_alpha_mean", "sink_alpha_raw", "value_drain")


def plan() -> dict[str, list[tuple[str, list[str]]]]:
    """Part -> [(name, flags of train.py)]."""
    run = lambda attn, seed, *flags: [f"--attn={attn}", f"--seed={seed}", "--threads=1", *flags]
    name = lambda attn, lr, seed: f"{attn}-{lr:g}-{seed}"
    return {  # seed 0 of the default is the grid's best run, so it is trained once
        "grid": [(name(attn, lr, 0), run(attn, 0, f"--lr={lr:g}")) for attn in ATTENTIONS for lr in GRID[attn]],
        "default": [(name(attn, best_lr(attn), seed), run(attn, seed, f"--lr={best_lr(attn):g}"))
                    for seed in range(max(SEEDS.values())) for attn in ATTENTIONS if seed < SEEDS[attn]],
        "ordinary": [(f"ordinary-{attn}-{seed}", run(attn, seed, *ORDINARY)) for seed in range(2) for attn in ("softmax", "headnorm")],
        "copy": [(f"copy-{attn}-{seed}", run(attn, seed, *COPY)) for seed in range(1) for attn in ("softmax", "headnorm")],
    }


SEEDS = {"softmax": 5, "headnorm": 3, "sigmoid": 3}
COPY = ["--data=copy", "--lr=5e-3", "--steps=2500"]
ORDINARY = ["--bos=0.5", "--lr=5e-3", "--repeat=0.5", "--num-hidden-layers=4", "--batch-size=16", "--weight-decay=0.1",
            "--initializer-range=0.08", "--steps=8000"]


def best_lr(attn: str) -> float:
    """The learning rate of the grid with the lowest validation loss; the middle one until the grid is there."""
    losses = {lr: rows[-1]["val_loss"] for lr in GRID[attn] if (rows := finished(f"{attn}-{lr:g}-0"))}
    return min(losses, key=losses.get) if len(losses) == len(GRID[attn]) else GRID[attn][1]


def finished(name: str) -> list[dict]:
    """The evaluations of a run that reached its last step, else nothing."""
    path = RUNS / name / "log.jsonl"
    if not path.exists():
        return []
    header, *rows = (json.loads(line) for line in path.read_text().splitlines())
    return rows if rows and rows[-1]["step"] == header["run"]["steps"] else []


def train(job):
    name, flags = job
    if finished(name):
        return
    folder = RUNS / name
    again = ["--resume"] if (folder / "config.json").exists() else []
    print(f"train {name}: {' '.join(flags)}", flush=True)
    done = subprocess.run([sys.executable, "train.py", *flags, f"--out={folder.relative_to(HERE.parent)}", *again],
                          cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} failed: {done.stderr.strip()}", file=sys.stderr, flush=True)


def collect() -> dict:
    """All finished runs by name: parts of the plan, command, final numbers, where they ran, and (except
    for the grid) the links over the steps."""
    runs = {}
    for part, jobs in plan().items():
        for name, flags in jobs:
            rows = finished(name)
            if name in runs:
                runs[name]["parts"].append(part)
            elif rows:
                config = json.loads((RUNS / name / "config.json").read_text())
                runs[name] = {"parts": [part], "command": "python train.py " + " ".join(flags),
                              **{key: config["run"][key] for key in ("attn", "lr", "seed")}, "parameters": config["parameters"],
                              "seconds": rows[-1]["seconds"], "tokens": rows[-1]["tokens"], "bpb": rows[-1].get("bpb"),
                              "val_loss": rows[-1]["val_loss"], **short(rows[-1]),
                              "environment": {key: value for key, value in config["environment"].items() if key != "git"}}
            if rows and part != "grid":
                runs[name]["history"] = [{"step": row["step"], "val_loss": round(row["val_loss"], 5), **short(row)} for row in rows]
    return runs


def short(row: dict) -> dict:
    """The links of an evaluation that the tables and the figure use."""
    return {kind: {key: row[kind][key] and round(row[kind][key], 5) for key in KEPT} for kind in ("links", "links_bos") if kind in row}


def measure() -> None:
    """Chain table and figure of one run of each attention, cut matrix of all seeds of softmax -> tests/results."""
    runs = {attn: [RUNS / name for name, flags in plan()["default"] if f"--attn={attn}" in flags] for attn in ATTENTIONS}
    for name, words in (("chain", [runs[attn][0] for attn in ATTENTIONS]), ("cut", [*runs["softmax"], "--cut"])):
        subprocess.run([sys.executable, "probe.py", *map(str, words), f"--out={RUNS / name}"], cwd=HERE.parent, check=True)
        shutil.copy(RUNS / name / f"{name}.png", RESULTS / f"{name}.png")
    found = json.loads((RUNS / "cut" / "cut.json").read_text())
    keep = ("windows", "tokens", "position", "draws", "kind", "factor", "layer", "criterion", "blocked", "verdicts")
    (RESULTS / "cut.json").write_text(json.dumps({key: found[key] for key in keep}, indent=1) + "\n")


def verdicts(found: dict) -> str:
    """Markdown: every link, in how many seeds it holds, and what its cut takes beside its control."""
    rows = ["| link | holds / partly / no, seeds | share of the effect, strongest intervention | its control |", "|---|---|---|---|"]
    for same in zip(*found["verdicts"].values()):
        count = [sum(v[1] == word for v in same) for word in ("holds", "partly", "no")]
        share, control = ([v[i] for v in same if v[i] is not None] for i in (2, 3))
        cells = [f"{statistics.mean(v):.0%}" + (f" ± {statistics.stdev(v):.0%}" if len(v) > 1 else "") if v else "" for v in (share, control)]
        rows.append(f"| {same[0][0]} | {' / '.join(map(str, count))} of {len(same)} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def spread(values, digits=2) -> str:
    mean = statistics.mean(values)
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def of(runs: dict, part: str, attn: str | None = None) -> list[dict]:
    return [r for r in runs.values() if part in r["parts"] and attn in (None, r["attn"])]


def table(runs: dict, part: str) -> str:
    """Markdown: one row a run and kind of window."""
    head = ("| attention | learning rate | seed | seconds | val loss | windows | sink rate | best layer | strongest head | norm ratio "
            "| DomRatio first / rest | top-5 share | lock gap | value drain |")
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for r in of(runs, part):
        for kind, label in (("links_bos", "`<\\|bos\\|>`"), ("links", "ordinary")):
            if kind in r:
                n = r[kind]
                lines.append(f"| {r['attn']} | {r['lr']:g} | {r['seed']} | {r['seconds']:.0f} | {r['val_loss']:.4f} | {label} | {n['sink_rate']:.2f} "
                             f"| {n['sink_best_layer_rate']:.2f} | {n['sink_alpha_max']:.2f} | {n['norm_ratio']:.1f} "
                             f"| {n['dom_ratio_first']:.1f} / {n['dom_ratio_rest']:.1f} | {n['neuron_share_top5']:.2f} | {n['lock_gap']:.1f} | {n['value_drain']:.2f} |")
    return "\n".join(lines)


def targets(runs: dict) -> str:
    """Markdown: each target, and in how many seeds of the default (softmax) it holds."""
    rows = ["| softmax, default settings | at least | `<\\|bos\\|>` windows | ordinary windows |", "|---|---|---|---|"]
    for key, least in TARGETS.items():
        cells = []
        for kind in ("links_bos", "links"):
            values = [r[kind]["dom_ratio_first"] / r[kind]["dom_ratio_rest"] if key == "dom_first_over_rest" else r[kind][key]
                      for r in of(runs, "default", "softmax")]
            cells.append(f"{spread(values)}; holds in {sum(v >= least for v in values)} of {len(values)} seeds" if values else "")
        rows.append(f"| {key} | {least:g} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def losses(runs: dict) -> str:
    """Markdown: validation loss by attention at its own best learning rate, paired with softmax by seed."""
    rows = ["| attention | learning rate | seeds | val loss (nats per byte) | minus softmax, same seed | seconds on one thread "
            "| strongest head on `<\\|bos\\|>` | norm ratio | DomRatio first / rest |", "|---|---|---|---|---|---|---|---|---|"]
    softmax = {r["seed"]: r["val_loss"] for r in of(runs, "default", "softmax")}
    for attn in ATTENTIONS:
        here = [r for r in of(runs, "default", attn) if r["seed"] in softmax]
        if here:
            column = lambda key, digits=2: spread([r["links_bos"][key] for r in here], digits)
            gap = "-" if attn == "softmax" else spread([r["val_loss"] - softmax[r["seed"]] for r in here], 4)
            rows.append(f"| {attn} | {here[0]['lr']:g} | {len(here)} | {spread([r['val_loss'] for r in here], 4)} | {gap} "
                        f"| {spread([r['seconds'] for r in here], 0)} | {column('sink_alpha_max')} | {column('norm_ratio', 1)} "
                        f"| {column('dom_ratio_first', 1)} / {column('dom_ratio_rest', 1)} |")
    return "\n".join(rows)


def draw_birth(runs: dict, path: Path) -> None:
    """Every link over the steps, each as a share of its way from the untrained model to its largest value, all seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shown = (("variance_ratio_raw", "variance: V of position 0 / median (ordinary windows)", "links"),
             ("neuron_share_top5", "neurons: top-5 share of the write at token 0", "links_bos"),
             ("dom_ratio_first", "disparity: DomRatio of token 0", "links_bos"), ("norm_ratio", "norm of token 0 / median", "links_bos"),
             ("lock_gap", "lock: logit of key 0 above the others (nats)", "links_bos"), ("sink_alpha_max", "sink: strongest head on token 0", "links_bos"))
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained", sharex=True)
    for axis, (key, title, kind) in zip(axes.flat, shown):
        for attn, style in (("softmax", "k-"), ("headnorm", "k:")):
            lines = [r["history"] for r in of(runs, "default", attn)]
            for i, history in enumerate(lines):
                axis.plot([max(1, row["step"]) for row in history], [row[kind][key] for row in history], style, lw=1,
                          alpha=0.8 if attn == "softmax" else 0.5, label=f"{attn}, {len(lines)} seeds" if i == 0 else None)
        axis.set(title=title, xscale="log", xlabel="step")
        axis.title.set_fontsize(10)
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tables() -> dict[str, str]:
    """The Markdown that stands between `<!-- name -->` and `<!-- end -->`, by name, from the committed JSON."""
    runs, cut, speed = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("recipe", "cut", "bench"))
    return {"targets": targets(runs), "losses": losses(runs), **{part: table(runs, part) for part in PARTS},
            "cut": verdicts(cut), "speed": "\n\n".join(bench.table(shape) for shape in speed["shapes"].values())}


def fill(text: str, parts: dict[str, str]) -> str:
    """`text` with every marked place filled."""
    for part, content in parts.items():
        text = re.sub(rf"(<!-- {part} -->\n).*?(\n<!-- end -->)", lambda m: m[1] + content + m[2], text, flags=re.S)
    return text


def write(runs: dict) -> None:
    (RESULTS / "recipe.json").write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in runs.items()) + "\n}\n")
    draw_birth(runs, RESULTS / "birth.png")
    for path in (RESULTS / "recipe.md", HERE.parent / "README.md"):
        path.write_text(fill(path.read_text(), tables()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="one part of the plan (may be repeated)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--no-training", action="store_true", help="only write figure and tables from what is there")
    args = parser.parse_args()
    for part in ([] if args.no_training else args.only or PARTS):
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(train, plan()[part]))
    if not args.no_training:
        measure()
    write(collect() if RUNS.exists() else json.loads((RESULTS / "recipe.json").read_text()))


if __name__ == "__main__":
    main()
