"""Train one decoder: `python train.py --attn headnorm`, or `train(Run(attn="headnorm"))`.

    settings -> corpus -> model -> loop -> out/<run>/ (its files: data/runs.py)

In this order: settings, measuring, the state of a training, the loop, a trained model, the command
line.
"""

import os

# before torch, as in probe.py
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import json
import math
import re
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from tqdm.auto import tqdm

import data
import probe
from data.common import (OUT, Parser, UserError, environment, interrupts, multiplies_bf16,
                         nan_to_none, one_writer, pick_device, plain_torch, program, read_json,
                         reason, write_atomically, write_json)
from data.runs import (FILES, MEASURED, check_folder, corpus_of, load_checkpoint, read_config,
                       read_film, read_log)
from model import ATTENTIONS, GPT, Config

# ---------------------------------------------------------------- settings

SIZES = {  # model and schedule that fit together; a flag overrides any of them
    "micro": dict(  # copying, whose sink is of use; how it was found: tests/results/cures.md
        hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=33, seq_len=64, batch_size=16, steps=4000, lr=5e-3, threads=1,
        data="copy", bos=0.0, weight_decay=0.1, initializer_range=0.08),
    "rest": dict(  # heads that must rest; how it was found: tests/results/rest.md
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=17, seq_len=16, batch_size=64, steps=1500, lr=5e-3, threads=1,
        data="rest", bos=0.0, weight_decay=0.1, initializer_range=0.08),
    "tiny": dict(  # text; its learning rates: tests/results/recipe.md
        hidden_size=64, intermediate_size=172, num_hidden_layers=6, num_attention_heads=2,
        vocab_size=257, seq_len=64, batch_size=8, steps=4000, threads=1,
        lr=dict(softmax=2.5e-3, headnorm=2.5e-3, sigmoid=5e-3, gated=2.5e-3, logit=2.5e-3)),
    "small": dict(
        hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5,
        vocab_size=1024, seq_len=256, batch_size=64, steps=10000, lr=2e-3),
    "base": dict(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        vocab_size=1024, seq_len=1024, batch_size=16, steps=20000, lr=6e-4),
}
SIZE_OF = {None: "rest", "rest": "rest", "copy": "micro"}  # by data; tiny for a text
READOUT_OF = {"rest": "attn_out"}  # by data; final for all other
COMMON = dict(data="stdlib", bos=1.0, weight_decay=0.3)  # of each size that does not say otherwise
MINUTES = {"rest": 1, "micro": 2, "tiny": 2}  # of a training, about, on one core of a laptop
MACHINE = ("device", "threads", "compile")  # do not change the result, up to rounding
LEAST = {"steps": 1, "batch_size": 1, "seq_len": 3, "lr": 0, "weight_decay": 0, "evals": 0,
         "initializer_range": 0, "threads": 1}
WIDE = 128  # C from which on a CPU compiles by default; narrower models gain little
SHORT = 512  # T up to which attention, compiled for a CPU, is faster written out than as a kernel


