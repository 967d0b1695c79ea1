"""What the chapters share: the models they look at, figures, a table beside the paper's numbers, exercises.

Importing it finds the repository and works in it, from wherever a chapter was started.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import data  # noqa: E402
import probe  # noqa: E402
from train import Run, TrainError, trained  # noqa: E402

torch.set_num_threads(1)  # models this small gain nothing from a second thread
plt = probe.pyplot()

# The models of all chapters. Each is trained once and kept in out/: `python train.py --attn headnorm` makes the second.
RUNS = {"softmax": Run(), "headnorm": Run(attn="headnorm"), "sigmoid": Run(attn="sigmoid"),
        "micro-softmax": Run(size="micro"), "micro-headnorm": Run(size="micro", attn="headnorm")}


def models(*names):
    """The trained models of these names, {name: GPT}. What is missing is trained first, two at a time."""
    try:
        folders = trained(*(RUNS[name] for name in names))
    except TrainError as error:
        sys.exit(f"{error}\nThe chapters use the default settings. Move a run of other settings out of the way.")
    return {name: probe.load_run(folder)[0] for name, folder in zip(names, folders)}


def windows(kind, count=64, seed=0):
    """x, y (count, 64): held-out windows of the standard library after `<|bos|>` ("bos") or from any place
    ("text"), or of the copying task ("copy"); "random bytes" and "random symbols" have nothing to predict."""
    generator = torch.Generator().manual_seed(seed)
    if kind in ("bos", "text"):
        return data.load("stdlib", vocab_size=257, seq_len=64).batch(count, 64, generator, split="val", bos=float(kind == "bos"))
    if kind == "copy":
        return data.load("copy").batch(count, 64, generator, bos=0.0)
    vocab_size = {"random bytes": 257, "random symbols": 25}[kind]
    return probe.draw_windows(count, 64, vocab_size, vocab_size - 1, False, seed)


def show(figure, name):
    """Keep a figure as out/chapters/<name>.png, and show it where this is a notebook."""
    path = Path("out/chapters") / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display
        display(Image(filename=str(path)))
    else:
        print(f"figure: {path}")


def beside(*rows):
    """Print a table of (quantity, what the paper reports, what this run shows)."""
    rows = [("", "the paper", "this run"), *((a, b, probe.number(c) if isinstance(c, float) else str(c)) for a, b, c in rows)]
    wide = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, wide)).rstrip())


def attempt(check, answer):
    """Try a check on your answer, and say what is missing instead of stopping the chapter."""
    try:
        check(answer)
    except Exception as error:  # whatever an unfinished answer raises
        print(f"{check.__name__.removeprefix('check_')}: not yet. {error}")
    else:
        print(f"{check.__name__.removeprefix('check_')}: solved")
