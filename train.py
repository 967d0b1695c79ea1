"""Train one decoder: `python train.py --attn headnorm`, or `train(Run(attn="headnorm"))`.

settings -> corpus -> model -> loop -> out/<run>/ with
    config.json   every setting, the model's shape, versions, hardware
    log.jsonl     the same as its first line, then one JSON object per evaluation: losses and every
                  number of the chain
    model.pt      the last state: weights, optimiser, generator of the batches
    curve.png     losses and the birth of the sink over the steps

The order of this file: settings, machine, measuring, the loop, the folder of a run, several runs
at once, sampling, command line.
"""

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # the imports below take seconds, and Ctrl-C ends them in one line too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"train.py: stopped\n"), os._exit(130)))

import argparse
import contextlib
import json
import math
import platform
import re
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

import data
import probe
from data.border import (Live, UserError, crc_is_right, finite, one_writer, open_regular, parts,
                         program, read_bytes, read_json, reason, remove_parts, show,
                         write_atomically, write_json)
from model import ATTENTIONS, GPT, Config

# ---------------------------------------------------------------- settings

SIZES = {  # model and schedule that fit together; each of these can be overridden by its flag
    "tiny": dict(  # its learning rates, and those of micro: tests/recipe.py
        hidden_size=64, intermediate_size=172, num_hidden_layers=6, num_attention_heads=2,
        vocab_size=257, seq_len=64, batch_size=8, steps=4000, threads=1,
        lr=dict(softmax=2.5e-3, headnorm=2.5e-3, sigmoid=5e-3, gated=2.5e-3)),
    "micro": dict(
        hidden_size=64, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=25, seq_len=64, batch_size=16, steps=6000, threads=1,
        lr=dict(softmax=5e-3, headnorm=1e-2, sigmoid=5e-3, gated=5e-3),
        data="copy", bos=0.0, weight_decay=0.1, initializer_range=0.08),
    "small": dict(
        hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5,
        vocab_size=1024, seq_len=256, batch_size=64, steps=10000, lr=2e-3),
    "base": dict(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        vocab_size=1024, seq_len=1024, batch_size=16, steps=20000, lr=6e-4),
}
COMMON = dict(data="stdlib", bos=1.0, weight_decay=0.3)  # of each size that does not say otherwise
MINUTES = {"tiny": 2, "micro": 4}  # of a training, about, on one core of a laptop
LIMITS = dict(  # smallest and largest value; a window of three tokens is the least that has a chain
    steps=(1, 2**31 - 1), batch_size=(1, 2**16), seq_len=(3, 2**16), warmup=(0, 2**31 - 1),
    lr=(1e-30, 1e30), weight_decay=(0, 1e30), bos=(0, 1), repeat=(0, 1), seed=(0, 2**31 - 1),
    vocab_size=(25, 2**16), hidden_size=(8, 2**16), intermediate_size=(8, 2**18),
    num_hidden_layers=(1, 1000), num_attention_heads=(1, 2**14), num_key_value_heads=(1, 2**14),
    initializer_range=(1e-30, 1e30), evals=(1, 10_000), threads=(1, 1024))
MACHINE = ("device", "threads", "dtype", "compile")  # how a run computes, and not what