def setting(default, help, choices=None):
    """A field of Run and the help of its flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Run:
    """All settings of a training. None means: what `size` or the machine suggests (`resolve`)."""

    attn: str = setting("softmax", "how to attend", ATTENTIONS)
    size: str | None = setting(None, "rest: heads that must rest, a minute on a laptop; micro: "
                               "copying, tiny: text after <|bos|>, two minutes each; small, base: "
                               "for a GPU, not measured (default: what fits --data, or rest)",
                               tuple(SIZES))
    data: str | None = setting(None, f"{', '.join(data.NAMES)}, or your own text: a file or folder")
    steps: int | None = setting(None, "optimiser steps")
    batch_size: int | None = setting(None, "windows per step")
    seq_len: int | None = setting(None, "tokens per window, T")
    lr: float | None = setting(None, "learning rate: a cosine to a tenth of it, times the warm-up")
    warmup: int = setting(100, "steps of linear warm-up")
    weight_decay: float | None = setting(None, "AdamW's weight decay of the matrices")
    bos: float | None = setting(None, "share of the windows that start with <|bos|>; not for rest")
    repeat: float = setting(0.8, "share of the training windows of text that repeat one passage")
    seed: int = setting(0, "of weights and batches: the same for every --attn")
    vocab_size: int | None = setting(None, "of text; 257 is bytes and <|bos|>")
    hidden_size: int | None = setting(None, "model width, C")
    intermediate_size: int | None = setting(None, "FFN width, F")
    num_hidden_layers: int | None = setting(None, "layers")
    num_attention_heads: int | None = setting(None, "query heads, H")
    num_key_value_heads: int | None = setting(None, "key/value heads (default: H)")
    initializer_range: float | None = setting(None, "spread of the first matrices (default: "
                                             "1/sqrt(C); rest and micro: 0.08)")
    evals: int = setting(16, "evaluations: half evenly spaced, half log-spaced")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    threads: int | None = setting(None, "CPU threads (default: 1; small and base: up to 4)")
    compile: bool | None = setting(None, f"torch.compile (default: on a CPU from width {WIDE} on)")
    out: str | None = setting(None, "folder (default: out/<attn>, with whatever else was changed)")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(run: Run) -> Run:
    """Fill in what depends on the size, and check the numbers. Raises UserError."""
    run = replace(run, size=run.size or SIZE_OF.get(run.data, "tiny"))
    for name, known in (("attn", ATTENTIONS), ("size", SIZES)):
        if getattr(run, name) not in known:
            raise UserError(f"{flag(name)} must be one of {', '.join(known)}")
    usual = {f.name: f.default for f in fields(Run)} | COMMON | SIZES[run.size]
    if isinstance(usual["lr"], dict):  # tuned for each attention
        usual["lr"] = usual["lr"][run.attn]
    if run.data == "rest":  # of any size: it has no <|bos|>
        usual["bos"] = 0.0
    if run.data not in (None, *data.TASKS):  # a text needs all bytes
        usual["vocab_size"] = max(257, usual["vocab_size"])
    missing = {name: value for name, value in usual.items() if getattr(run, name) is None}
    full = replace(run, **missing)
    if full.initializer_range is None:
        full.initializer_range = max(1, full.hidden_size) ** -0.5
    if full.threads is None:
        full.threads = min(os.cpu_count() or 1, 4)
    full.out, full.data = str(full.out or usual_folder(run, usual)), str(full.data)
    for name, least in LEAST.items():
        if not getattr(full, name) >= least:
            raise UserError(f"{flag(name)} must be at least {least}")
    for name in ("bos", "repeat"):
        if not 0 <= getattr(full, name) <= 1:
            raise UserError(f"{flag(name)} is a share of the windows, from 0 to 1")
    unused = {"copy": ("vocab_size", "repeat"), "rest": ("vocab_size", "repeat", "bos")}
    for name in unused.get(full.data, ()):
        if getattr(full, name) != usual[name]:
            raise UserError(f"{flag(name)} changes nothing with --data {full.data}; leave it out")
    return full


def usual_folder(run: Run, usual: dict) -> str:
    """out/<attn>, with the size and whatever else was changed."""
    name = run.attn if run.size == "rest" else f"{run.size}-{run.attn}"
    for key, value in asdict(run).items():
        if key in ("attn", "size", *MACHINE) or value in (None, usual[key]):
            continue
        if key == "data":
            value = Path(value).stem
        name += f"-{key}{value}"
    return f"{OUT}/" + re.sub(r"[^\w.+-]", "_", name)[:100]


def changed(run: Run, there: dict) -> list[str]:
    """The settings in which a run differs from those of another; its place and machine are none."""
    return [name for name, value in asdict(run).items()
            if name not in ("out", *MACHINE) and there.get(name) != value]


def model_config(run: Run, corpus) -> Config:
    """The shape of the model that a run trains."""
    same = ("attn", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "initializer_range")
    shape = {name: getattr(run, name) for name in same}
    readout = READOUT_OF.get(run.data, "final")
    return Config(vocab_size=corpus.vocab_size, max_position_embeddings=run.seq_len,
                  readout=readout, **shape)


def load_corpus(run: Run) -> data.Corpus:
    return data.load(run.data, seq_len=run.seq_len, vocab_size=run.vocab_size)


# ---------------------------------------------------------------- measuring

EVAL_TOKENS, PROBE_TOKENS = 16384, 4096  # per evaluation; fixed windows, whatever is trained
KINDS = {"links_bos": "<|bos|>", "links_rest": "first token, nothing to look for",
         "links": "first token"}  # what stands first in the windows, by key of log.jsonl


def evaluation_steps(steps: int, evals: int) -> list[int]:
    """Step 0, the last step, and between them half the evaluations evenly, half log-spaced (but
    none that is within a tenth of an even one)."""
    even = np.linspace(0, steps, evals // 2 + 2).round()
    found = set(map(int, even))
    for step in np.geomspace(min(10, steps), steps, evals // 2 + 1).round():
        if np.abs(even - step).min() > step / 10:
            found.add(int(step))
    return sorted(found)


def held_out(run: Run, corpus, device, more: dict | None = None) -> tuple[tuple, dict]:
    """The windows of every evaluation, the same in every run with the same data, T and bos: (x, y)
    for the loss, and {kind: (x, queries)} for the chain: the KINDS that the data has, and those of
    `more`, {kind: x}, which task rest ignores."""
    T = run.seq_len
    fixed = torch.Generator().manual_seed(20260511)
    many, few = max(1, EVAL_TOKENS // T), max(8, PROBE_TOKENS // T)
    x, y = corpus.batch(many, T, fixed, split="val", bos=run.bos)
    x, y = x.to(device), y.to(device)
    if run.data == "rest":
        return (x, y), {"links_rest": (x[:few], corpus.task.resting(x[:few]))}
    kinds = dict(more or {})
    kinds["links"], _ = corpus.batch(few, T, fixed, split="val", bos=0.0)
    if run.bos > 0:
        kinds["links_bos"], _ = corpus.batch(few, T, fixed, split="val", bos=1.0)
    if corpus.task:
        kinds["links_rest"] = corpus.task.rest(few, T, fixed)
    return (x, y), {kind: (windows.to(device), None) for kind, windows in kinds.items()}


def told_kind(kinds: dict) -> str:
    """Which of the kinds of windows the lines on the terminal speak of."""
    return next(kind for kind in KINDS if kind in kinds)


@torch.no_grad()
def evaluate(model, windows) -> dict:
    """val_loss in nats per token, and for each kind of windows, as `held_out` gives them, the
    numbers of `probe.chain`."""
    (x, y), kinds = windows
    total = 0.0
    few = max(1, 4096 // x.shape[1])  # at most 4,096 tokens a pass, to bound the logits' memory
    for a, b in zip(x.split(few), y.split(few)):
        total += model(a, b)[1].item() * b.numel()
    row = {"val_loss": total / y.numel()}
    if math.isfinite(total):
        for kind, (idx, queries) in kinds.items():
            row[kind] = nan_to_none(probe.chain(model, idx, queries=queries))
    return row


FILMED = 32  # tokens of one window whose maps are kept at each evaluation, for probe.py --page


def frame(model, ids, step) -> dict:
    """One picture of film.npz (data/runs.py): what ids (T,) show after so many steps."""
    seen, = probe.read(model, ids)
    pattern = (seen["pattern"] * 255).round().byte()
    seen |= {"pattern": pattern, "ids": ids.cpu(), "step": torch.tensor(step)}
    return {name: value.numpy() for name, value in seen.items()}


# ---------------------------------------------------------------- the state of a training

def learning_rate(step: int, run: Run) -> float:
    """A cosine from lr to lr / 10 over all steps, times a linear warm-up."""
    warm = min(1.0, (step + 1) / max(1, run.warmup))
    return run.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / run.steps))


def make_optimizer(model: GPT, run: Run, device) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.95); weight decay on matrices only, not on the gains of the norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    gains = [p for p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": run.weight_decay},
              {"params": gains, "weight_decay": 0.0}]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.95), fused=fused)


class Diverged(UserError):
    """The loss is no longer finite."""


class State:
    """A training: settings, corpus, windows of the evaluations (`held_out`), and all that changes,
    which model.pt, log.jsonl and film.npz hold."""

    def __init__(self, run: Run, cfg: Config, corpus, device, saved: dict | None,
                 more: dict | None):
        self.run, self.corpus, self.device = run, corpus, device
        self.folder = Path(run.out)
        self.path = self.folder / "model.pt"
        if saved is None:
            self.model = GPT(cfg, seed=run.seed).to(device)
        else:
            self.model = GPT.from_weights(cfg, saved["model"], self.path).to(device)
        self.optimizer = make_optimizer(self.model, run, device)
        self.batches = torch.Generator().manual_seed(run.seed + 1)
        self.step, self.smooth, self.seconds, self.log = 0, None, 0.0, []
        self.film = []  # a `frame` for each row of the log
        self.windows = held_out(run, corpus, device, more)
        if saved is not None:
            self.restore(saved)

    @property
    def finished(self) -> bool:
        return self.step >= self.run.steps

    def restore(self, saved: dict) -> None:
        """Everything but the weights. Raises UserError."""
        groups = self.optimizer.state_dict()["param_groups"]
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = saved["optimizer"]  # AdamW would write beyond the end of a short one
        found = {i: [m["exp_avg"].shape, m["exp_avg_sq"].shape] for i, m in moments.items()}
        wanted = {i: [p.shape] * 2 for i, p in enumerate(params)} if saved["step"] > 0 else {}
        if found != wanted or saved["step"] > self.run.steps:
            raise UserError(f"{self.path} does not fit its run; start anew with --overwrite")
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.batches.set_state(saved["batches"])
        self.step, self.smooth = saved["step"], saved["smooth"]
        self.seconds = saved["seconds"]
        self.log = [row for row in read_log(self.folder) if row["step"] <= self.step]
        film = read_film(self.folder)
        ids = film.pop("ids", None)
        for values in zip(*film.values()):
            picture = dict(zip(film, values), ids=ids)
            if picture["step"] <= self.step:
                self.film.append(picture)

    def follow(self, loss: float) -> None:
        """The smooth training loss."""
        if not math.isfinite(loss):
            raise self.diverged()
        self.smooth = loss if self.smooth is None else 0.9 * self.smooth + 0.1 * loss

    def save(self, header: dict) -> None:
        """model.pt last: a resumed run drops rows and pictures that are later than it."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "batches": self.batches.get_state(), "step": self.step, "smooth": self.smooth,
                 "seconds": self.seconds}
        rows = [json.dumps(row, allow_nan=False) + "\n" for row in (header, *self.log)]
        write_atomically(self.folder / "log.jsonl", lambda part: part.write_text("".join(rows)))
        if self.film:
            self.save_film()
        write_atomically(self.path, lambda part: torch.save(state, part))

    def save_film(self) -> None:
        arrays = {name: np.stack([picture[name] for picture in self.film])
                  for name in self.film[0]}
        arrays["ids"] = arrays["ids"][0]

        def write(part):
            with open(part, "wb") as file:  # by its name numpy would add .npz
                np.savez_compressed(file, **arrays)
        write_atomically(self.folder / "film.npz", write)

    def diverged(self) -> Diverged:
        return Diverged(f"the loss is no longer finite at step {self.step}; {self.path} keeps the "
                        "last good state: try --overwrite with a smaller --lr (it was "
                        f"{self.run.lr}) or a longer --warmup")


