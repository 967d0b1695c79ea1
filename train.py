"""Train one decoder: `python train.py --attn headnorm`, or `train(Run(attn="headnorm"))`.

settings -> corpus -> model -> loop -> out/<run>/ with
    config.json   every setting, the model's shape, versions, hardware
    log.jsonl     the same in its first line, then one line per evaluation: losses and the chain
    model.pt      the last state: weights, optimiser, generator of the batches
    curve.png     losses and the birth of the sink over the steps

In this order: settings, measuring, loop, the folder of a run, command line. What can go wrong with
files, terminals and machines is dealt with in data/common.py.
"""

import os
import signal
import sys

# before torch: threads that spin while another program holds one of them up are 15 times slower
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # the imports below take seconds, and Ctrl-C ends them in one line too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"train.py: stopped\n"), os._exit(130)))

import argparse
import bisect
import contextlib
import json
import math
import re
import shlex
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import probe
from data.common import (Parser, UserError, bar, check_folder, check_settings, environment, nan_to_none,
                         flag, interrupts, load_tensors, memory_of, multiplies_bf16, one_writer,
                         parts, pick_device, program, read_bytes, read_json, reason, say, setting,
                         show, within, write_atomically, write_json)
from model import ATTENTIONS, GPT, Config

# ---------------------------------------------------------------- settings

SIZES = {  # model and schedule that fit together; each of these can be overridden by its flag
    "micro": dict(  # copying, where a cure can be seen; how it was found: tests/results/cures.md
        hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=33, seq_len=64, batch_size=16, steps=4000, lr=5e-3, threads=1,
        data="copy", bos=0.0, weight_decay=0.1, initializer_range=0.08),
    "tiny": dict(  # text; its learning rates: tests/results/recipe.md
        hidden_size=64, intermediate_size=172, num_hidden_layers=6, num_attention_heads=2,
        vocab_size=257, seq_len=64, batch_size=8, steps=4000, threads=1,
        lr=dict(softmax=2.5e-3, headnorm=2.5e-3, sigmoid=5e-3, gated=2.5e-3)),
    "small": dict(
        hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5,
        vocab_size=1024, seq_len=256, batch_size=64, steps=10000, lr=2e-3),
    "base": dict(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        vocab_size=1024, seq_len=1024, batch_size=16, steps=20000, lr=6e-4),
}
COMMON = dict(data="stdlib", bos=1.0, weight_decay=0.3)  # of each size that does not say otherwise
MINUTES = {"micro": 2, "tiny": 2}  # of a training, about, on one core of a laptop
MACHINE = ("device", "threads", "compile")  # how a run computes, and not what
WIDE = 128  # C from which on a CPU compiles by default; narrower models are those of the chapters
SHORT = 512  # T up to which attention, compiled for a CPU, is faster written out than as a kernel