def setting(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Run:
    """All settings of a training. None means: what `size` or the machine suggests (`resolve`)."""

    attn: str = setting("softmax", "how to attend", ATTENTIONS)
    data: str | None = setting(None, f"{', '.join(data.NAMES)}, or a file or folder of your own "
                               "text (default: stdlib; copy for micro)")
    size: str = setting("tiny", "tiny (laptop CPU, two minutes), micro (the copying task, where "
                        "first tokens are ordinary: about four minutes), small (meant for a laptop "
                        "GPU, not measured), base (one large GPU, not measured)", tuple(SIZES))
    steps: int | None = setting(None, "optimiser steps")
    batch_size: int | None = setting(None, "windows per step")
    seq_len: int | None = setting(None, "tokens per window, T")
    lr: float | None = setting(None, "peak learning rate; after the warm-up a cosine to a tenth")
    warmup: int = setting(100, "steps of linear warm-up")
    weight_decay: float | None = setting(None, "AdamW weight decay of the matrices "
                                         "(default: 0.3; 0.1 for micro)")
    bos: float | None = setting(None, "share of the windows that start with <|bos|>; the others "
                                "start with an ordinary token (default: 1; 0 for micro)")
    repeat: float = setting(0.8, "share of the training windows of text that show one passage over "
                            "and over: heads learn to copy, and to rest")
    seed: int = setting(0, "of initial weights and of batches: the same for every --attn")
    vocab_size: int | None = setting(None, "tokens of the vocabulary that is built from the text; "
                                     "257 is bytes and <|bos|>")
    hidden_size: int | None = setting(None, "model width, C")
    intermediate_size: int | None = setting(None, "FFN width, F")
    num_hidden_layers: int | None = setting(None, "layers")
    num_attention_heads: int | None = setting(None, "query heads, H")
    num_key_value_heads: int | None = setting(None, "key/value heads (default: as many as query "
                                              "heads)")
    initializer_range: float | None = setting(None, "std of the initial weights (default: "
                                              "1/sqrt(hidden_size); 0.08 for micro)")
    tie_word_embeddings: bool = setting(False, "use the embedding as output matrix too")
    evals: int = setting(16, "evaluations: half of them evenly spaced, half log-spaced to see the "
                         "sink's birth")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    threads: int | None = setting(None, "CPU threads (default: 1 for tiny and micro, which gain "
                                  "nothing from more; else the cores, at most 4)")
    dtype: str = setting("auto", "auto (bf16 on CUDA that has it, else fp32), fp32, or bf16 "
                         "autocast", ("auto", "fp32", "bf16"))
    compile: bool = setting(False, "torch.compile the layers: faster after half a minute; needs a "
                            "C++ compiler")
    out: str | None = setting(None, "folder of the run (default: out/<attn>, with the size and "
                              "whatever else was changed: out/micro-softmax-seed1)")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def type_of(f) -> type:
    """The type of a field of Run, without its `| None`."""
    return f.type if isinstance(f.type, type) else f.type.__args__[0]


def resolve(run: Run) -> Run:
    """Fill in what depends on the size, and check all that can be checked without the data. Raises
    UserError, naming the flag."""
    for f in fields(Run):
        check(f, getattr(run, f.name))
    usual = {f.name: f.default for f in fields(Run)} | COMMON | SIZES[run.size]
    if isinstance(usual["lr"], dict):  # tuned for each attention
        usual["lr"] = usual["lr"][run.attn]
    if run.data not in (None, *data.TASKS):  # a text needs all bytes
        usual["vocab_size"] = max(257, usual["vocab_size"])
    full = {n: usual[n] if value is None else value for n, value in asdict(run).items()}
    if full["initializer_range"] is None:
        full["initializer_range"] = full["hidden_size"] ** -0.5
    if full["threads"] is None:
        full["threads"] = min(os.cpu_count() or 1, 4)
    if run.out is None:
        full["out"] = usual_folder(run, usual)
    C, H, K = (full[n] for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if C % (2 * H):
        raise UserError(f"--hidden-size {C} must be a multiple of twice --num-attention-heads {H}: "
                        "each head gets an even share of it")
    if K is not None and H % K:
        raise UserError(f"--num-key-value-heads {K} must divide --num-attention-heads {H}")
    return Run(**full)


def check(f, value) -> None:
    """Raise UserError if this is no value for a field of Run."""
    kind, choices = type_of(f), f.metadata["choices"]
    if value is None and f.default is None:
        return
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f"{flag(f.name)} must be of type {kind.__name__}, not {value!r:.60}")
    if choices and value not in choices:
        raise UserError(f"{flag(f.name)} must be one of {', '.join(choices)}, not {value!r:.60}")
    least, most = LIMITS.get(f.name, (value, value))
    if f.name in LIMITS and not least <= value <= most:
        raise UserError(f"{flag(f.name)} must be from {least} to {most}, not {value!r:.60}")
    if value == "" and f.name in ("out", "data"):
        raise UserError(f"{flag(f.name)} is empty; give a name, or leave the flag out")


def usual_folder(run: Run, usual: dict) -> str:
    """out/<attn>, with the size and whatever else was changed: out/micro-softmax-seed1."""
    name = run.attn if run.size == "tiny" else f"{run.size}-{run.attn}"
    for f in fields(Run):
        value = getattr(run, f.name)
        if f.name in ("attn", "size", "out", *MACHINE) or value in (None, usual[f.name]):
            continue
        value = Path(value).stem if f.name == "data" else value
        name += f"-{f.name}" if value is True else f"-{f.name}{value}"
    return "out/" + re.sub(r"[^\w.+-]", "_", name)[:100]


# ---------------------------------------------------------------- the machine

def pick_device(name: str) -> tuple[torch.device, str]:
    """The device and the reason for it. Raises UserError when the wanted one is absent."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    why = {"cuda": "a CUDA GPU is here", "mps": "an Apple GPU is here", "cpu": "no GPU is here"}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
        return torch.device(name), why[name]
    kind = name.split(":")[0]
    if kind not in there:
        raise UserError(f"--device must be auto, cpu, cuda or mps, not {show(name)!r:.60}")
    if not there[kind]:
        raise UserError(f"--device {name}: torch finds no such device here; leave the flag out")
    try:
        torch.empty(1, device=name)
    except Exception:
        raise UserError(f"--device {name}: torch cannot use it; leave the flag out") from None
    return torch.device(name), "asked for"


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """fp32, or bf16 autocast where the hardware has it: without, it is far slower."""
    has = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
           "cpu": torch.cpu._is_avx512_bf16_supported, "mps": lambda: False}[device.type]()
    if name == "bf16" and not has:
        raise UserError(f"--dtype bf16: this {device.type} has no bf16 instructions and would be "
                        "far slower; use --dtype fp32")
    if name == "bf16" or (name == "auto" and device.type == "cuda" and has):
        return torch.bfloat16, "asked for" if name == "bf16" else "this GPU has it"
    return torch.float32, "asked for" if name == "fp32" else "exact, and fast enough"


def environment(device: torch.device, threads: int) -> dict:
    """Versions and hardware, for config.json. Names no user, host or path."""
    here, git = Path(__file__).parent, None
    with contextlib.suppress(OSError):  # no git on this machine
        words = ["git", "-C", here, "rev-parse", "HEAD"]
        found = subprocess.run(words, capture_output=True, text=True).stdout.strip()
        git = found if (here / ".git").exists() and found else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(), "system": platform.system(),
            "machine": platform.machine(), "cores": os.cpu_count(), "threads": threads,
            "device": name, "git": git}


def check_memory(run: Run, cfg: Config, device: torch.device) -> None:
    """Raise UserError for a training that cannot fit: the system would stop it, or the machine."""
    B, T, C, F = run.batch_size, run.seq_len, cfg.hidden_size, cfg.intermediate_size
    layer = 4 * C * C + 3 * C * F  # weights; each has a gradient and two moments beside it
    weights = 16 * (cfg.num_hidden_layers * layer + 2 * cfg.vocab_size * C)
    states = 4 * B * T * (cfg.num_hidden_layers * (8 * C + 4 * F) + 2 * cfg.vocab_size)
    seen = max(8, PROBE_TOKENS // T) * cfg.num_attention_heads * T * T * 12  # patterns of a layer
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        there = 2**40
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    if weights + states + seen > there:
        need, has = (weights + states + seen) / 1e9, there / 1e9
        raise UserError(f"this training needs about {need:,.0f} GB of memory, and here are "
                        f"{has:,.0f}; use a smaller --batch-size, --seq-len or --hidden-size")


# ---------------------------------------------------------------- measuring

EVAL_TOKENS, PROBE_TOKENS = 16384, 4096  # per evaluation; fixed windows, whatever is trained
FIRST = {"links_bos": "<|bos|>", "links_rest": "first token, nothing to copy",
         "links": "first token"}  # what the windows of each entry of log.jsonl begin with


def evaluation_steps(steps: int, evals: int) -> list[int]:
    """Step 0, the last step, and between them half the evaluations evenly, half log-spaced (but
    none that is within a tenth of an even one)."""
    even = np.linspace(0, steps, evals // 2 + 2).round()
    log = np.geomspace(min(10, steps), steps, evals // 2 + 1).round()
    return sorted({*map(int, even), *(int(s) for s in log if np.abs(even - s).min() > s / 10)})


class Evaluation:
    """The same validation windows at every call and in every run with the same data, T and bos."""

    def __init__(self, corpus, seq_len: int, bos: float, device):
        fixed = torch.Generator().manual_seed(20260511)
        few = max(8, PROBE_TOKENS // seq_len)

        def draw(count, share):
            x, y = corpus.batch(count, seq_len, fixed, split="val", bos=share)
            return x.to(device), y.to(device)

        self.x, self.y = draw(max(1, EVAL_TOKENS // seq_len), bos)
        self.windows = {"links": draw(few, 0.0)[0]}
        if bos > 0:
            self.windows["links_bos"] = draw(few, 1.0)[0]
        if corpus.name == "copy":  # random symbols: nothing to copy, so that every query rests
            random = torch.randint(corpus.bos, (few, seq_len), generator=fixed)
            self.windows["links_rest"] = random.to(device)
        self.bytes_per_token = corpus.bytes_per_token

    @torch.no_grad()
    def __call__(self, model) -> dict:
        """val_loss in nats per token, bpb in bits per byte (text), and the numbers of `probe.chain`
        for windows that start with an ordinary token (`links`), with <|bos|> (`links_bos`, if it
        was trained with some) and, for the copying task, of random symbols (`links_rest`). Of a
        model that has diverged only val_loss, which is then nan or infinite."""
        total = 0.0
        few = max(1, 4096 // self.x.shape[1])  # the logits of more would fill a small GPU
        for x, y in zip(self.x.split(few), self.y.split(few)):
            total += model(x, y)[1].item() * y.numel()
        loss = total / self.y.numel()
        numbers = {"val_loss": loss}
        if not math.isfinite(loss):
            return numbers
        if self.bytes_per_token:
            numbers["bpb"] = loss / math.log(2) / self.bytes_per_token
        try:
            for name, idx in self.windows.items():
                numbers[name] = probe.chain(model, idx)
        except torch.linalg.LinAlgError:  # states so large that their squares overflow
            return {"val_loss": math.nan}
        return finite(numbers)


class Pace:
    """An honest guess of the time to go: steps and evaluations are measured by themselves."""

    def __init__(self, run: Run, at: list[int]):
        self.run, self.at = run, at
        self.steps, self.stepping, self.evaluating = 0, 0.0, 0.0

    def stepped(self, seconds: float) -> None:
        self.steps += 1
        if self.steps > 5:  # the first ones warm up
            self.stepping += seconds

    def rate(self) -> float | None:
        """Tokens per second of training."""
        count = self.steps - 5
        tokens = self.run.batch_size * self.run.seq_len
        return count * tokens / self.stepping if count > 0 and self.stepping else None

    def left(self, step: int) -> float | None:
        """Seconds to go from here."""
        rate = self.rate()
        if rate is None:
            return None
        tokens = (self.run.steps - step) * self.run.batch_size * self.run.seq_len
        return tokens / rate + sum(s > step for s in self.at) * self.evaluating


def live_line(run: Run, step: int, loss: float | None, rate: float | None, left: float | None):
    """step, loss, speed and time to go of a training, while it goes on."""
    speed = f"  {rate:,.0f} tok/s, {timedelta(seconds=round(left))} to go" if rate else ""
    loss = f"  loss {loss:.3f}" if loss is not None else ""
    return f"step {step:,} of {run.steps:,} {step / run.steps:4.0%}{loss}{speed}"


def row_line(run: Run, row: dict, rate: float | None, left: float | None) -> str:
    """The line of an evaluation: losses, speed and time to go, and the head of each link."""
    bpb = f" ({row['bpb']:.3f} bits/byte)" if "bpb" in row else ""
    loss = f"loss {row['train_loss']:.3f} " if row["train_loss"] is not None else ""
    speed = f" | {rate:,.0f} tok/s, {timedelta(seconds=round(left))} to go" if rate else ""
    kind = next(kind for kind in FIRST if kind in row)
    return (f"step {row['step']:>6,} {row['step'] / run.steps:4.0%} | {loss}val "
            f"{row['val_loss']:.3f}{bpb}{speed} | {FIRST[kind]}: {probe.headlines(row[kind])}")


# ---------------------------------------------------------------- the loop

def learning_rate(step: int, run: Run) -> float:
    """Linear warm-up, then a cosine from lr to lr / 10 at the last step."""
    warm = min(1.0, (step + 1) / max(1, run.warmup))
    return run.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / run.steps))


def make_optimizer(model: GPT, run: Run, device) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.95); weight decay on matrices only, not on the gains of the norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": run.weight_decay},
              {"params": gains, "weight_decay": 0.0}]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.95), fused=fused)


@dataclass
class Result:
    """What `train` leaves: the folder, its evaluations (rows of log.jsonl), and what it trained."""

    folder: Path
    log: list[dict] = field(repr=False)
    finished: bool
    seconds: float  # of training, evaluations included
    model: GPT = field(repr=False)
    corpus: data.Corpus = field(repr=False)

    @property
    def final(self) -> dict:
        return self.log[-1] if self.log else {}


class State:
    """All that changes while a model is trained: what a checkpoint holds, and the log."""

    def __init__(self, run: Run, cfg: Config, device, saved: dict | None = None):
        self.run, self.folder = run, Path(run.out)
        if saved is None:
            model = GPT(cfg, seed=run.seed)
        else:
            model = GPT.from_weights(cfg, saved["model"], show(self.folder / "model.pt"))
        self.model = model.to(device)
        self.optimizer = make_optimizer(self.model, run, device)
        self.batches = torch.Generator().manual_seed(run.seed + 1)
        self.step, self.smooth, self.seconds, self.log = 0, None, 0.0, []
        if saved is not None:
            self.restore(saved)

    def restore(self, saved: dict) -> None:
        """Everything but the weights. The optimiser writes into its moments without looking, so
        they must fit; its learning rates and all the like come from the run. Raises UserError."""
        path = self.folder / "model.pt"
        groups = self.optimizer.state_dict()["param_groups"]
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = saved["optimizer"] if saved["step"] else {}
        if saved["step"] > self.run.steps or len(moments) not in (0, len(params)):
            raise bad_checkpoint(path, "it is not of this run")
        for i, moment in moments.items():
            wanted = {"step": (), "exp_avg": params[i].shape, "exp_avg_sq": params[i].shape}
            if {name: tuple(t.shape) for name, t in moment.items()} != wanted:
                raise bad_checkpoint(path, f"the moments of parameter {i} have the wrong shape")
            if not all(t.isfinite().all() for t in moment.values()):
                raise bad_checkpoint(path, f"the moments of parameter {i} are not finite")
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.batches.set_state(saved["batches"])
        self.step, self.smooth, self.seconds = (saved[n] for n in ("step", "smooth", "seconds"))
        self.log = [row for row in read_log(self.folder) if row["step"] <= self.step]

    def save(self, header: dict) -> None:
        """log.jsonl, then model.pt: a kill between them costs the log nothing."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged("model")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "batches": self.batches.get_state(), "step": self.step, "smooth": self.smooth,
                 "seconds": self.seconds}
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in (header, *self.log))
        write_atomically(self.folder / "log.jsonl", lambda part: part.write_text(lines))
        write_atomically(self.folder / "model.pt", lambda part: torch.save(state, part))

    def diverged(self, what: str) -> UserError:
        return UserError(
            f"the {what} is no longer finite at step {self.step}; {show(self.folder)}/model.pt "
            f"keeps the last good state: try a smaller --lr (it was {self.run.lr}) or a longer "
            "--warmup, with --overwrite")