def make_header(state: State) -> dict:
    """config.json."""
    run, corpus = state.run, state.corpus
    optimal = corpus.optimal_loss(run.seq_len, run.bos)
    if run.data == "rest":  # exact, on the very windows of the evaluations
        (x, _), _ = state.windows
        optimal = corpus.task.optimal_loss(x)
    return {"run": asdict(run), "model": asdict(state.model.cfg),
            "parameters": sum(p.numel() for p in state.model.parameters() if p.requires_grad),
            "corpus": corpus.fingerprint(),
            "optimal_loss": optimal,
            "environment": environment(state.device, run.threads)}


# ---------------------------------------------------------------- the loop

@plain_torch()
def train(run: Run, resume=False, overwrite=False, say=tqdm.write, deadline=math.inf,
          more: dict | None = None) -> State:
    """Train as `run` says, in the folder run.out; `resume` goes on there, `overwrite` starts anew.

    Every step depends on nothing but the settings: a resumed run ends in the same weights, bit for
    bit on the same machine with as many threads. `say` gets the lines that stay. Ctrl-C saves and
    returns, and so does `deadline`, a time of time.monotonic(). `more`: windows of which each
    evaluation gives the chain, {key of log.jsonl: x (N, T)}. Raises UserError.
    """
    run = resolve(run)
    folder, (device, why) = Path(run.out), pick_device(run.device)
    torch.set_num_threads(run.threads)
    if resume:
        corpus = corpus_of(read_config(folder), resume=True)
    else:
        check_folder(folder, overwrite)
        corpus = load_corpus(run)
    cfg = model_config(run, corpus)
    settle_compile(run, device, say)
    with one_writer(folder), interrupts() as stop:
        saved = None
        if not resume:
            check_folder(folder, overwrite)  # another training may have ended here meanwhile
        elif (folder / "model.pt").exists():  # not if it was killed before its first save
            saved = load_checkpoint(folder / "model.pt")
        state = State(run, cfg, corpus, device, saved, more)
        header = make_header(state)
        announce(state, header, why, say)
        if not resume:
            for name in (*MEASURED, *FILES):  # until here nothing has been removed or written
                (folder / name).unlink(missing_ok=True)
        if not state.finished:
            write_json(folder / "config.json", header)
        loop(state, header, stop, deadline, say)
        if not state.finished:
            say(f"stopped at step {state.step:,} and saved; go on with: python train.py --resume "
                f"{shlex.quote(run.out)}")
        draw_curve(state, header)
    return state