@dataclass
class Run:
    """All settings of a training. None means: what `size` or the machine suggests (`resolve`)."""

    attn: str = setting("softmax", "how to attend", choices=ATTENTIONS)
    size: str = setting("micro", "micro (copying, ordinary first tokens: a laptop, two minutes), "
                        "tiny (text after <|bos|>: the same), small (for a laptop GPU, not "
                        "measured), base (for one large GPU, not measured)", choices=tuple(SIZES))
    data: str | None = setting(None, f"{', '.join(data.NAMES)}, or your own text: a file or folder")
    steps: int | None = setting(None, "optimiser steps", 1, 2**31 - 1)
    batch_size: int | None = setting(None, "windows per step", 1, 2**16)
    seq_len: int | None = setting(None, "tokens per window, T", 3, 2**16)  # 3: to have a chain
    lr: float | None = setting(None, "peak learning rate; then a cosine to a tenth", 1e-30, 1e30)
    warmup: int = setting(100, "steps of linear warm-up", 0, 2**31 - 1)
    weight_decay: float | None = setting(None, "AdamW's weight decay of the matrices", 0, 1e30)
    bos: float | None = setting(None, "share of the windows that start with <|bos|>", 0, 1)
    repeat: float = setting(0.8, "share of the training windows of text that show one passage over "
                            "and over: heads learn to copy, and to rest", 0, 1)
    seed: int = setting(0, "of weights and batches: the same for every --attn", 0, 2**31 - 1)
    vocab_size: int | None = setting(None, "of text; 257 is bytes and <|bos|>", 25, 2**16)
    hidden_size: int | None = setting(None, "model width, C", 8, 2**16)
    intermediate_size: int | None = setting(None, "FFN width, F", 8, 2**18)
    num_hidden_layers: int | None = setting(None, "layers", 1, 1000)
    num_attention_heads: int | None = setting(None, "query heads, H", 1, 2**14)
    num_key_value_heads: int | None = setting(None, "key/value heads (default: H)", 1, 2**14)
    initializer_range: float | None = setting(None, "std of the initial weights (default: "
                                              "1/sqrt(C); 0.08 for micro)", 1e-30, 1e30)
    tie_word_embeddings: bool = setting(False, "use the embedding as output matrix too")
    evals: int = setting(16, "evaluations: half evenly spaced, half log-spaced", 1, 10_000)
    device: str = setting("auto", "auto, cpu, cuda or mps")
    threads: int | None = setting(None, "CPU threads (default: 1 for tiny and micro, which gain "
                                  "nothing from more; else the cores, at most 4)", 1, 1024)
    compile: bool | None = setting(None, "torch.compile the layers (default: from a width of "
                                   f"{WIDE} on, on a CPU, if there is a C++ compiler)")
    out: str | None = setting(None, "folder of the run (default: out/<attn>, with the size and "
                              "whatever else was changed, as in out/tiny-softmax-seed1)")


def resolve(run: Run) -> Run:
    """Fill in what depends on the size, and check all that can be checked without the data. Raises
    UserError, naming the flag."""
    check_settings(run)
    usual = {f.name: f.default for f in fields(Run)} | COMMON | SIZES[run.size]
    if isinstance(usual["lr"], dict):  # tuned for each attention
        usual["lr"] = usual["lr"][run.attn]
    if run.data not in (None, *data.TASKS):  # a text needs all bytes
        usual["vocab_size"] = max(257, usual["vocab_size"])
    full = Run(**{n: usual[n] if value is None else value for n, value in asdict(run).items()})
    C, H, K = full.hidden_size, full.num_attention_heads, full.num_key_value_heads
    if C % (2 * H):
        raise UserError(f"--hidden-size {C} must be a multiple of twice --num-attention-heads {H}: "
                        "each head gets an even share of it")
    if K is not None and H % K:
        raise UserError(f"--num-key-value-heads {K} must divide --num-attention-heads {H}")
    if full.data in data.TASKS:  # whose symbols and repeats are its own
        for name in ("vocab_size", "repeat"):
            if getattr(run, name) not in (None, usual[name]):
                raise UserError(f"{flag(name)} is for text; leave it out with --data {full.data}")
    full.initializer_range = full.initializer_range or C ** -0.5
    if full.compile is None and C < WIDE:
        full.compile = False
    full.threads = full.threads or min(os.cpu_count() or 1, 4)
    full.out = full.out or usual_folder(run, usual)
    return full


def usual_folder(run: Run, usual: dict) -> str:
    """out/<attn>, with the size and whatever else was changed."""
    name = run.attn if run.size == "micro" else f"{run.size}-{run.attn}"
    for key, value in asdict(run).items():
        if key not in ("attn", "size", *MACHINE) and value not in (None, usual[key]):
            value = Path(value).stem if key == "data" else value
            name += f"-{key}" if value is True else f"-{key}{value}"
    return "out/" + re.sub(r"[^\w.+-]", "_", name)[:100]