@contextlib.contextmanager
def interrupts():
    """An event that Ctrl-C sets: it is obeyed between two steps, where the state is whole."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def train(run: Run, resume=False, overwrite=False, say=None, live=None) -> Result:
    """Train as `run` says, in the folder run.out; `resume` goes on there, `overwrite` starts anew.

    Every step depends on nothing but the settings: a resumed run ends in the same weights, bit for
    bit on the same machine with as many threads. `say` gets the lines that stay, `live` the numbers
    of each step (those of `live_line`). Ctrl-C saves and returns. Raises UserError.
    """
    run, line = resolve(run), Live()
    say = say or line.say
    live = live or (lambda *numbers: line.show(live_line(run, *numbers)))
    folder = Path(run.out)
    device, why_device = pick_device(run.device)
    dtype, why_dtype = pick_dtype(run.dtype, device)
    check_folder(folder, resume, overwrite)
    torch.set_num_threads(run.threads)
    corpus = load_corpus(run)
    cfg = shape(run, corpus.vocab_size)
    check_memory(run, cfg, device)
    old = read_config(folder)[1] if resume else None
    if old:
        check_corpus(folder, old, corpus)
    make_folder(folder)
    with one_writer(folder), interrupts() as stop:
        check_folder(folder, resume, overwrite)  # from here on nobody else changes it
        there = resume and (folder / "model.pt").exists()  # no: killed before its first save
        saved = load_checkpoint(folder / "model.pt") if there else None
        state = State(run, cfg, device, saved)
        header = make_header(run, cfg, corpus, device, old)

        say(f"{run.attn} attention, {header['parameters']:,} parameters, {run.steps:,} steps of "
            f"{run.batch_size} x {run.seq_len} tokens of {show(run.data)}")
        say(f"device {device} ({why_device}), {str(dtype)[6:]} ({why_dtype}), threads "
            f"{run.threads}, seed {run.seed} -> {show(folder)}/")
        if header["optimal_loss"] is not None:
            say(f"a perfect predictor, who knows the rules of {run.data}, would reach a loss of "
                f"{header['optimal_loss']:.4f}")
        if old:
            say(f"resuming at step {state.step:,}" + new_machine(old, header))

        clear_folder(folder, resume)  # before this line nothing has been written or removed
        if state.step < run.steps:
            write_json(folder / "config.json", header)
        loop(state, corpus, header, dtype, stop, say, live)
        line.clear()
        if state.step < run.steps:
            say(f"stopped at step {state.step:,} and saved; go on with: "
                f"python train.py --resume {show(folder)}")
    draw_curve(folder, state.log, header["optimal_loss"], say)
    finished = state.step >= run.steps
    return Result(folder, state.log, finished, state.seconds, state.model, corpus)


def loop(state: State, corpus, header: dict, dtype, stop, say, live) -> None:
    """From state.step to the last one, or to Ctrl-C; the state is saved at each evaluation."""
    run, model, optimizer = state.run, state.model, state.optimizer
    device = model.lm_head.weight.device
    evaluation = Evaluation(corpus, run.seq_len, run.bos, device)
    at = evaluation_steps(run.steps, run.evals)
    pace = Pace(run, at)
    cast = contextlib.nullcontext()
    if dtype == torch.bfloat16:
        cast = torch.autocast(device.type, torch.bfloat16)
    if run.compile:
        for block in model.layers:  # they are alike: what is compiled for one serves all
            block.compile()

    while True:
        begin = time.perf_counter()
        if state.step in at and not (state.log and state.log[-1]["step"] == state.step):
            row = {"step": state.step, "tokens": state.step * run.batch_size * run.seq_len,
                   "seconds": round(state.seconds, 2), "train_loss": state.smooth}
            row |= evaluation(model)
            if not math.isfinite(row["val_loss"]):
                raise state.diverged("validation loss")
            state.log.append(row)
            state.save(header)
            pace.evaluating = time.perf_counter() - begin
            state.seconds += pace.evaluating
            say(row_line(run, row, pace.rate(), pace.left(state.step)))
        if state.step >= run.steps:
            return
        if stop.is_set():
            return state.save(header)

        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.step, run)
        x, y = corpus.batch(run.batch_size, run.seq_len, state.batches,
                            bos=run.bos, repeat=run.repeat)
        with cast:
            loss = model(x.to(device), y.to(device))[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state.step += 1
        if state.step % 10 == 0 or state.step in at:  # .item() waits for a GPU: not at each step
            value = loss.item()
            if not math.isfinite(value):
                raise state.diverged("loss")
            old = state.smooth
            state.smooth = value if old is None else 0.9 * old + 0.1 * value
        seconds = time.perf_counter() - begin
        state.seconds += seconds
        pace.stepped(seconds)
        live(state.step, state.smooth, pace.rate(), pace.left(state.step))


# ---------------------------------------------------------------- the folder of a run

FILES = ("model.pt", "curve.png", "log.jsonl", "config.json")  # --overwrite removes them so


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise UserError where no run can be started (or gone on with). Writes nothing."""
    try:
        left = [path.name for path in parts(folder, FILES)]  # of a killed run
        names = {path.name for path in folder.iterdir()} - {".lock", *left}
    except FileNotFoundError:
        names = set()
    except (OSError, ValueError) as error:
        raise UserError(f"{show(folder)} cannot be a run's folder ({reason(error)}); "
                        "choose another --out") from None
    if resume and "config.json" not in names:
        raise UserError(f"{show(folder)} holds no run to resume; "
                        "start one without --resume") from None
    if resume or not names:
        return
    try:
        ours = read_json(folder / "config.json").keys() >= {"run", "model", "environment"}
    except UserError:
        ours = False
    if not ours:
        raise UserError(f"{show(folder)} holds files that are no run of train.py; "
                        "choose another --out")
    if not overwrite:
        raise UserError(f"{show(folder)} already holds a run; go on with --resume {show(folder)}, "
                        "start anew with --overwrite, or choose another --out")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {show(folder)} ({reason(error)}); "
                        "choose another --out") from None