def announce(state: State, header: dict, why: str, say) -> None:
    run = state.run
    say(f"{run.attn} attention, {header['parameters']:,} parameters, {run.steps:,} steps of "
        f"{run.batch_size} x {run.seq_len} tokens of {run.data}")
    say(f"device {state.device} ({why}), threads {run.threads}, seed {run.seed} -> {run.out}/")
    if header["optimal_loss"] is not None:
        say(f"a perfect predictor would reach a loss of {header['optimal_loss']:.4f}")
    if state.step > 0:
        say(f"resuming at step {state.step:,}")


def loop(state: State, header: dict, stop, deadline, say) -> None:
    """From state.step to the last step, to Ctrl-C or to the deadline. Each evaluation saves the
    state."""
    run = state.run
    logged = [row["step"] for row in state.log]
    due = set(evaluation_steps(run.steps, run.evals)) - set(logged)
    cast = compile_model(state.model, run.compile, state.device)
    say("val, train: loss in nats per token; sink: attention that the strongest head gives token 0 "
        f"({KINDS[told_kind(state.windows[1])]})")
    with tqdm(total=run.steps, initial=state.step, disable=None, leave=False, unit="step") as bar:
        while True:
            if state.step in due:
                evaluate_and_save(state, header)
                say(row_line(state))
            if state.finished or stop.is_set() or time.monotonic() >= deadline:
                break
            begin = time.perf_counter()
            loss = train_step(state, cast)
            if state.step % 10 == 0 or state.step in due:
                state.follow(loss.item())  # .item() waits for a GPU
            state.seconds += time.perf_counter() - begin
            bar.update()
    if not state.finished:
        state.save(header)


