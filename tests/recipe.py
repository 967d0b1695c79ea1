"""Find and check the recipe: every run that stands behind the defaults of train.py.

    python -m tests.recipe                 train what is missing (resumable), then write tables and figures
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
from dataclasses import replace
from pathlib import Path

import torch

import probe
import train
from model import record
from tests import bench
from train import Run

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RUNS = Path("out/recipe")
PAGES = [HERE.parent / "README.md", HERE.parent / "chapters" / "README.md", RESULTS / "recipe.md", RESULTS / "claims.md"]

ATTENTIONS = ("softmax", "headnorm", "sigmoid")
GRID = {"tiny": {"softmax": (1.25e-3, 2.5e-3, 5e-3), "headnorm": (1.25e-3, 2.5e-3, 5e-3), "sigmoid": (2.5e-3, 5e-3, 1e-2)},
        "micro": dict.fromkeys(ATTENTIONS, (2.5e-3, 5e-3, 1e-2))}
MICRO_LONG_LR = {"headnorm": 1e-2, "sigmoid": 5e-3}  # the best of the grid at 6,000 steps, where it is another than at 3,000
TARGETS = {"sink_rate": 0.2, "sink_best_layer_rate": 0.5, "norm_ratio": 5.0, "dom_first_over_rest": 3.0}
KEPT = ("variance_ratio_raw", "spread_ratio", "neuron_share_top5", "neuron_share_rest", "norm_ratio", "dom_ratio_first",
        "dom_ratio_rest", "dom_ratio_max", "norm_direction_cos", "lock_cos", "lock_positive", "lock_gap", "sink_rate",
        "sink_best_layer_rate", "sink_alpha_max", "sink_alpha_mean", "sink_alpha_raw", "value_drain")
KINDS = {"links_bos": "`<\\|bos\\|>`", "links": "ordinary", "links_rest": "nothing to copy"}
SEEDS = 5


def plan() -> dict[str, list[Run]]:
    """Part -> runs. Seed 0 of a default is also one of its grid: it is trained once."""
    def run(prefix, attn, seed, **more):
        full = train.resolve(Run(attn=attn, seed=seed, **more))
        return replace(full, out=str(RUNS / f"{prefix}{attn}-{full.lr:g}-{seed}"))

    def lane(size, prefix, best={}, **more):
        grid = [run(prefix, attn, 0, size=size, lr=lr, **more) for attn in ATTENTIONS for lr in GRID[size][attn]]
        return grid, [run(prefix, attn, seed, size=size, lr=best.get(attn), **more) for seed in range(SEEDS) for attn in ATTENTIONS]
    (grid, default), (micro_grid, micro), (long_grid, long) = lane("tiny", ""), lane("micro", "micro-"), lane("micro", "micro-long-", MICRO_LONG_LR, steps=6000)
    ordinary = dict(bos=0.5, lr=5e-3, repeat=0.5, num_hidden_layers=4, batch_size=16, weight_decay=0.1, initializer_range=0.08, steps=8000)
    return {"default": default, "micro": micro, "grid": grid, "micro-grid": micro_grid,
            "long": [run("long-", "softmax", seed, steps=8000) for seed in range(3)],
            "short": [run("short-", "softmax", seed, steps=1500) for seed in range(2)],
            "minute": [run("short-", "softmax", seed, steps=1500, lr=5e-3) for seed in range(SEEDS)],
            "micro-long": long, "micro-long-grid": long_grid,
            "micro-long-fast": [run("micro-long-", "softmax", seed, size="micro", steps=6000, lr=MICRO_LONG_LR["headnorm"]) for seed in range(3)],
            "ordinary": [run("ordinary-", attn, 0, **ordinary) for attn in ("softmax", "headnorm")]}


def train_parts(parts, jobs: int) -> list[Run]:
    """Train what is missing of these parts; all their runs."""
    runs = [run for part in parts for run in plan()[part]]
    train.trained(*runs, jobs=jobs)
    return runs


def finished(run: Run) -> list[dict]:
    """The evaluations of a run that reached its last step, else nothing."""
    rows = train.read_log(run.out)
    return rows if rows and rows[-1]["step"] == run.steps else []


def environment(run: Run) -> dict:
    """Versions and hardware of a run."""
    config = json.loads((Path(run.out) / "config.json").read_text())
    return {key: value for key, value in config["environment"].items() if key != "git"}


def collect() -> dict:
    """All finished runs by name: parts of the plan, command, final numbers, where they ran, and (except
    for the grids) the links over the steps."""
    runs = {}
    for part, wanted in plan().items():
        for run in wanted:
            name, rows = Path(run.out).name, finished(run)
            if name in runs:
                runs[name]["parts"].append(part)
            elif rows:
                config = json.loads((Path(run.out) / "config.json").read_text())
                runs[name] = {"parts": [part], "command": "python train.py " + train.as_flags(run),
                              **{key: config["run"][key] for key in ("attn", "lr", "seed")}, "parameters": config["parameters"],
                              "optimal_loss": config["optimal_loss"],
                              "seconds": rows[-1]["seconds"], "tokens": rows[-1]["tokens"], "bpb": rows[-1].get("bpb"),
                              "val_loss": rows[-1]["val_loss"], **short(rows[-1]), "environment": environment(run)}
                if "grid" not in part:
                    runs[name]["history"] = [{"step": row["step"], "val_loss": round(row["val_loss"], 5), **short(row)} for row in rows]
    return runs


def short(row: dict) -> dict:
    """The links of an evaluation that the tables and the figure use."""
    return {kind: {key: row[kind][key] and round(row[kind][key], 5) for key in KEPT} for kind in KINDS if kind in row}


def draw_maps(folders: dict[str, str], path: Path) -> None:
    """The strongest head of each attention, on held-out windows after <|bos|>, as shares of its row."""
    plt = probe.pyplot()
    figure, axes = plt.subplots(1, len(folders), figsize=(4.2 * len(folders), 4), layout="constrained")
    for axis, (attn, folder) in zip(axes, folders.items()):
        model, corpus, _ = probe.load_run(folder)
        x, _ = corpus.batch(32, 64, torch.Generator().manual_seed(0), split="val", bos=1.0)
        names = [f"{i}.pattern" for i in range(model.cfg.num_hidden_layers)]
        pattern = torch.stack([probe.normalise_rows(a) for a in record(model, x, names)[1].values()])  # (L, N, H, T, T)
        alpha = pattern[..., 0].mean((1, 3))
        layer, head = divmod(alpha.argmax().item(), alpha.shape[1])
        image = probe.draw_attention(axis, pattern[layer, :, head].mean(0), f"{attn}: layer {layer}, head {head}")
    figure.colorbar(image, ax=axes, label="share of a row's attention", shrink=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measure() -> None:
    """Attention maps, chain table and figure of one run of each attention, cut matrix of all seeds of softmax -> tests/results."""
    runs = {attn: [run.out for run in plan()["default"] if run.attn == attn] for attn in ATTENTIONS}
    draw_maps({attn: folders[0] for attn, folders in runs.items()}, RESULTS / "maps.png")
    for name, words in (("chain", [runs[attn][0] for attn in ATTENTIONS]), ("cut", [*runs["softmax"], "--cut"])):
        subprocess.run([sys.executable, "probe.py", *words, f"--out={RUNS / name}"], check=True)
        shutil.copy(RUNS / name / f"{name}.png", RESULTS / f"{name}.png")
    found = json.loads((RUNS / "cut" / "cut.json").read_text())
    keep = ("windows", "tokens", "position", "draws", "kind", "factor", "layer", "criterion", "blocked", "verdicts")
    (RESULTS / "cut.json").write_text(json.dumps({key: found[key] for key in keep}, indent=1) + "\n")


# ---------------------------------------------------------------- tables

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
        for kind, label in KINDS.items():
            if kind in r:
                n = r[kind]
                lines.append(f"| {r['attn']} | {r['lr']:g} | {r['seed']} | {r['seconds']:.0f} | {r['val_loss']:.4f} | {label} | {n['sink_rate']:.2f} "
                             f"| {n['sink_best_layer_rate']:.2f} | {n['sink_alpha_max']:.2f} | {n['norm_ratio']:.1f} "
                             f"| {n['dom_ratio_first']:.1f} / {n['dom_ratio_rest']:.1f} | {n['neuron_share_top5']:.2f} | {n['lock_gap']:.1f} | {n['value_drain']:.2f} |")
    return "\n".join(lines)


def targets(runs: dict) -> str:
    """Markdown: each target, and in how many seeds it holds: one minute, the default, twice its steps, and micro."""
    columns = (("minute", "links_bos", "one minute, `<\\|bos\\|>`"), ("default", "links_bos", "default, `<\\|bos\\|>`"),
               ("long", "links_bos", "8,000 steps, `<\\|bos\\|>`"), ("default", "links", "default, ordinary"),
               ("micro", "links_rest", "micro, ordinary, nothing to copy"), ("micro-long", "links_rest", "the same, 6,000 steps"))
    rows = ["| softmax | at least |" + "".join(f" {label} |" for *_, label in columns), "|---|---|" + "---|" * len(columns)]
    for key, least in TARGETS.items():
        cells = []
        for part, kind, _ in columns:
            values = [r[kind]["dom_ratio_first"] / r[kind]["dom_ratio_rest"] if key == "dom_first_over_rest" else r[kind][key]
                      for r in of(runs, part, "softmax")]
            cells.append(f"{spread(values)}; {sum(v >= least for v in values)} of {len(values)} seeds" if values else "")
        rows.append(f"| {key} | {least:g} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def losses(runs: dict) -> str:
    """Markdown: validation loss by attention at its own learning rate, paired with softmax by seed, for every lane."""
    rows = ["| run | attention | learning rate | seeds | val loss (nats per token) | minus softmax, same seed | seconds on one thread "
            "| strongest head | norm ratio | DomRatio first / rest |", "|---|---|---|---|---|---|---|---|---|---|"]
    for part, kind, label in (("default", "links_bos", "text, `<\\|bos\\|>` first"), ("micro", "links_rest", "micro, ordinary first token"),
                              ("micro-long", "links_rest", "micro, 6,000 steps")):
        softmax = {r["seed"]: r["val_loss"] for r in of(runs, part, "softmax")}
        for attn in ATTENTIONS:
            here = [r for r in of(runs, part, attn) if r["seed"] in softmax]
            if here:
                column = lambda key, digits=2: spread([r[kind][key] for r in here], digits)
                gap = "-" if attn == "softmax" else spread([r["val_loss"] - softmax[r["seed"]] for r in here], 3)
                rows.append(f"| {label} | {attn} | {here[0]['lr']:g} | {len(here)} | {spread([r['val_loss'] for r in here], 3)} | {gap} "
                            f"| {spread([r['seconds'] for r in here], 0)} | {column('sink_alpha_max')} | {column('norm_ratio', 1)} "
                            f"| {column('dom_ratio_first', 1)} / {column('dom_ratio_rest', 1)} |")
    return "\n".join(rows)


def draw_birth(runs: dict, path: Path) -> None:
    """Every link over the steps, all seeds, in both lanes."""
    plt = probe.pyplot()
    shown = (("variance_ratio_raw", "variance: V_0 / median, ordinary first"), ("neuron_share_top5", "neurons: top-5 share, token 0"),
             ("dom_ratio_max", "disparity: DomRatio of token 0"), ("norm_ratio", "norm of token 0 / median"),
             ("lock_gap", "lock: logit of key 0 above others (nats)"), ("sink_alpha_max", "sink: strongest head on token 0"))
    figure, axes = plt.subplots(2, 6, figsize=(21, 6), layout="constrained", sharex="row")
    for row, part, kind, lane in zip(axes, ("default", "micro-long"), ("links_bos", "links_rest"), ("text, <|bos|> first", "micro, 6,000 steps")):
        for axis, (key, title) in zip(row, shown):
            where = "links" if key == "variance_ratio_raw" else kind  # a fixed first token has no variance
            for attn, style in (("softmax", "k-"), ("headnorm", "k:")):
                lines = [r["history"] for r in of(runs, part, attn)]
                for i, history in enumerate(lines):
                    axis.plot([max(1, at["step"]) for at in history], [at[where][key] for at in history], style, lw=1,
                              alpha=0.8 if attn == "softmax" else 0.5, label=f"{attn}, {len(lines)} seeds" if i == 0 else None)
            axis.set(title=title, xscale="log", xlabel="step (log; step 0 drawn at 1)")
            axis.title.set_fontsize(10)
        row[0].set_ylabel(lane)
    axes[0, 0].legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def tables() -> dict[str, str]:
    """The Markdown that stands between `<!-- name -->` and `<!-- end -->`, by name, from the committed JSON."""
    from tests import claims, time_chapters
    runs, cut, speed = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("recipe", "cut", "bench"))
    return {"targets": targets(runs), "losses": losses(runs), **{part: table(runs, part) for part in plan()},
            "glossary": "\n".join(["| number | meaning, k being the position looked at |", "|---|---|",
                                   *(f"| {key} | {text.replace('|', chr(92) + '|')} |" for key, text in probe.glossary())]),
            "cut": verdicts(cut), "speed": "\n\n".join(bench.table(shape) for shape in speed["shapes"].values()), **claims.tables(),
            "chapters": time_chapters.table("chapters/"), "chapters here": time_chapters.table("")}


def fill(text: str, parts: dict[str, str]) -> str:
    """`text` with every marked place filled."""
    for part, content in parts.items():
        text = re.sub(rf"(<!-- {part} -->\n).*?(\n<!-- end -->)", lambda m: m[1] + content + m[2], text, flags=re.S)
    return text


def render() -> None:
    """Bring recipe.json up to date with the runs that are here; write the figure and all tables from the JSON."""
    path, planned = RESULTS / "recipe.json", {Path(run.out).name for runs in plan().values() for run in runs}
    runs = {name: run for name, run in json.loads(path.read_text()).items() if name in planned} | collect()
    path.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items()) + "\n}\n")
    draw_birth(runs, RESULTS / "birth.png")
    for path in PAGES:
        path.write_text(fill(path.read_text(), tables()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=plan(), action="append", help="one part of the plan (may be repeated)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--no-training", action="store_true", help="only write figures and tables from what is there")
    args = parser.parse_args()
    if not args.no_training:
        train_parts(args.only or plan(), args.jobs)
        measure()
    render()


if __name__ == "__main__":
    main()