def clear_folder(folder: Path, resume: bool) -> None:
    """Remove what a killed run has left and, unless it is resumed, the old run."""
    remove_parts(folder, FILES)
    for name in () if resume else FILES:
        (folder / name).unlink(missing_ok=True)


def shape(run: Run, vocab_size: int) -> Config:
    same = ("attn", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "initializer_range", "tie_word_embeddings")
    return Config(vocab_size=vocab_size, max_position_embeddings=run.seq_len,
                  **{name: getattr(run, name) for name in same})


def make_header(run: Run, cfg: Config, corpus, device, old: dict | None) -> dict:
    """config.json. A run that goes on elsewhere keeps what is known of where it was before."""
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT(cfg).parameters())
    now = environment(device, run.threads)
    earlier = list((old or {}).get("earlier_environments", []))
    if old and old["environment"] not in (now, *earlier):
        earlier.append(old["environment"])
    return {"run": asdict(run), "model": asdict(cfg), "parameters": count,
            "corpus": corpus.fingerprint(),
            "optimal_loss": corpus.optimal_loss(run.seq_len, run.bos),
            "environment": now, "earlier_environments": earlier}


def new_machine(old: dict, header: dict) -> str:
    """Why the last bits of a resumed run may differ from those of one that was never stopped."""
    was, now = old["environment"], header["environment"]
    changed = [f"{key} {show(str(was.get(key)))} before, now {now[key]}"
               for key in ("torch", "device", "machine", "threads") if was.get(key) != now[key]]
    return f" ({'; '.join(changed)}: the last bits of the weights may differ)" if changed else ""