def train_step(state: State, cast) -> torch.Tensor:
    """Draw a batch and take a step of AdamW (gradient clipped to length 1) -> the loss of this
    batch, before the step: a tensor, nats."""
    run, model, optimizer = state.run, state.model, state.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(state.step, run)
    x, y = state.corpus.batch(run.batch_size, run.seq_len, state.batches, bos=run.bos,
                              repeat=run.repeat)
    ahead = state.device.type == "cuda"  # else each copy would wait for the GPU's last step
    x, y = x.to(state.device, non_blocking=ahead), y.to(state.device, non_blocking=ahead)
    with cast:
        loss = model(x, y)[1]
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    state.step += 1
    return loss


def evaluate_and_save(state: State, header: dict) -> None:
    """Add a row to the log, and save all."""
    run, begin = state.run, time.perf_counter()
    row = {"step": state.step, "tokens": state.step * run.batch_size * run.seq_len,
           "seconds": round(state.seconds, 2), "train_loss": state.smooth}
    _, kinds = state.windows
    with as_written(run):
        row |= evaluate(state.model, state.windows)
        x, _ = kinds[told_kind(kinds)]
        picture = frame(state.model, x[0, :FILMED], state.step)
    if not math.isfinite(row["val_loss"]):
        raise state.diverged()
    state.log.append(row)
    state.film.append(picture)
    state.save(header)
    state.seconds += time.perf_counter() - begin