def check_memory(run: Run, cfg: Config, device: torch.device) -> None:
    """Raise UserError for a training that cannot fit: it would take the machine down with it."""
    with torch.device("meta"):  # shapes without memory
        parameters = sum(p.numel() for p in GPT(cfg).parameters())
    B, T, H, L = run.batch_size, run.seq_len, run.num_attention_heads, run.num_hidden_layers
    states = B * T * (L * (8 * run.hidden_size + 4 * run.intermediate_size) + 3 * cfg.vocab_size)
    patterns = 3 * max(8, PROBE_TOKENS // T) * H * T * T  # of one layer, in an evaluation
    if run.attn == "sigmoid" or written_out(run.compile, device, T):  # training keeps them all
        patterns = max(patterns, 2 * L * B * H * T * T)
    need, there = 4 * (4 * parameters + states + patterns), memory_of(device)  # of four bytes each
    if need > there:
        raise UserError(f"this needs {need / 1e9:,.0f} GB of memory, there are {there / 1e9:,.0f}; "
                        "use a smaller --batch-size, --seq-len or --hidden-size")


# ---------------------------------------------------------------- measuring

EVAL_TOKENS, PROBE_TOKENS = 16384, 4096  # per evaluation; fixed windows, whatever is trained
KINDS = {"links_bos": "<|bos|>", "links_rest": "first token, nothing to copy",
         "links": "first token"}  # what stands first, by key of log.jsonl; the first one is told


def evaluation_steps(steps: int, evals: int) -> list[int]:
    """Step 0, the last step, and between them half the evaluations evenly, half log-spaced (but
    none that is within a tenth of an even one)."""
    even = np.linspace(0, steps, evals // 2 + 2).round()
    log = np.geomspace(min(10, steps), steps, evals // 2 + 1).round()
    return sorted({*map(int, even), *(int(s) for s in log if np.abs(even - s).min() > s / 10)})


def held_out(run: Run, corpus, device) -> tuple[tuple, dict]:
    """The windows of every evaluation, the same in every run with the same data, T and bos: (x, y)
    for the loss, and {kind: x} for the chain, of those of KINDS that the data has."""
    fixed, T = torch.Generator().manual_seed(20260511), run.seq_len
    few = max(8, PROBE_TOKENS // T)

    def draw(count, share):
        return corpus.batch(count, T, fixed, split="val", bos=share)

    x, y = draw(max(1, EVAL_TOKENS // T), run.bos)
    first = {"links": draw(few, 0.0)[0]}
    if run.bos > 0:
        first["links_bos"] = draw(few, 1.0)[0]
    if corpus.task:  # nothing to copy, so that every query rests
        first["links_rest"] = corpus.task.rest(few, T, fixed)
    first = {kind: windows.to(device) for kind, windows in first.items()}
    return (x.to(device), y.to(device)), first


@torch.no_grad()
def evaluate(model, windows, bytes_per_token=None) -> dict:
    """val_loss in nats per token, bpb in bits per byte (text), and for each kind of windows, as
    `held_out` gives them, the numbers of `probe.chain`."""
    (x, y), first = windows
    few, total = max(1, 4096 // x.shape[1]), 0.0  # the logits of more would fill a small GPU
    for a, b in zip(x.split(few), y.split(few)):
        total += model(a, b)[1].item() * b.numel()
    row = {"val_loss": total / y.numel()}
    if bytes_per_token:
        row["bpb"] = row["val_loss"] / math.log(2) / bytes_per_token
    try:
        if math.isfinite(total):  # else it has diverged, and has no chain
            row |= {kind: nan_to_none(probe.chain(model, idx)) for kind, idx in first.items()}
    except torch.linalg.LinAlgError:  # states so large that their squares overflow
        row["val_loss"] = math.nan
    return row


def told(row: dict) -> tuple[str, dict]:
    """What stands first in the windows whose chain is told, and that chain."""
    kind = next(kind for kind in KINDS if kind in row)
    return KINDS[kind], row[kind]


def row_line(run: Run, row: dict, speed: str) -> str:
    """The line of an evaluation: losses, speed and time to go, and the head of each link."""
    first, links = told(row)
    bpb = f" ({row['bpb']:.3f} bits/byte)" if "bpb" in row else ""
    loss = f"loss {row['train_loss']:.3f} " if row["train_loss"] is not None else ""
    return (f"step {row['step']:>6,} {row['step'] / run.steps:4.0%} | {loss}val "
            f"{row['val_loss']:.3f}{bpb}{speed} | {first}: {probe.headlines(links)}")


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


class State:
    """A training: settings, corpus, and all that changes: what model.pt and log.jsonl hold."""

    def __init__(self, run: Run, corpus, device, saved: dict | None):
        self.run, self.corpus, self.device = run, corpus, device
        self.folder, self.path = Path(run.out), Path(run.out) / "model.pt"
        cfg = model_config(run, corpus)
        if saved is None:
            self.model = GPT(cfg, seed=run.seed).to(device)
        else:
            self.model = GPT.from_weights(cfg, saved["model"], show(self.path)).to(device)
        self.optimizer = make_optimizer(self.model, run, device)
        self.batches = torch.Generator().manual_seed(run.seed + 1)
        self.step, self.smooth, self.seconds, self.log = 0, None, 0.0, []
        if saved is not None:
            self.restore(saved)

    @property
    def finished(self) -> bool:
        return self.step >= self.run.steps

    def restore(self, saved: dict) -> None:
        """Everything but the weights. AdamW writes into its moments without looking, so they must
        fit; learning rates and all the like come from the run. Raises UserError."""
        groups = self.optimizer.state_dict()["param_groups"]
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = saved["optimizer"]
        wanted = set(range(len(params))) if saved["step"] else set()
        if saved["step"] > self.run.steps or moments.keys() != wanted:
            raise bad_checkpoint(self.path, "it is not of this run")
        for i, moment in moments.items():
            wanted = {"step": (), "exp_avg": params[i].shape, "exp_avg_sq": params[i].shape}
            right = {name: tuple(t.shape) for name, t in moment.items()} == wanted
            if not right or not all(t.isfinite().all() for t in moment.values()):
                raise bad_checkpoint(self.path, f"moments {i} are not nan_to_none, or not of the shape "
                                     "of their parameter")
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.batches.set_state(saved["batches"])
        self.step, self.smooth, self.seconds = (saved[n] for n in ("step", "smooth", "seconds"))
        self.log = [row for row in read_log(self.folder) if row["step"] <= self.step]

    def save(self, header: dict) -> None:
        """log.jsonl, then model.pt: lines after its step are written again on resume."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged("model")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "batches": self.batches.get_state(), "step": self.step, "smooth": self.smooth,
                 "seconds": self.seconds}
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in (header, *self.log))
        write_atomically(self.folder / "log.jsonl", lambda part: part.write_text(lines))
        write_atomically(self.path, lambda part: torch.save(state, part))

    def diverged(self, what: str) -> UserError:
        return UserError(f"the {what} is no longer finite at step {self.step}; {show(self.path)} "
                         "keeps the last good state: try --overwrite with a smaller --lr (it was "
                         f"{self.run.lr}) or a longer --warmup")


def train(run: Run, resume=False, overwrite=False, say=say) -> State:
    """Train as `run` says, in the folder run.out; `resume` goes on there, `overwrite` starts anew.

    Every step depends on nothing but the settings: a resumed run ends in the same weights, bit for
    bit on the same machine with as many threads. `say` gets the lines that stay. Ctrl-C saves and
    returns. Raises UserError.
    """
    run = resolve(run)
    folder, (device, why) = Path(run.out), pick_device(run.device)
    torch.set_num_threads(run.threads)
    old = read_config(folder)[1] if resume else None
    free = partial(check_folder, folder, FILES, ("run", "model", "environment"), overwrite)
    if not resume:
        free()
    corpus = load_corpus(run, old)
    if run.compile is None:
        run.compile = device.type == "cpu" and compiles()
    check_memory(run, model_config(run, corpus), device)
    with one_writer(folder), interrupts() as stop:
        if not resume:  # again: another training may have ended here in the meantime
            free()
        there = resume and (folder / "model.pt").exists()  # no: killed before its first save
        state = State(run, corpus, device, load_checkpoint(folder / "model.pt") if there else None)
        header = make_header(state, old)
        say(f"{run.attn} attention, {header['parameters']:,} parameters, {run.steps:,} steps of "
            f"{run.batch_size} x {run.seq_len} tokens of {show(run.data)}")
        say(f"device {device} ({why}), threads {run.threads}, seed {run.seed} -> {show(folder)}/")
        if header["optimal_loss"] is not None:
            say(f"a perfect predictor, who knows the rules of {run.data}, would reach a loss of "
                f"{header['optimal_loss']:.4f}")
        if old:
            say(f"resuming at step {state.step:,}{new_machine(old, header)}")

        left = parts(folder, FILES)  # before this line nothing has been written or removed
        stale = () if resume else (*FILES, *MEASURED)
        for path in [*left, *(folder / name for name in stale)]:
            path.unlink(missing_ok=True)
        if not state.finished:
            write_json(folder / "config.json", header)
        with bar(total=run.steps, initial=state.step, bar_format=BAR) as live:
            loop(state, header, stop, say, live)
        if not state.finished:
            say(f"stopped at step {state.step:,} and saved; go on with: python train.py --resume "
                f"{shlex.quote(show(folder))}")
        try:
            from chapters.figures import curve  # only here: training needs no matplotlib
            curve(folder, state.log, header["optimal_loss"])
        except ImportError as error:
            say(f"no curve.png ({reason(error)})")
    return state


BAR = "{bar:10}{percentage:4.0f}% | {desc}"  # of tqdm, whose own time to go knows no evaluations


def loop(state: State, header: dict, stop, say, live) -> None:
    """From state.step to the last one, or to Ctrl-C; the state is saved at each evaluation."""
    run, model, device = state.run, state.model, state.device
    windows = held_out(run, state.corpus, device)
    evaluate_at, tokens = evaluation_steps(run.steps, run.evals), run.batch_size * run.seq_len
    cast, measured = compile_model(model, run.compile, device), contextlib.nullcontext
    if run.compile:
        measured = partial(torch.compiler.set_stance, "force_eager")  # taps are for plain layers
    step_seconds, evaluation_seconds, count = 0.0, 0.0, -5  # what one costs; the first warm up

    def speed() -> str:
        """Tokens a second, and the time to go, evaluations included."""
        if count < 1:
            return ""
        evaluations = len(evaluate_at) - bisect.bisect(evaluate_at, state.step)
        left = (run.steps - state.step) * step_seconds + evaluations * evaluation_seconds
        return f" | {tokens / step_seconds:,.0f} tok/s, {timedelta(seconds=round(left))} to go"

    while True:
        begin = time.perf_counter()
        if state.step in evaluate_at and not (state.log and state.log[-1]["step"] == state.step):
            row = {"step": state.step, "tokens": state.step * tokens,
                   "seconds": round(state.seconds, 2), "train_loss": state.smooth}
            with measured():
                row |= evaluate(model, windows, state.corpus.bytes_per_token)
            if not math.isfinite(row["val_loss"]):
                raise state.diverged("validation loss")
            state.log.append(row)
            state.save(header)
            evaluation_seconds = time.perf_counter() - begin
            state.seconds += evaluation_seconds
            say(row_line(run, row, speed()))
        if state.finished:
            return
        if stop.is_set():
            return state.save(header)

        begin = time.perf_counter()
        loss = train_step(state, cast)
        if state.step % 10 == 0 or state.step in evaluate_at:  # .item() waits for a GPU
            value, before = loss.item(), state.smooth
            if not math.isfinite(value):
                raise state.diverged("loss")
            state.smooth = value if before is None else 0.9 * before + 0.1 * value
        seconds = time.perf_counter() - begin
        state.seconds, count = state.seconds + seconds, count + 1
        if count > 0:
            step_seconds += (seconds - step_seconds) / min(count, 200)  # a mean of the last steps
        live.set_description_str(f"loss {state.smooth or 0:.3f}{speed()}", refresh=False)
        live.update()


def compiles() -> bool:
    """Whether there is a C++ compiler that torch can use, for a CPU; a try takes seconds."""
    with contextlib.suppress(Exception):  # it fails in many ways
        return torch.compile(torch.neg)(torch.ones(1)).item() == -1
    return False


def written_out(compiled: bool, device, T: int) -> bool:
    """Whether attention is computed as the formula stands, and not by torch's kernel."""
    return compiled and device.type == "cpu" and T <= SHORT


def compile_model(model: GPT, compiled: bool, device) -> torch.autocast:
    """Compile the layers, if asked for -> in which numbers to multiply: fp32 in a plain model on a
    CPU, else bf16 where the hardware has it. What it is worth: tests/results/speed.md."""
    bf16 = (compiled or device.type != "cpu") and multiplies_bf16(device)
    if compiled:
        for block in model.layers:
            block.compile()  # they are alike: what is compiled for one serves all
        model.unembed = torch.compile(model.unembed)
        model.fused = not written_out(compiled, device, model.cfg.max_position_embeddings)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def train_step(state: State, cast) -> torch.Tensor:
    """One batch, one step of AdamW -> the loss of the batch before it."""
    run, model, optimizer = state.run, state.model, state.optimizer
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(state.step, run)
    x, y = state.corpus.batch(run.batch_size, run.seq_len, state.batches, bos=run.bos,
                              repeat=run.repeat)
    with cast:
        loss = model(x.to(state.device), y.to(state.device))[1]
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    state.step += 1
    return loss


# ---------------------------------------------------------------- the folder of a run

FILES = ("model.pt", "curve.png", "log.jsonl", "config.json")  # in which order they are removed
MEASURED = ("chain.json", "chain.png", "cut.json", "cut.png")  # by probe.py, of the old weights


def model_config(run: Run, corpus) -> Config:
    """The model that a run trains."""
    same = ("attn", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "initializer_range", "tie_word_embeddings")
    return Config(vocab_size=corpus.vocab_size, max_position_embeddings=run.seq_len,
                  **{name: getattr(run, name) for name in same})


def make_header(state: State, old: dict | None) -> dict:
    """config.json. A run that goes on elsewhere keeps what is known of where it was before."""
    run, corpus, earlier = state.run, state.corpus, []
    now = environment(state.device, run.threads)
    if old:
        earlier = [e for e in (*old.get("earlier", []), old["environment"]) if e != now]
    return {"run": asdict(run), "model": asdict(state.model.cfg),
            "parameters": sum(p.numel() for p in state.model.parameters()),
            "corpus": corpus.fingerprint(),
            "optimal_loss": corpus.optimal_loss(run.seq_len, run.bos),
            "environment": now, "earlier": earlier}


def new_machine(old: dict, header: dict) -> str:
    """Why the last bits of a resumed run may differ from those of one that was never stopped."""
    was, now = old["environment"], header["environment"]
    changed = [f"{key} was {was.get(key)!r:.40} and is {now[key]!r}"
               for key in ("torch", "device", "machine", "threads") if was.get(key) != now[key]]
    return f" ({'; '.join(changed)}: the last bits of the weights may differ)" if changed else ""


def read_config(folder) -> tuple[Run, dict]:
    """The settings of a run and its whole config.json. Raises UserError."""
    path = Path(folder) / "config.json"
    if not os.path.exists(path):
        raise UserError(f"{show(folder)} holds no run of train.py (no config.json); train one: "
                        "python train.py")
    raw = read_json(path)
    try:
        settings = {f.name: raw["run"][f.name] for f in fields(Run)}
        run = resolve(Run(**settings | {"out": os.fspath(folder)}))
        if not all(type(raw[key]) is dict for key in ("environment", "corpus")):
            raise UserError("environment or corpus is no object")
        return run, raw
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{show(path)} is not that of a run of train.py ({reason(error)}); "
                        "train it anew") from None


def load_corpus(run: Run, old: dict | None = None) -> data.Corpus:
    """The corpus of a run; with `old`, its config.json, the one that it was trained on, or
    UserError."""
    corpus = data.load(run.data, seq_len=run.seq_len, vocab_size=run.vocab_size)
    if old and not old["corpus"].items() <= corpus.fingerprint().items():
        raise UserError(f"the text of {show(run.data)} is no longer the one that {show(run.out)} "
                        "was trained on (another Python has another standard library); train anew")
    return corpus


def bad_checkpoint(path, why: str) -> UserError:
    return UserError(f"{show(path)} cannot be used: {why}; start anew with --overwrite")


def load_checkpoint(path) -> dict:
    """What `State.save` wrote: model {name: (...)}, optimizer {index: {name: (...)}}, batches (a
    generator's state), step, smooth, seconds. The one door for such files: damage is found, and no
    code in them runs. Whether the tensors fit, `GPT.from_weights` and `State.restore` find out.
    Raises UserError.
    """
    saved = load_tensors(path, lambda it: (it["model"], *it["optimizer"]["state"].values()))
    try:
        rest = {key: saved[key] for key in ("batches", "step", "smooth", "seconds")}
        torch.Generator().set_state(rest["batches"])  # which looks inside
        if type(rest["step"]) is not int or rest["step"] < 0:
            raise ValueError("step is no number")
        for number in (rest["seconds"], rest["smooth"] or 0.0):
            if type(number) is not float or not math.isfinite(number):
                raise ValueError("loss or seconds is no number")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise bad_checkpoint(path, reason(error)) from None

    def copied(group):  # lets go of the file
        return {n: t.clone(memory_format=torch.contiguous_format) for n, t in group.items()}
    moments = {i: copied(m) for i, m in saved["optimizer"]["state"].items()}
    return {"model": copied(saved["model"]), "optimizer": moments, **rest}


def load_run(folder) -> tuple[GPT, data.Corpus, dict]:
    """A folder of `train` -> (model, corpus, settings). Raises UserError."""
    run, raw = read_config(folder)
    path = Path(folder) / "model.pt"
    corpus = load_corpus(run, None if run.vocab_size == 257 else raw)  # bytes are bytes in any text
    if not path.exists():
        raise UserError(f"{show(folder)} has no model.pt: its training never saved; go on with: "
                        f"python train.py --resume {show(folder)}")
    weights = load_checkpoint(path)["model"]
    return GPT.from_weights(model_config(run, corpus), weights, show(path)).eval(), corpus, asdict(run)


def read_log(folder) -> list[dict]:
    """The evaluations of a run, in order of steps; [] without a log. A number that was not finite
    is None. Raises UserError."""
    path = Path(folder) / "log.jsonl"
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in read_bytes(path).decode().splitlines()[1:]]
        for row in rows:
            if type(row["step"]) is not int or type(row["links"]) is not dict:
                raise ValueError("a line is no evaluation")
            float(row["val_loss"])
        return rows
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # UserError is a ValueError
        raise UserError(f"{show(path)} cannot be read ({reason(error)}); remove it to go on "
                        "without the old evaluations") from None


# ---------------------------------------------------------------- the command line

def write_text(model: GPT, corpus, bos, prompt=None, tokens=200, temperature=None, seed=0) -> str:
    """A prompt and what the model writes after it, each token one of the 40 likeliest. Any text can
    be a prompt, of a task any of its symbols. `bos`: whether the model has been trained with
    <|bos|> in front; if not, something ordinary comes first. Raises UserError."""
    within("--tokens", tokens, 1, 100_000)
    if temperature is None:
        temperature = 1.0 if corpus.task else 0.8  # a passage of letters ends by chance, seldom
    if temperature != 0:
        within("--temperature", temperature, 0.01, 100)
    if prompt is None:
        prompt = "import " if corpus.name == "stdlib" else ""
    start = [corpus.bos] * bool(bos) + corpus.encode(prompt)
    if not start:
        held_out = corpus.batch(1, 8, torch.Generator().manual_seed(seed), "val", bos=0.0)
        start = held_out[0][0, :1].tolist()
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = model.generate(torch.tensor([start], device=device), tokens, temperature, 40, generator)
    return corpus.decode(ids[0, bool(bos):])


def story(state: State) -> str:
    """What a training has shown, in plain sentences."""
    run, corpus, last = state.run, state.corpus, state.log[-1]
    first, _ = told(last)
    before, after = (told(row)[1]["sink"] or 0.0 for row in (state.log[0], last))
    seen = "has a sink" if after > probe.SINK else f"has no sink (no head passes {probe.SINK})"
    if run.bos:
        seen += "; <|bos|> it knows by name, so that this is no test of a cure (chapter 07)"
    elif run.attn != "softmax":
        seen += "; what the cures do in five seeds: tests/results/cures.md"
    share, prompt, given, tokens = run.repeat, None, "", 200
    if corpus.task:  # a passage and the beginning of its repeats
        share, tokens = 0.75, run.seq_len // 2
        (window,) = corpus.task.windows(1, run.seq_len, torch.Generator().manual_seed(0))
        prompt, given = corpus.decode(window[:tokens]), f"; its first {tokens} letters are given"
    return f"""
validation loss {last['val_loss']:.4f} nats per token; files in {show(run.out)}/
{first}: {after:.2f} of the attention of the strongest head, before training {before:.2f} \
(one that attends to all alike: {probe.uniform_sink(run.seq_len):.2f})
a sample (in {share:.0%} of the training windows one passage comes over and over{given}):
{write_text(state.model, corpus, run.bos, prompt, tokens)}

next: python probe.py {shlex.quote(show(run.out))}
{run.attn} {seen}"""


SAMPLING = {"prompt": (str, "what --sample goes on from"),
            "tokens": (int, "how many --sample writes (default: 200)"),
            "temperature": (float, "of --sample; 0: always the likeliest token (default: 0.8 for "
                                   "text, 1 for a task)")}


def parse(words=None) -> dict:
    """The flags that were given, by name."""
    sizes = "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in s.items())}"
                      for name, s in SIZES.items())
    parser = Parser("train.py", epilog=f"Sizes: {sizes}", argument_default=argparse.SUPPRESS,
                    description="Train one decoder and watch its attention sink being born.")
    parser.add_settings(Run, unless="by size")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder, "
                        f"with its settings; of others only {', '.join(map(flag, MACHINE))}")
    parser.add_argument("--overwrite", action="store_true",
                        help="throw away the run in --out and start anew")
    parser.add_argument("--sample", metavar="FOLDER",
                        help="do not train: write text with the model in this folder")
    for name, (kind, text) in SAMPLING.items():
        parser.add_argument(flag(name), type=kind, help=text)
    return vars(parser.parse_args(words))


def command(words) -> int:
    given = parse(words)
    for mode, allowed in (("sample", [*SAMPLING, "seed"]), ("resume", MACHINE)):
        other = [name for name in given if name not in (mode, *allowed)]
        if mode in given and other:
            raise UserError(f"{flag(mode)} takes all else from the folder's config.json: leave "
                            f"{flag(other[0])} out (it goes with {', '.join(map(flag, allowed))})")
    if "sample" in given:
        folder = given.pop("sample")
        resolve(Run(seed=given.get("seed", 0)))
        model, corpus, settings = load_run(folder)
        print(write_text(model, corpus, settings["bos"], **given))
        return 0
    for name in SAMPLING:
        if name in given:
            raise UserError(f"{flag(name)} goes with --sample FOLDER only")
    folder, overwrite = given.pop("resume", None), given.pop("overwrite", False)
    run = replace(read_config(folder)[0], **given) if folder is not None else Run(**given)
    state = train(run, folder is not None, overwrite)
    if not state.finished:
        return 130
    print(story(state))
    return 0


def main(words=None) -> int:
    return program("train.py", lambda: command(words))


if __name__ == "__main__":
    sys.exit(main())
