"""Train one decoder: `python train.py --attn headnorm`, or `train(Run(attn="headnorm"))`.

settings -> corpus -> model -> loop -> out/<run>/ with
    config.json   every setting, the model's shape, versions, hardware
    log.jsonl     a header line, then one JSON object per evaluation: losses and every link of the chain
    model.pt      the last state: weights, optimiser, generator (for --resume)
    best.pt       the weights with the lowest validation loss
    curve.png     loss and the live sink numbers over the steps
"""

import argparse
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import probe
from model import ATTENTIONS, GPT, Config, ModelError

SIZES = {  # model and schedule that fit together; every one of these can be overridden by its flag
    "tiny": dict(hidden_size=64, intermediate_size=172, num_hidden_layers=6, num_attention_heads=2, vocab_size=257,
                 seq_len=64, batch_size=8, steps=4000, threads=1, lr=dict(softmax=2.5e-3, headnorm=2.5e-3, sigmoid=5e-3)),  # tests/recipe.py
    "micro": dict(hidden_size=64, intermediate_size=172, num_hidden_layers=3, num_attention_heads=4, vocab_size=25,
                  seq_len=64, batch_size=16, steps=3000, threads=1, lr=dict(softmax=5e-3, headnorm=5e-3, sigmoid=1e-2),
                  data="copy", bos=0.0, weight_decay=0.1, initializer_range=0.08),
    "small": dict(hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5, vocab_size=1024,
                  seq_len=256, batch_size=64, steps=10000, lr=2e-3),
    "base": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=1024,
                 seq_len=1024, batch_size=16, steps=20000, lr=6e-4),
}
COMMON = dict(data="stdlib", bos=1.0, weight_decay=0.3)  # of every size that does not say otherwise
EVAL_TOKENS, PROBE_TOKENS = 16384, 4096  # per evaluation; fixed windows, whatever is trained


class TrainError(ValueError):
    """A setting or file that cannot be used. The message is one line for the user."""