def as_written(run: Run):
    """A context in which the layers are not compiled: taps are for plain ones."""
    if run.compile:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def row_line(state: State) -> str:
    """The line of an evaluation. All other numbers are in log.jsonl."""
    run, row = state.run, state.log[-1]
    sink = row[told_kind(row)]["sink"] or 0.0
    line = f"step {row['step']:>6,} {row['step'] / run.steps:4.0%} | val {row['val_loss']:.3f}"
    if row["train_loss"] is not None:
        line += f" train {row['train_loss']:.3f}"
    if row["tokens"]:
        line += f" | {row['tokens'] / state.seconds:,.0f} tok/s"
    return f"{line} | sink {sink:.2f}"


def settle_compile(run: Run, device, say) -> None:
    """Set run.compile to true or false: whether it is wanted, and works here."""
    if run.compile is None:
        run.compile = device.type == "cpu" and run.hidden_size >= WIDE
    if run.compile:
        try:
            torch.compile(torch.neg)(torch.ones(1, device=device))
        except Exception as error:
            _, _, said = str(error).partition("Output:\n")  # what the C++ compiler itself says
            say(f"not compiled: {reason(Exception(said)) if said else reason(error)}")
            run.compile = False


def compile_model(model: GPT, compiled: bool, device) -> torch.autocast:
    """Compile the layers if asked; return the autocast context: bf16 where the hardware multiplies
    it, but fp32 in a plain model on a CPU. What this is worth: tests/results/speed.md."""
    if compiled:
        for block in model.layers:
            block.compile()  # they are alike: what is compiled for one serves all
        model.unembed = torch.compile(model.unembed)
        model.fused = device.type != "cpu" or model.cfg.max_position_embeddings > SHORT
    bf16 = (compiled or device.type != "cpu") and multiplies_bf16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def draw_curve(state: State, header: dict) -> None:
    """curve.png: losses and sink over the steps."""
    baseline = probe.baseline(probe.metric("sink"), state.model.cfg, state.run.seq_len)
    drawn = (state.folder.name, state.log, KINDS, baseline, header["optimal_loss"])
    probe.draw("curve", drawn, state.folder / "curve.png")


# ---------------------------------------------------------------- a trained model

def load_run(folder) -> tuple[GPT, data.Corpus, dict]:
    """A folder of `train` -> (model, corpus, settings). Raises UserError."""
    config = read_config(folder)
    return GPT.from_run(folder).eval(), corpus_of(config), config["run"]


def story(state: State) -> str:
    """What a training has shown, in plain sentences."""
    run, last = state.run, state.log[-1]
    told, verdict = rest_story(state) if run.data == "rest" else sink_story(state)
    return f"""
validation loss {last['val_loss']:.4f} nats per token; files in {run.out}/
{told}

next: python probe.py {shlex.quote(run.out)}
{run.attn} {verdict}"""


def sink_story(state: State) -> tuple[str, str]:
    """What was seen, and the verdict: has the model a sink?"""
    run, last = state.run, state.log[-1]
    kind = told_kind(last)
    sink = last[kind]["sink"] or 0.0
    verdict = "has a sink" if sink > probe.SINK else f"has no sink (none above {probe.SINK})"
    if run.attn != "softmax":
        verdict += ("; but heads recognise <|bos|>: no test of a cure (tests/results/claims.md)"
                    if run.bos else "; what the cures do in five seeds: tests/results/cures.md")
    told = f"""attention of the strongest head ({KINDS[kind]}): {sink:.2f} \
(uniform attention: {probe.uniform_sink(run.seq_len):.2f})"""
    return told, verdict


LEARNED = 0.02  # nats above a perfect predictor, of all targets; a model above that is no evidence
SOFTMAX = Path(__file__).parent / "tests" / "results" / "rest.json"  # seeds to compare with


def is_usual(run: Run) -> bool:
    """Whether it is trained as the committed seeds of softmax were."""
    usual = asdict(resolve(Run(run.attn, seed=run.seed)))
    return set(changed(run, usual)) <= {"evals"}