def read_config(folder) -> tuple[Run, dict]:
    """The settings of a run and its whole config.json. Raises UserError."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{show(folder)} holds no run of train.py (no config.json)")
    raw = read_json(path)
    try:
        known = {f.name: raw["run"][f.name] for f in fields(Run)}
        run = resolve(Run(**known | {"out": str(folder)}))
        if not isinstance(raw["environment"], dict) or not isinstance(raw["corpus"], dict):
            raise UserError("it lacks the environment or the corpus")
        return run, raw
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{show(path)} is not that of a run of train.py ({reason(error)}); "
                        "train it anew") from None


def load_corpus(run: Run) -> data.Corpus:
    return data.load(run.data, seq_len=run.seq_len, vocab_size=run.vocab_size)


def check_corpus(folder, raw: dict, corpus) -> None:
    """Raise UserError if the text is not the one that a run was trained on."""
    if not raw["corpus"].items() <= corpus.fingerprint().items():
        raise UserError(f"the text of {show(raw['run']['data'])} is no longer the one that "
                        f"{show(folder)} was trained on (another Python has another standard "
                        "library); train it anew")


def bad_checkpoint(path, why: str) -> UserError:
    return UserError(f"{show(path)} cannot be used: {why}; start anew with --overwrite")


def load_checkpoint(path) -> dict:
    """What `State.save` wrote: model {name: (...) float32}, optimizer {index: {name: tensor}},
    batches (a generator's state), step, smooth, seconds. The one door for such files: checked for
    damage, and no code in them runs. Whether the tensors fit a model, `GPT.from_weights` and
    `State.restore` find out, who need it. Raises UserError.
    """
    with open_regular(path, most=2**36) as file:
        size = os.fstat(file.fileno()).st_size
    if not crc_is_right(path):  # torch does not look
        raise bad_checkpoint(path, "it is damaged, or no checkpoint")
    try:  # mapped, because only then are sizes that the file states compared with its own
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = {"model": dict(saved["model"]), "optimizer": dict(saved["optimizer"]["state"]),
                 **{name: saved[name] for name in ("batches", "step", "smooth", "seconds")}}
        weights = [found["model"], *found["optimizer"].values()]
        tensors = [t for group in weights for t in group.values()]
        keys = {*map(type, found["model"]), *map(type, found["optimizer"])}
    except Exception as error:  # torch has a dozen ways to say that this is no checkpoint
        raise bad_checkpoint(path, f"it is no checkpoint ({type(error).__name__})") from None
    plain = all(isinstance(t, torch.Tensor) and t.dtype == torch.float32 and
                t.layout == torch.strided and t.device.type == "cpu" for t in tensors)
    if not plain or sum(t.numel() for t in tensors) > size or not keys <= {str, int}:
        raise bad_checkpoint(path, "a weight or moment is not a plain float32 tensor")
    state = torch.Generator().get_state()
    right = isinstance(found["batches"], torch.Tensor) and found["batches"].dtype == state.dtype
    if not right or found["batches"].shape != state.shape:
        raise bad_checkpoint(path, "the generator's state has the wrong size")
    number = all(type(n) is float and math.isfinite(n) for n in
                 (found["smooth"] or 0.0, found["seconds"]))
    if type(found["step"]) is not int or found["step"] < 0 or not number:
        raise bad_checkpoint(path, "step, loss or seconds is no number")
    for group in weights:  # let go of the file
        for name, tensor in group.items():
            group[name] = tensor.clone(memory_format=torch.contiguous_format)
    return found


def load_run(folder, untrained=False) -> tuple[GPT, data.Corpus, dict]:
    """A folder of `train` -> (model, corpus, settings); untrained: with the weights it started
    from. Raises UserError."""
    run, raw = read_config(folder)
    path = Path(folder) / "model.pt"
    if not untrained and not path.exists():
        raise UserError(f"{show(folder)} has no model.pt: its training never saved; go on with: "
                        f"python train.py --resume {show(folder)}")
    corpus = load_corpus(run)
    if corpus.vocab_size != 257:  # bytes are bytes, whatever the text
        check_corpus(folder, raw, corpus)
    cfg = shape(run, corpus.vocab_size)
    if untrained:
        check_memory(run, cfg, torch.device("cpu"))
        return GPT(cfg, seed=run.seed).eval(), corpus, asdict(run)
    model = GPT.from_weights(cfg, load_checkpoint(path)["model"], show(path))
    return model.eval(), corpus, asdict(run)


def read_log(folder) -> list[dict]:
    """The evaluations of a run, in order of steps; [] without a log. Numbers that were not finite
    are None. Raises UserError."""
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in read_bytes(path).decode().splitlines()[1:]]
        for row in rows:
            if type(row["step"]) is not int or not isinstance(row["links"], dict):
                raise ValueError("a line is no evaluation")
            float(row["val_loss"])
        return rows
    except (UserError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{show(path)} cannot be read ({reason(error)}); remove it to go on "
                        "without the old evaluations") from None


def draw_curve(folder: Path, log: list[dict], optimum: float | None, say) -> None:
    """curve.png: losses, and the numbers of the chain over the steps."""
    try:
        from chapters import figures  # only here: training needs no matplotlib
    except ImportError as error:
        return say(f"no curve.png ({reason(error)})")
    if log:
        figures.curve(folder, log, optimum)


# ---------------------------------------------------------------- several runs at once

WORKER = """import sys
sys.path.insert(0, sys.argv[1])
import train
sys.exit(train.work(sys.argv[2]))"""


def work(settings: str) -> int:
    """One training of `trained`, in a process of its own. Its lines are step and seconds to go."""
    run, last = Run(**json.loads(settings)), 0.0

    def tell(step, loss, rate, left):
        nonlocal last
        if time.monotonic() > last + 0.5:
            last = time.monotonic()
            print(json.dumps([step, left]), flush=True)

    def main():
        resume = (Path(run.out) / "config.json").exists()
        result = train(run, resume=resume, say=lambda line: None, live=tell)
        return 0 if result.finished else 130
    return program("train.py", main)


def is_finished(run: Run) -> bool:
    """Whether the folder of this run holds it, trained to its last step. Raises UserError where it
    holds a run of other settings."""
    if not (Path(run.out) / "config.json").exists():
        return False
    there = read_config(run.out)[0]
    for name, value in asdict(run).items():
        if name not in (*MACHINE, "out") and getattr(there, name) != value:
            raise UserError(f"{show(run.out)} holds a run with {flag(name)} {getattr(there, name)}"
                            f", not {value}; move that folder out of the way")
    path = Path(run.out) / "model.pt"
    return path.exists() and load_checkpoint(path)["step"] == run.steps


def trained(*runs: Run, jobs: int = 2) -> list[Path]:
    """The folders of these runs. What is missing is trained and what was stopped goes on, `jobs` at
    a time, each in a process of its own: models this small gain nothing from a second thread. Says
    first what it trains and for how long, then shows how far each one is. Raises UserError."""
    runs = [resolve(run) for run in runs]
    missing = [run for run in runs if not is_finished(run)]
    if missing:
        train_together(missing, jobs, Live())
    return [Path(run.out) for run in runs]


def train_together(runs: list[Run], jobs: int, line: Live) -> None:
    minutes = sum(MINUTES.get(run.size, 0) * run.steps / SIZES[run.size]["steps"] for run in runs)
    about = f", about {math.ceil(minutes / jobs)} minutes" if minutes else ""
    line.say(f"training {len(runs)} models{about}: {', '.join(show(run.out) for run in runs)}")
    for run in runs:  # built once, and not by two processes at the same time
        load_corpus(run)
    started, news = [], {}

    def one(run):
        settings = json.dumps(asdict(run))
        words = [sys.executable, "-c", WORKER, str(Path(__file__).parent), settings]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as process:
            started.append(process)
            for text in process.stdout:
                step, left = json.loads(text)
                news[run.out] = bar(run, step, left)
                line.show("   ".join(news.values()))
            error = process.stderr.read().strip()
        news.pop(run.out, None)
        if process.returncode:
            raise UserError(f"{show(run.out)}: {error or 'training was stopped'}")

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one, run) for run in runs]
        try:
            for future in waiting:
                future.result()
        except BaseException as error:  # one failed, or Ctrl-C: the others save and stop
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
            if isinstance(error, KeyboardInterrupt):
                raise UserError("stopped and saved; run this again to go on") from None
            raise
        finally:
            line.clear()


def bar(run: Run, step: int, left: float | None) -> str:
    share = step / run.steps
    to_go = f" {timedelta(seconds=round(left))} to go" if left is not None else ""
    return f"{Path(run.out).name} {'#' * round(10 * share):.<10} {share:4.0%}{to_go}"


# ---------------------------------------------------------------- sampling

def write_text(model: GPT, corpus, prompt: str, tokens=200, temperature=0.8, seed=0) -> str:
    """The prompt and what the model writes after it, each token one of the 40 likeliest. Any text
    can be a prompt, of a task any of its symbols. Raises UserError."""
    if not 1 <= tokens <= 100_000:
        raise UserError(f"--tokens must be from 1 to 100000, not {tokens!r:.60}")
    if temperature != 0 and not 0.01 <= temperature <= 100:
        raise UserError(f"--temperature must be 0 or from 0.01 to 100, not {temperature}")
    device = model.lm_head.weight.device
    idx = torch.tensor([[corpus.bos, *corpus.encode(prompt)]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return corpus.decode(model.generate(idx, tokens, temperature, 40, generator)[0, 1:])


def sample(folder, prompt: str | None = None, **how) -> str:
    """`write_text` with the model of a run."""
    model, corpus, _ = load_run(folder)
    return write_text(model, corpus, first_words(corpus) if prompt is None else prompt, **how)


def first_words(corpus) -> str:
    return "import " if corpus.name == "stdlib" else ""


def story(run: Run, result: Result) -> str:
    """What a training has shown, in plain sentences."""
    first, last, corpus = result.log[0], result.final, result.corpus
    text = (f"\nvalidation loss {last['val_loss']:.4f} nats per token after "
            f"{result.seconds:.0f} s; files in {show(result.folder)}/\n")
    best = corpus.optimal_loss(run.seq_len, run.bos)
    if best is not None:
        text += (f"a perfect predictor would reach {best:.4f} on average; the fixed windows of the "
                 "evaluation can be a little easier or harder\n")
    kind = next(kind for kind in FIRST if kind in last)
    before, after = (row[kind]["sink"] or 0.0 for row in (first, last))
    text += (f"{FIRST[kind]}: the strongest head gives it {after:.2f} of its attention, "
             f"{before:.2f} before training ({probe.uniform_sink(run.seq_len):.2f} is what a head "
             "gives that looks everywhere alike)\n")
    if run.bos:
        text += ("a sink on <|bos|> knows its token by name, so this run is no test of a cure; "
                 "--size micro is\n")
    text += f"a sample:\n{write_text(result.model, corpus, first_words(corpus))}\n"
    if corpus.task or run.repeat:
        share = 1.0 if corpus.task else run.repeat
        text += (f"(it repeats itself where it can, because {share:.0%} of the training windows "
                 "show one passage over and over)\n")
    return text + f"\nnext: python probe.py {show(result.folder)}"


# ---------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see python train.py --help")


def parse(words=None) -> dict:
    """The flags that were given, by name."""
    sizes = "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in s.items())}"
                      for name, s in SIZES.items())
    parser = Parser(description="Train one decoder and watch its attention sink being born.",
                    epilog=f"Sizes: {sizes}", argument_default=argparse.SUPPRESS,
                    allow_abbrev=False)
    for f in fields(Run):
        text = f.metadata["help"].replace("%", "%%")
        if f.default is None and "default" not in text:
            text += " (default: by size)"
        if f.default not in (None, False):
            text += f" (default: {f.default})"
        how = dict(action="store_true") if f.default is False else dict(
            type=type_of(f), choices=f.metadata["choices"])
        parser.add_argument(flag(f.name), help=text, **how)
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder, "
                        f"with its settings; only {', '.join(map(flag, MACHINE))} can be given too")
    parser.add_argument("--overwrite", action="store_true",
                        help="throw away the run in --out and start anew")
    parser.add_argument("--sample", metavar="FOLDER",
                        help="do not train: write text with the model in this folder")
    parser.add_argument("--prompt", help="what --sample goes on from")
    parser.add_argument("--tokens", type=int, help="how many --sample writes (default: 200)")
    parser.add_argument("--temperature", type=float,
                        help="of --sample; 0 takes the likeliest token (default: 0.8)")
    return vars(parser.parse_args(words))


SAMPLING = ("prompt", "tokens", "temperature", "seed")


def command(words) -> int:
    given = parse(words)
    for mode, allowed in (("sample", SAMPLING), ("resume", MACHINE)):
        other = [name for name in given if name not in (mode, *allowed)]
        if mode in given and other:
            raise UserError(f"{flag(mode)} takes all else from the folder's config.json: leave "
                            f"{flag(other[0])} out (it goes with {', '.join(map(flag, allowed))})")
    if "sample" in given:
        folder = given.pop("sample")
        check(next(f for f in fields(Run) if f.name == "seed"), given.get("seed", 0))
        print(sample(folder, **given))
        return 0
    for name in SAMPLING[:3]:
        if name in given:
            raise UserError(f"{flag(name)} goes with --sample FOLDER only")
    folder, overwrite = given.pop("resume", None), given.pop("overwrite", False)
    run = Run(**given)
    if folder is not None:
        run = replace(read_config(folder)[0], **given)
    result = train(run, resume=folder is not None, overwrite=overwrite)
    if not result.finished:
        return 130
    print(story(resolve(run), result))
    return 0


def main(words=None) -> int:
    return program("train.py", lambda: command(words))


if __name__ == "__main__":
    sys.exit(main())