def setting(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


def type_of(f) -> type:
    """The type of a field of Run, without its `| None`."""
    return f.type if isinstance(f.type, type) else f.type.__args__[0]


@dataclass
class Run:
    """All settings of a training run. None means: what `size` or the machine suggests (`resolve`)."""

    attn: str = setting("softmax", "how to attend", ATTENTIONS)
    data: str | None = setting(None, f"{', '.join(data.NAMES)}, or a file or folder of your own text (default: stdlib; copy for micro)")
    size: str = setting("tiny", "tiny (laptop CPU, minutes), micro (the copying task, where first tokens are ordinary: two minutes), "
                        "small (laptop GPU), base (one large GPU)", tuple(SIZES))
    steps: int | None = setting(None, "optimiser steps")
    batch_size: int | None = setting(None, "windows per step")
    seq_len: int | None = setting(None, "tokens per window, T")
    lr: float | None = setting(None, "peak learning rate; cosine to a tenth of it after the warm-up")
    warmup: int = setting(100, "steps of linear warm-up")
    weight_decay: float | None = setting(None, "AdamW weight decay of the matrices (default: 0.3; 0.1 for micro)")
    bos: float | None = setting(None, "share of the windows that start with <|bos|>; the others start with an ordinary token (default: 1; 0 for micro)")
    repeat: float = setting(0.8, "share of the training windows of text that show one passage over and over: heads learn to copy, and to rest")
    seed: int = setting(0, "of initial weights and of batches: the same for every --attn")
    vocab_size: int | None = setting(None, "tokens of the vocabulary that is built from the text; 257 is bytes and <|bos|>")
    encoding: str | None = setting(None, "gpt2: use GPT-2's vocabulary instead (downloaded once)", ("gpt2",))
    hidden_size: int | None = setting(None, "model width, C")
    intermediate_size: int | None = setting(None, "FFN width, F")
    num_hidden_layers: int | None = setting(None, "layers")
    num_attention_heads: int | None = setting(None, "query heads, H")
    num_key_value_heads: int | None = setting(None, "key/value heads (default: as many as query heads)")
    initializer_range: float | None = setting(None, "std of the initial weights (default: 1/sqrt(hidden_size); 0.08 for micro)")
    tie_word_embeddings: bool = setting(False, "use the embedding as output matrix too")
    evals: int = setting(16, "evaluations: half of them evenly spaced, half log-spaced to see the sink's birth")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    threads: int | None = setting(None, "CPU threads (default: 1 for tiny and micro, which gain nothing from more; else the cores, at most 4)")
    dtype: str = setting("auto", "auto (bf16 on CUDA that has it, else fp32), fp32, or bf16 autocast", ("auto", "fp32", "bf16"))
    compile: bool = setting(False, "torch.compile the model: faster after half a minute; needs a C++ compiler")
    out: str | None = setting(None, "folder of the run (default: out/<attn>, or out/<size>-<attn> if not tiny)")
    resume: bool = setting(False, "go on where the run in --out was stopped")
    overwrite: bool = setting(False, "throw away the run in --out and start anew")


@dataclass
class Result:
    """What `train` leaves: the folder, the last evaluation (as in log.jsonl), seconds of training, and
    what it trained. `optimal_loss` is that of a perfect predictor, known only for synthetic tasks."""

    folder: Path
    final: dict
    seconds: float
    finished: bool
    optimal_loss: float | None
    model: GPT = field(repr=False)
    corpus: data.Corpus = field(repr=False)


# Where and how a run computes may change when it is resumed; what it computes may not.
MACHINE = ("device", "threads", "dtype", "compile", "out", "resume", "overwrite")


def resolve(run: Run) -> Run:
    """Fill in what depends on the size, and check what can be checked without data. Raises TrainError."""
    for f in fields(Run):
        value, kind = getattr(run, f.name), type_of(f)
        right = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
        if not right and value is not f.default:
            raise TrainError(f"--{f.name.replace('_', '-')} must be of type {kind.__name__}, not {value!r}")
        if f.metadata["choices"] and value is not None and value not in f.metadata["choices"]:
            raise TrainError(f"--{f.name} must be one of {', '.join(f.metadata['choices'])}, not {value!r}")
    full = asdict(run)
    for name, value in (COMMON | SIZES[run.size]).items():
        value = value[run.attn] if isinstance(value, dict) else value  # tuned for each attention
        full[name] = value if full[name] is None else full[name]
    full["out"] = full["out"] or (f"out/{run.attn}" if run.size == "tiny" else f"out/{run.size}-{run.attn}")
    at_least = dict(steps=1, batch_size=1, seq_len=3, hidden_size=8, intermediate_size=8, evals=1)  # `probe` needs so much
    for name, least in at_least.items():
        if not least <= full[name] < 2**31:
            raise TrainError(f"--{name.replace('_', '-')} must be at least {least}, not {full[name]}")
    if full["threads"] is None:
        full["threads"] = min(os.cpu_count() or 1, 4)
    if not 1 <= full["threads"] <= 1024:
        raise TrainError(f"--threads must be from 1 to 1024, not {full['threads']}")
    if full["initializer_range"] is None:
        full["initializer_range"] = full["hidden_size"] ** -0.5
    if not 0 < full["lr"] < math.inf:
        raise TrainError(f"--lr must be a positive number, not {full['lr']}")
    for name in ("bos", "repeat"):
        if not 0 <= full[name] <= 1:
            raise TrainError(f"--{name} is a share of the windows, from 0 to 1, not {full[name]}")
    if full["warmup"] < 0 or not 0 <= full["weight_decay"] < math.inf:
        raise TrainError("--warmup and --weight-decay must not be negative")
    if not 0 <= full["seed"] < 2**31:
        raise TrainError(f"--seed must be from 0 to {2**31 - 1}, not {full['seed']}")
    if full["resume"] and full["overwrite"]:
        raise TrainError("--resume keeps the old run and --overwrite throws it away: give one of them")
    return Run(**full)


# ---------------------------------------------------------------- the machine

def pick_device(name: str) -> tuple[torch.device, str]:
    """The device and the reason for it. Raises TrainError when the wanted one is absent."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
        return torch.device(name), {"cuda": "a CUDA GPU is here", "mps": "an Apple GPU is here", "cpu": "no GPU is here"}[name]
    if name.split(":")[0] not in there:
        raise TrainError(f"--device must be auto, cpu, cuda or mps, not {name!r}")
    if not there[name.split(":")[0]]:
        raise TrainError(f"--device {name}: torch finds no such device here; leave the flag out or use --device cpu")
    try:
        torch.empty(1, device=name)
    except Exception:
        raise TrainError(f"--device {name}: torch cannot use it; leave the flag out") from None
    return torch.device(name), "asked for"


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """fp32, or bf16 autocast where the hardware has it: without the instructions it is far slower."""
    has = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
           "cpu": torch.cpu._is_avx512_bf16_supported, "mps": lambda: False}[device.type]()
    if name == "bf16" and not has:
        raise TrainError(f"--dtype bf16: this {device.type} has no bf16 instructions and would be far slower; use --dtype fp32")
    if name == "bf16" or (name == "auto" and device.type == "cuda" and has):
        return torch.bfloat16, "asked for" if name == "bf16" else "this GPU has it"
    return torch.float32, "asked for" if name == "fp32" else "exact, and fast enough"


def environment(device: torch.device, threads: int) -> dict:
    """Versions and hardware, for config.json. Names no user, host or path."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        git = found if (here / ".git").exists() and found else None
    except OSError:  # no git on this machine
        git = None
    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
            "system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count(), "threads": threads,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "git": git}


# ---------------------------------------------------------------- files

def write_atomically(path: Path, write) -> None:
    """Call `write(temporary path)`, then rename: a reader finds the old file or the new one, never a half."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise TrainError(f"could not write {path} ({reason}); what was saved before is still there") from None


def write_json(path: Path, value) -> None:
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


FILES = ("model.pt", "best.pt", "curve.png", "log.jsonl", "config.json")  # in the order in which --overwrite removes them


def check_folder(run: Run, folder: Path) -> tuple[dict, dict | None] | None:
    """(config.json, checkpoint) of the run to resume, None for a new one. Writes nothing.

    Raises TrainError where the folder cannot be used. A run that was killed before its first
    save has a config.json but no checkpoint: it is resumed at step 0.
    """
    try:
        names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"}  # a killed write leaves a .tmp
    except FileNotFoundError:
        names = set()
    except (OSError, ValueError) as error:
        raise TrainError(f"{folder} cannot be a run's folder ({getattr(error, 'strerror', error)}); choose another --out") from None
    ours = "config.json" in names and ("log.jsonl" in names or names <= set(FILES))
    if names and not ours:
        raise TrainError(f"{folder} holds files that are no run of train.py; choose another --out")
    if names and not (run.resume or run.overwrite):
        raise TrainError(f"{folder} already holds a run; add --resume to go on, --overwrite to start anew, or choose another --out")
    if run.resume and not names:
        raise TrainError(f"{folder} holds no run to resume; leave --resume out to start one")
    if not run.resume:
        return None
    try:
        old = json.loads((folder / "config.json").read_text())
        differs = [name for name, value in asdict(run).items() if name not in MACHINE and old["run"][name] != value]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise TrainError(f"{folder}/config.json cannot be read ({error}); start anew with --overwrite") from None
    if differs:
        name = differs[0]
        raise TrainError(f"{folder} was trained with --{name.replace('_', '-')} {old['run'][name]}, not {getattr(run, name)}; "
                         "resume with its own settings or choose another --out")
    return old, probe.load_checkpoint(folder / "model.pt") if "model.pt" in names else None


def clear_folder(run: Run, folder: Path) -> None:
    """Make the folder, and with --overwrite empty it of its old run. From here on things are written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("*.tmp"), *(folder / name for name in FILES if not run.resume)]:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise TrainError(f"cannot write to {folder} ({error.strerror}); choose another --out") from None