def rest_story(state: State) -> tuple[str, str]:
    """What was seen, and the verdict: how much of softmax's sink does the attention take?"""
    run = state.run
    (idx, _), kinds = state.windows
    x, queries = kinds["links_rest"]
    with as_written(run):
        heads = probe.resting_weight(state.model, x, queries)
    here, uniform = statistics.fmean(heads), probe.uniform_weight(queries)
    seeds = read_json(SOFTMAX)["grid"]["softmax"]["0.005"].values()
    last = [seed["weights"]["reaching"] for seed in seeds]  # of each head of the last layer
    mean, std = probe.mean_std([*map(statistics.fmean, last)])
    loss, loss_std = probe.mean_std([seed["val_loss"] for seed in seeds])
    by_head, n = " ".join(f"{head:.2f}" for head in heads), len(seeds)
    told = f"""weight on token 0 that reaches the output, where there is nothing to look for
(mean of the last layer's heads; "sink", above: the strongest head's share of its own attention)
  {mean:.2f}   under softmax, default settings ({n} seeds, sd {std:.2f}; strongest head \
{statistics.fmean(map(max, last)):.2f})
  {here:.2f}   under {run.attn}, here (head by head: {by_head})
  {uniform:.2f}   if it looks everywhere alike"""
    gap = state.log[-1]["val_loss"] - loss
    above = state.log[-1]["val_loss"] - state.corpus.task.optimal_loss(idx)
    if above > LEARNED:
        return told, (f"has not learned the task (its loss is {above:.2f} nats above that of a "
                      "perfect predictor): this says nothing about its sink")
    if run.attn == "softmax":
        which = "a" if here > probe.SINK else "no"
        return told, f"rests on the first token with {here:.0%} of its attention: {which} sink"
    if not is_usual(run):
        return told, (f"rests on the first token with {here:.0%} of its attention (not compared: "
                      "softmax was trained with other settings)")
    taken = (mean - here) / (mean - uniform)
    seen = (f"takes {taken:.0%} of softmax's sink and does not end it (why: chapter 07)"
            if here > 2 * uniform else
            "ends softmax's sink in this seed (less than twice uniform attention is left)")
    return told, (f"{seen}; its loss is {abs(gap):.4f} nats {'above' if gap > 0 else 'below'} "
                  f"softmax's {loss:.4f} (sd {loss_std:.4f})")


# ---------------------------------------------------------------- the command line

def parse(words=None) -> dict:
    """The flags that were given, by name."""
    parser = Parser(prog="train.py", argument_default=argparse.SUPPRESS,
                    description="Train one decoder and watch its attention sink being born.",
                    epilog="What each --size sets stands in SIZES, at the top of train.py.")
    for f in fields(Run):
        kind, *_ = get_args(f.type) or [f.type]  # int of int | None
        text, choices = f.metadata["help"], f.metadata["choices"]
        if "default" not in text:
            text += f" (default: {'by size' if f.default is None else f.default})"
        if kind is bool:
            parser.add_argument(flag(f.name), help=text, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(flag(f.name), help=text, type=kind, choices=choices)
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder")
    parser.add_argument("--overwrite", action="store_true", help="throw away the run in --out")
    return vars(parser.parse_args(words))


def run_of(folder) -> Run:
    """The settings of the run in a folder. Raises UserError."""
    there = read_config(folder)["run"]
    try:
        settings = {f.name: there[f.name] for f in fields(Run)}
    except KeyError as error:
        raise UserError(f"{folder} is of an older train.py (no {error}); train it anew") from None
    return Run(**settings | {"out": str(folder)})


def command(words) -> int:
    given = parse(words)
    folder = given.pop("resume", None)
    if folder is not None:
        for name in given:
            if name not in MACHINE:
                raise UserError(f"{flag(name)} does not go with --resume; leave it out")
        state = train(replace(run_of(folder), **given), resume=True)
    else:
        overwrite = given.pop("overwrite", False)
        state = train(Run(**given), overwrite=overwrite)
    if not state.finished:
        return 130
    print(story(state))
    return 0


def main(words=None) -> int:
    return program("train.py", lambda: command(words))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that `| tee` shows each line at once
    sys.exit(main())