# ---------------------------------------------------------------- measuring

def evaluation_steps(steps: int, evals: int) -> list[int]:
    """Step 0, the last step, and between them half the evaluations evenly, half log-spaced (but none
    that is within a tenth of an even one)."""
    even = np.linspace(0, steps, evals // 2 + 2).round()
    log = np.geomspace(min(10, steps), steps, evals // 2 + 1).round()
    return sorted({*map(int, even), *(int(s) for s in log if np.abs(even - s).min() > s / 10)})


class Evaluation:
    """The same validation windows at every call and in every run with the same data, T and bos."""

    def __init__(self, corpus, seq_len: int, bos: float, device):
        fixed = torch.Generator().manual_seed(20260511)
        n, few = max(1, EVAL_TOKENS // seq_len), max(8, PROBE_TOKENS // seq_len)
        draw = lambda count, share: [t.to(device) for t in corpus.batch(count, seq_len, fixed, split="val", bos=share)]
        self.x, self.y = draw(n, bos)
        self.windows = {"links": draw(few, 0.0)[0]}
        if bos > 0:
            self.windows["links_bos"] = draw(few, 1.0)[0]
        if corpus.name == "copy":  # random symbols: nothing to copy, so that every query rests
            self.windows["links_rest"] = torch.randint(corpus.bos, (few, seq_len), generator=fixed).to(device)
        self.bytes_per_token = corpus.bytes_per_token

    @torch.no_grad()
    def __call__(self, model) -> dict:
        """val_loss in nats per token, bpb in bits per byte (text), and the numbers of `probe.chain`
        for windows that start with an ordinary token (`links`), with <|bos|> (`links_bos`, if it was trained with
        some) and, for the copying task, of random symbols where there is nothing to copy (`links_rest`). Of a model that has
        diverged only val_loss, which is then nan or infinite."""
        total, count = 0.0, 0
        few = max(1, 4096 // self.x.shape[1])  # the logits of more tokens would fill a small GPU
        for x, y in zip(self.x.split(few), self.y.split(few)):
            n = (y != -100).sum().item()
            total, count = total + model(x, y)[1].item() * n, count + n
        loss = total / count
        numbers = {"val_loss": loss}
        if not math.isfinite(loss):
            return numbers
        if self.bytes_per_token:
            numbers["bpb"] = loss / math.log(2) / self.bytes_per_token
        try:
            for name, idx in self.windows.items():  # JSON has no nan: a number that does not exist is null
                numbers[name] = {k: v if math.isfinite(v) else None for k, v in probe.chain(model, idx).items()}
        except torch.linalg.LinAlgError:  # states so large that their squares overflow
            return {"val_loss": math.nan}
        return numbers


def draw_curve(folder: Path, log: list[dict], optimum: float | None) -> None:
    """curve.png: losses and the strongest head's attention to position 0 over the steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    steps = [row["step"] for row in log]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(steps, [row["val_loss"] for row in log], "k-", label="validation")
    left.plot(steps, [row["train_loss"] for row in log], color="0.6", label="training, smoothed (repeats are easy)")
    if optimum is not None:
        left.axhline(optimum, color="0.6", linestyle=":", label="perfect predictor")
    left.set(xlabel="step", ylabel="loss (nats per token)")
    left.legend()
    for key, style, name in (("links", "k-", "first token ordinary"), ("links_bos", "k--", "first token <|bos|>"),
                             ("links_rest", "k:", "ordinary, nothing to copy")):
        if key in log[-1]:
            right.plot(steps, [row[key]["sink_alpha_max"] for row in log], style, label=name)
    right.set(xlabel="step", ylabel="mean attention to position 0,\nstrongest head", ylim=(0, 1))
    right.legend()
    write_atomically(folder / "curve.png", lambda p: figure.savefig(p, dpi=120, format="png"))
    plt.close(figure)


# ---------------------------------------------------------------- the loop

def learning_rate(step: int, run: Run) -> float:
    """Linear warm-up, then a cosine from lr to lr / 10 at the last step."""
    warm = min(1.0, (step + 1) / max(1, run.warmup))
    return run.lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / run.steps))


def make_optimizer(model: GPT, run: Run, device) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.95); weight decay on matrices only, not on the gains of the norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": run.weight_decay}, {"params": gains, "weight_decay": 0.0}],
                             lr=run.lr, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"))


def restore(run: Run, saved: dict, model: GPT, optimizer, batches: torch.Generator) -> dict:
    """Put a checkpoint back; returns its counters. Raises TrainError where it is not one of this run."""
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        batches.set_state(saved["batches"])
        counters = {name: saved[name] for name in ("step", "best", "smooth", "seconds")}
        if not 0 <= counters["step"] <= run.steps or math.isnan(counters["best"] + (counters["smooth"] or 0) + counters["seconds"]):
            raise ValueError(f"it is at step {counters['step']}")
        return counters
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise TrainError(f"the checkpoint model.pt does not fit this run ({str(error).splitlines()[0]}); "
                         "start anew with --overwrite") from None


def train(run: Run, say=partial(print, flush=True)) -> Result:
    """Train as `run` says; every step depends on nothing but the settings, so a resumed run ends
    in the same weights (bit for bit on CPU with equal threads). `say` gets the progress lines.

    Raises TrainError, data.DataError, ModelError or probe.ProbeError with one line for the user;
    Ctrl-C saves and returns.
    """
    run = resolve(run)
    folder = Path(run.out)
    device, why_device = pick_device(run.device)
    dtype, why_dtype = pick_dtype(run.dtype, device)
    torch.set_num_threads(run.threads)
    found = check_folder(run, folder)
    corpus = data.load(run.data, seq_len=run.seq_len, vocab_size=run.vocab_size, encoding=run.encoding)
    cfg = Config(vocab_size=corpus.vocab_size, max_position_embeddings=run.seq_len, attn=run.attn,
                 **{name: getattr(run, name) for name in (
                     "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "initializer_range", "tie_word_embeddings")})
    model = GPT(cfg, seed=run.seed).to(device)
    optimizer = make_optimizer(model, run, device)
    batches = torch.Generator().manual_seed(run.seed + 1)
    evaluation, evaluate_at = Evaluation(corpus, run.seq_len, run.bos, device), set(evaluation_steps(run.steps, run.evals))
    step, best, smooth, seconds, log = 0, math.inf, None, 0.0, []
    if found:
        old, saved = found
        if old.get("corpus", corpus.fingerprint()) != corpus.fingerprint():
            raise TrainError(f"the text of {run.data} is no longer the one that {folder} was trained on; choose another --out")
        if saved is not None:
            step, best, smooth, seconds = restore(run, saved, model, optimizer, batches).values()
            log = [row for row in read_log(folder) if row["step"] <= step]  # without lines written after the last save

    clear_folder(run, folder)  # before this line nothing has been written or removed
    header = {"run": asdict(run), "model": asdict(cfg), "parameters": sum(p.numel() for p in model.parameters()),
              "corpus": corpus.fingerprint(), "optimal_loss": corpus.optimal_loss(run.seq_len, run.bos),
              "environment": environment(device, run.threads)}
    write_json(folder / "config.json", header)
    say(f"{run.attn} attention, {header['parameters']:,} parameters, {run.steps:,} steps of {run.batch_size} x {run.seq_len} tokens of {run.data}")
    say(f"device {device} ({why_device}), {str(dtype)[6:]} ({why_dtype}), {run.threads} threads, seed {run.seed} -> {folder}/")
    if header["optimal_loss"] is not None:
        say(f"a perfect predictor, who knows the rules of {run.data}, would reach a loss of {header['optimal_loss']:.4f}")
    if step:
        say(f"resuming at step {step:,}")

    forward = torch.compile(model) if run.compile else model
    cast = torch.autocast(device.type, torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()

    def save():
        if not all(p.isfinite().all() for p in model.parameters()):
            raise TrainError(not_finite("model", step, folder, run))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "batches": batches.get_state(),
                 "step": step, "best": best, "smooth": smooth, "seconds": seconds}
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in (header, *log))
        write_atomically(folder / "log.jsonl", lambda p: p.write_text(lines))
        write_atomically(folder / "model.pt", lambda p: torch.save(state, p))

    stop = threading.Event()  # Ctrl-C is obeyed between two steps, where the state is whole
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set()) if on_main_thread else None
    clock = time.perf_counter()
    try:
        while True:
            if step in evaluate_at and not (log and log[-1]["step"] == step):
                seconds += time.perf_counter() - clock
                row = {"step": step, "tokens": step * run.batch_size * run.seq_len, "seconds": round(seconds, 2),
                       "train_loss": smooth, **evaluation(model)}
                if not math.isfinite(row["val_loss"]):
                    raise TrainError(not_finite("validation loss", step, folder, run))
                log.append(row)
                if row["val_loss"] < best:
                    best = row["val_loss"]
                    write_atomically(folder / "best.pt", lambda p: torch.save({"model": model.state_dict(), "step": step}, p))
                save()
                clock = time.perf_counter()
                say(progress(row, run, seconds))
            if step >= run.steps or stop.is_set():
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, run)
            x, y = (t.to(device) for t in corpus.batch(run.batch_size, run.seq_len, batches, bos=run.bos, repeat=run.repeat))
            with cast:
                loss = forward(x, y)[1]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 10 == 0 or step in evaluate_at:  # .item() waits for a GPU: not at every step
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainError(not_finite("loss", step, folder, run))
                smooth = value if smooth is None else 0.9 * smooth + 0.1 * value
        if step < run.steps:
            seconds += time.perf_counter() - clock
            save()
            say(f"stopped at step {step:,} and saved; go on with: python train.py {as_flags(run)} --resume")
    finally:
        if on_main_thread:
            signal.signal(signal.SIGINT, before)
    if log:
        draw_curve(folder, log, header["optimal_loss"])
    return Result(folder, log[-1] if log else {}, seconds, step >= run.steps, header["optimal_loss"], model, corpus)


def not_finite(what: str, step: int, folder: Path, run: Run) -> str:
    return (f"the {what} is no longer finite at step {step}; {folder}/model.pt keeps the last good state: "
            f"try a smaller --lr (it was {run.lr}) or a longer --warmup, with --overwrite")


def progress(row: dict, run: Run, seconds: float) -> str:
    """One line: step, share done, losses, bits per byte, speed, time to go, and the two live numbers."""
    rate = row["tokens"] / seconds if row["step"] else 0.0
    left = (run.steps * run.batch_size * run.seq_len - row["tokens"]) / rate if rate else 0.0
    bpb = f" {row['bpb']:.3f} bits/byte" if "bpb" in row else ""
    train_loss = f"{row['train_loss']:.3f}" if row["train_loss"] is not None else "  -  "
    kind, first = next((kind, first) for kind, first in (
        ("links_bos", "<|bos|>"), ("links_rest", "first token, nothing to copy"), ("links", "first token")) if kind in row)
    return (f"step {row['step']:>6,} {row['step'] / run.steps:4.0%} | loss {train_loss} val {row['val_loss']:.3f}{bpb} | "
            f"{rate:7,.0f} tok/s, {left:4.0f} s left | {first}: attention {row[kind]['sink_alpha_max']:.2f}, "
            f"norm {row[kind]['norm_ratio']:.1f} x median")


def read_log(folder: Path) -> list[dict]:
    """The evaluations of a run, in order of steps, without the header line."""
    path = Path(folder) / "log.jsonl"
    try:
        log = [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
        if not all(isinstance(row["step"], int) and {"val_loss", "train_loss", "links"} <= row.keys() for row in log):
            raise ValueError("a line is no evaluation")
        return log
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise TrainError(f"{path} cannot be read ({error}); remove it to go on without the old evaluations") from None


def is_finished(run: Run) -> bool:
    """Whether the folder of this run holds it, trained to its last step. Raises TrainError where it holds another."""
    run = resolve(replace(run, resume=True, overwrite=False))
    try:
        found = check_folder(run, Path(run.out))
    except TrainError:
        if (Path(run.out) / "config.json").exists():
            raise
        return False  # nothing there yet
    return found[1] is not None and found[1].get("step") == run.steps


def trained(*runs: Run, jobs: int = 2, say=partial(print, flush=True)) -> list[Path]:
    """The folders of these runs. What is missing is trained, what was stopped goes on: `jobs` at a time, each in a
    process and thread of its own, as models this small gain nothing from a second thread. Raises TrainError."""
    started = []

    def one(run):
        if not is_finished(run):
            again = ["--resume"] if (Path(run.out) / "config.json").exists() else []
            words = [sys.executable, __file__, *shlex.split(as_flags(run)), "--threads", "1", *again]
            with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                started.append(process)
                for line in process.stdout:
                    if line.startswith("step "):
                        say(f"{run.out}: {line.rstrip()}")
                error = process.stderr.read().strip()
            if process.returncode:
                raise TrainError(f"{run.out}: {error or 'training was stopped'}")
        return Path(run.out)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one, resolve(run)) for run in runs]
        try:
            return [future.result() for future in waiting]
        except BaseException:  # one failed, or Ctrl-C: the others save and stop
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
            raise


# ---------------------------------------------------------------- the command line

def as_flags(run: Run) -> str:
    """The flags that give this run again (where they differ from the defaults)."""
    plain, words = resolve(Run(attn=run.attn, size=run.size)), []
    usual = asdict(plain) | {"attn": Run.attn, "size": Run.size}
    for f in fields(Run):
        value = getattr(run, f.name)
        if value not in (usual[f.name], f.default) and f.name not in ("resume", "overwrite"):
            words += [f"--{f.name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"train.py: {message}; see python train.py --help\n")


def parse(words=None):
    parser = Parser(description=__doc__.splitlines()[0], epilog="Sizes: " + "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in s.items())}" for name, s in SIZES.items()))
    for f in fields(Run):
        flag, text = f"--{f.name.replace('_', '-')}", f.metadata["help"].replace("%", "%%")
        if isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true", help=text)
        else:
            text += " (default: by size)" if f.default is None and "default" not in text and f.name != "encoding" else ""
            text += f" (default: {f.default})" if f.default is not None else ""
            parser.add_argument(flag, type=type_of(f), default=f.default, choices=f.metadata["choices"], help=text)
    parser.add_argument("--sample", metavar="RUN", help="do not train: write text with the model in this folder")
    parser.add_argument("--prompt", default="import ", help="what --sample goes on from (default: 'import ')")
    parser.add_argument("--tokens", type=int, default=200, help="how many tokens --sample writes (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of --sample; 0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=40, help="--sample draws from the k likeliest tokens (default: 40)")
    return parser.parse_args(words)


def check_sampling(tokens: int, temperature: float, top_k: int | None) -> None:
    if tokens < 1 or (top_k is not None and top_k < 1):
        raise TrainError("--tokens and --top-k must be at least 1")
    if temperature != 0 and not 0.01 <= temperature <= 100:
        raise TrainError(f"--temperature must be 0 or from 0.01 to 100, not {temperature}")


def write_text(model: GPT, corpus: data.Corpus, prompt: str, tokens=200, temperature=0.8, top_k: int | None = 40, seed=0) -> str:
    """The prompt and what the model writes after it. Any text can be a prompt, of a task any of its symbols."""
    check_sampling(tokens, temperature, top_k)
    device = model.lm_head.weight.device
    idx = torch.tensor([[corpus.bos, *corpus.encode(prompt)]], device=device)
    out = model.generate(idx, tokens, temperature, top_k, torch.Generator(device).manual_seed(seed))
    return corpus.decode(out[0, 1:])


def sample(folder, prompt: str, **how) -> str:
    """`write_text` with the model of a run. Raises TrainError, data.DataError or probe.ProbeError."""
    try:
        model, corpus, _ = probe.load_run(folder)
    except OSError as error:
        raise TrainError(f"cannot open {folder} ({error.strerror})") from None
    return write_text(model, corpus, prompt, **how)


def main(words=None) -> int:
    args = vars(parse(words))
    how = {name: args.pop(name) for name in ("tokens", "temperature", "top_k")}
    folder, prompt = args.pop("sample"), args.pop("prompt")
    try:
        check_sampling(**how)
        if folder is not None:
            resolve(Run(**args))
            print(sample(folder, prompt, **how, seed=args["seed"]))
            return 0
        result = train(Run(**args))
        if not result.finished:
            return 130
        print(f"\nvalidation loss {result.final['val_loss']:.4f} nats per token after {result.seconds:.0f} s; files in {result.folder}/")
        if result.optimal_loss is not None:
            print(f"a perfect predictor, who knows the rules of {result.corpus.name}, would reach {result.optimal_loss:.4f} on average; "
                  "the fixed windows of the evaluation can be a little easier or harder")
        prompt = prompt if result.corpus.encoding else ""
        print(f"a sample:\n{write_text(result.model, result.corpus, prompt, **how)}\n")
        print(f"next: python probe.py {result.folder}")
        return 0
    except (TrainError, ModelError, data.DataError, probe.ProbeError) as error:
        message, code = str(error), 2
    except RuntimeError as error:
        if "memory" in str(error):
            message = "not enough memory; try a smaller --batch-size or --seq-len"
        elif args["compile"] and "torch._" in type(error).__module__:
            message = f"--compile failed ({type(error).__name__}); it needs a C++ compiler: leave it out"
        else:
            raise
        code = 2
    except KeyboardInterrupt:
        message, code = "stopped before the first step; nothing is lost", 130
    print("train.py:", " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter that the model writes
    sys.exit(main())
