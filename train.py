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
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

import data
import probe
from model import ATTENTIONS, GPT, Config, ModelError

SIZES = {  # model and schedule that fit together; every one of these can be overridden by its flag
    "tiny": dict(hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=2,
                 seq_len=64, batch_size=16, steps=5000, lr=4e-3),
    "small": dict(hidden_size=320, intermediate_size=864, num_hidden_layers=8, num_attention_heads=5,
                  seq_len=256, batch_size=64, steps=10000, lr=2e-3),
    "base": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
                 seq_len=1024, batch_size=16, steps=20000, lr=6e-4),
}
EVAL_TOKENS, PROBE_TOKENS = 32768, 4096  # per evaluation; fixed windows, whatever is trained


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
    data: str = setting("stdlib", f"{', '.join(data.NAMES)}, or a file or folder of your own text")
    size: str = setting("tiny", "tiny (laptop CPU, minutes), small (laptop GPU), base (one large GPU)", tuple(SIZES))
    steps: int | None = setting(None, "optimiser steps")
    batch_size: int | None = setting(None, "windows per step")
    seq_len: int | None = setting(None, "tokens per window, T")
    lr: float | None = setting(None, "peak learning rate; cosine to a tenth of it after the warm-up")
    warmup: int = setting(100, "steps of linear warm-up")
    weight_decay: float = setting(0.1, "AdamW weight decay of the matrices")
    bos: float = setting(0.5, "share of the windows that start with <|bos|>; the others start with an ordinary token")
    seed: int = setting(0, "of initial weights and of batches: the same for every --attn")
    vocab_size: int = setting(1024, "tokens of the vocabulary that is built from the text")
    encoding: str | None = setting(None, "gpt2: use GPT-2's vocabulary instead (downloaded once)", ("gpt2",))
    hidden_size: int | None = setting(None, "model width, C")
    intermediate_size: int | None = setting(None, "FFN width, F")
    num_hidden_layers: int | None = setting(None, "layers")
    num_attention_heads: int | None = setting(None, "query heads, H")
    num_key_value_heads: int | None = setting(None, "key/value heads (default: as many as query heads)")
    initializer_range: float | None = setting(None, "std of the initial weights (default: 1/sqrt(hidden_size))")
    tie_word_embeddings: bool = setting(False, "use the embedding as output matrix too")
    evals: int = setting(24, "evaluations: half of them evenly spaced, half log-spaced to see the sink's birth")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    threads: int | None = setting(None, "CPU threads (default: the cores, at most 4: more slow a tiny model down)")
    dtype: str = setting("auto", "auto (bf16 on CUDA that has it, else fp32), fp32, or bf16 autocast", ("auto", "fp32", "bf16"))
    compile: bool = setting(False, "torch.compile the model: faster after half a minute; needs a C++ compiler")
    out: str | None = setting(None, "folder of the run (default: out/<attn>)")
    resume: bool = setting(False, "go on where the run in --out was stopped")
    overwrite: bool = setting(False, "throw away the run in --out and start anew")


@dataclass
class Result:
    """What `train` leaves: the folder, the last evaluation (as in log.jsonl), seconds of training."""

    folder: Path
    final: dict
    seconds: float
    finished: bool


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
    for name, value in SIZES[run.size].items():
        full[name] = value if full[name] is None else full[name]
    full["out"] = full["out"] or f"out/{run.attn}"
    full["threads"] = full["threads"] or min(os.cpu_count() or 1, 4)
    full["initializer_range"] = full["initializer_range"] or full["hidden_size"] ** -0.5
    for name in ("steps", "batch_size", "seq_len", "threads", "evals"):
        if full[name] < 1:
            raise TrainError(f"--{name.replace('_', '-')} must be at least 1, not {full[name]}")
    if not 0 < full["lr"] < math.inf:
        raise TrainError(f"--lr must be a positive number, not {full['lr']}")
    if not 0 <= full["bos"] <= 1:
        raise TrainError(f"--bos is a share of the windows, from 0 to 1, not {full['bos']}")
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
    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True) \
        if (Path(__file__).parent / ".git").exists() else None
    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
            "system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count(), "threads": threads,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "git": git.stdout.strip() if git and git.returncode == 0 else None}


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


def open_folder(run: Run, folder: Path) -> dict | None:
    """Make the run's folder, or check the one to resume and return its checkpoint. Raises TrainError."""
    if folder.exists() and not folder.is_dir():
        raise TrainError(f"{folder} is a file; choose another --out")
    used = folder.is_dir() and any(folder.iterdir())
    ours = (folder / "config.json").exists()
    if used and not ours:
        raise TrainError(f"{folder} holds files that are no run of train.py; choose another --out")
    if used and not (run.resume or run.overwrite):
        raise TrainError(f"{folder} already holds a run; add --resume to go on, --overwrite to start anew, or choose another --out")
    if run.resume and not ours:
        raise TrainError(f"{folder} holds no run to resume; leave --resume out to start one")
    if run.resume:
        try:
            old = json.loads((folder / "config.json").read_text())["run"]
            differs = [name for name, value in asdict(run).items() if name not in MACHINE and old[name] != value]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise TrainError(f"{folder}/config.json cannot be read ({error}); start anew with --overwrite") from None
        if differs:
            name = differs[0]
            raise TrainError(f"{folder} was trained with --{name.replace('_', '-')} {old[name]}, not {getattr(run, name)}; "
                             "resume with its own settings or choose another --out")
        return probe.load_checkpoint(folder / "model.pt") if (folder / "model.pt").exists() else {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("model.pt", "best.pt", "log.jsonl", "curve.png", "config.json"):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise TrainError(f"cannot write to {folder} ({error.strerror}); choose another --out") from None
    return None


# ---------------------------------------------------------------- measuring

def evaluation_steps(steps: int, evals: int) -> list[int]:
    """Step 0, the last step, and between them half the evaluations evenly, half log-spaced."""
    even = np.linspace(0, steps, evals // 2 + 2)
    log = np.geomspace(min(10, steps), steps, evals // 2 + 1)
    return sorted({int(round(s)) for s in (*even, *log)})


class Evaluation:
    """The same validation windows at every call and in every run with the same data, T and bos."""

    def __init__(self, corpus, seq_len: int, bos: float, device):
        fixed = torch.Generator().manual_seed(20260511)
        n, few = max(1, EVAL_TOKENS // seq_len), max(8, PROBE_TOKENS // seq_len)
        draw = lambda count, share: [t.to(device) for t in corpus.batch(count, seq_len, fixed, split="val", bos=share)]
        self.x, self.y = draw(n, bos)
        self.ordinary, self.with_bos = draw(few, 0.0)[0], draw(few, 1.0)[0] if bos > 0 else None
        self.bytes_per_token = corpus.bytes_per_token

    @torch.no_grad()
    def __call__(self, model) -> dict:
        """val_loss in nats per token, bpb in bits per byte (text), and the numbers of `probe.chain`
        for windows that start with an ordinary token (`links`) and with <|bos|> (`links_bos`)."""
        total, count = 0.0, 0
        for x, y in zip(self.x.split(64), self.y.split(64)):
            n = (y != -100).sum().item()
            total, count = total + model(x, y)[1].item() * n, count + n
        loss = total / count
        numbers = {"val_loss": loss, "links": probe.chain(model, self.ordinary)}
        if self.with_bos is not None:
            numbers["links_bos"] = probe.chain(model, self.with_bos)
        if self.bytes_per_token:
            numbers["bpb"] = loss / math.log(2) / self.bytes_per_token
        return numbers


def draw_curve(folder: Path, log: list[dict]) -> None:
    """curve.png: losses, and the two live numbers, over the steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    steps = [row["step"] for row in log]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(steps, [row["val_loss"] for row in log], "k-", label="validation")
    left.plot(steps, [row["train_loss"] for row in log], color="0.6", label="training, smoothed")
    left.set(xlabel="step", ylabel="loss (nats per token)")
    left.legend()
    for key, style, name in (("links", "k-", "first token ordinary"), ("links_bos", "k--", "first token <|bos|>")):
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


def train(run: Run, say=print) -> Result:
    """Train as `run` says; every step depends on nothing but the settings, so a resumed run ends
    in the same weights (bit for bit on CPU with equal threads). `say` gets the progress lines.

    Raises TrainError, data.DataError or ModelError with one line for the user; Ctrl-C saves and returns.
    """
    run = resolve(run)
    folder = Path(run.out)
    device, why_device = pick_device(run.device)
    dtype, why_dtype = pick_dtype(run.dtype, device)
    torch.set_num_threads(run.threads)
    if not (folder / "config.json").exists() or run.resume or run.overwrite:
        corpus = data.load(run.data, seq_len=run.seq_len, vocab_size=run.vocab_size, encoding=run.encoding)
        cfg = Config(vocab_size=corpus.vocab_size, max_position_embeddings=run.seq_len, attn=run.attn,
                     **{name: getattr(run, name) for name in (
                         "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                         "num_key_value_heads", "initializer_range", "tie_word_embeddings")})
    saved = open_folder(run, folder)  # before this line nothing has been written

    model = GPT(cfg, seed=run.seed).to(device)
    optimizer = make_optimizer(model, run, device)
    batches = torch.Generator().manual_seed(run.seed + 1)
    step, best, smooth, seconds, log = 0, math.inf, None, 0.0, []
    if saved:
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            batches.set_state(saved["batches"])
            step, best, smooth, seconds = (saved[name] for name in ("step", "best", "smooth", "seconds"))
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise TrainError(f"{folder}/model.pt does not fit this run ({str(error).splitlines()[0]}); "
                             "start anew with --overwrite") from None
        log = [row for row in read_log(folder) if row["step"] <= step]  # lines written after the last save

    parameters = sum(p.numel() for p in model.parameters())
    header = {"run": asdict(run), "model": asdict(cfg), "parameters": parameters, "environment": environment(device, run.threads)}
    write_json(folder / "config.json", header)
    say(f"{run.attn} attention, {parameters:,} parameters, {run.steps:,} steps of {run.batch_size} x {run.seq_len} tokens of {run.data}")
    say(f"device {device} ({why_device}), {str(dtype)[6:]} ({why_dtype}), {run.threads} threads, seed {run.seed} -> {folder}/")
    if step:
        say(f"resuming at step {step:,}")

    forward = torch.compile(model) if run.compile else model
    cast = torch.autocast(device.type, torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
    evaluation, evaluate_at = Evaluation(corpus, run.seq_len, run.bos, device), set(evaluation_steps(run.steps, run.evals))

    def save():
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "batches": batches.get_state(),
                 "step": step, "best": best, "smooth": smooth, "seconds": seconds}
        write_atomically(folder / "log.jsonl", lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in (header, *log))))
        write_atomically(folder / "model.pt", lambda p: torch.save(state, p))

    stop = threading.Event()  # Ctrl-C is obeyed between two steps, where the state is whole
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set()) if on_main_thread else None
    clock, timed = time.perf_counter(), 0
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
            x, y = (t.to(device) for t in corpus.batch(run.batch_size, run.seq_len, batches, bos=run.bos))
            with cast:
                loss = forward(x, y)[1]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 10 == 0 or step == run.steps or step in evaluate_at:  # .item() waits for a GPU: not at every step
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainError(not_finite("loss", step, folder, run))
                smooth = value if smooth is None else 0.9 * smooth + 0.1 * value
        if stop.is_set() and step < run.steps:
            seconds += time.perf_counter() - clock
            save()
            say(f"stopped at step {step:,} and saved; go on with: python train.py {as_flags(run)} --resume")
    finally:
        if on_main_thread:
            signal.signal(signal.SIGINT, before)
    if log:
        draw_curve(folder, log)
    return Result(folder, log[-1] if log else {}, seconds, step >= run.steps)


def not_finite(what: str, step: int, folder: Path, run: Run) -> str:
    return (f"the {what} is no longer finite at step {step}; {folder}/model.pt keeps the last good state: "
            f"try a smaller --lr (it was {run.lr}) or a longer --warmup, with --overwrite")


def progress(row: dict, run: Run, seconds: float) -> str:
    """One line: step, share done, losses, bits per byte, speed, time to go, and the two live numbers."""
    rate = row["tokens"] / seconds if row["step"] else 0.0
    left = (run.steps * run.batch_size * run.seq_len - row["tokens"]) / rate if rate else 0.0
    bpb = f" {row['bpb']:.3f} bits/byte" if "bpb" in row else ""
    train_loss = f"{row['train_loss']:.3f}" if row["train_loss"] is not None else "  -  "
    links = row["links"]
    return (f"step {row['step']:>6,} {row['step'] / run.steps:4.0%} | loss {train_loss} val {row['val_loss']:.3f}{bpb} | "
            f"{rate:7,.0f} tok/s, {left:4.0f} s left | sink {links['sink_alpha_max']:.2f}, norm ratio {links['norm_ratio']:.2f}")


def read_log(folder: Path) -> list[dict]:
    """The evaluations of a run, in order of steps, without the header line."""
    path = Path(folder) / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []
    except (ValueError, OSError) as error:
        raise TrainError(f"{path} cannot be read ({error}); start anew with --overwrite") from None


# ---------------------------------------------------------------- the command line

def as_flags(run: Run) -> str:
    """The flags that give this run again (where they differ from the defaults)."""
    plain, words = resolve(Run(attn=run.attn, size=run.size)), []
    for f in fields(Run):
        value = getattr(run, f.name)
        if value not in (getattr(plain, f.name), f.default) and f.name not in ("resume", "overwrite"):
            words += [f"--{f.name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return " ".join(words)


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


def sample(folder, prompt: str, tokens: int = 200, temperature: float = 0.8, top_k: int | None = 40, seed: int = 0) -> str:
    """Text that the model of a run writes after `prompt`; any text can be a prompt. Raises TrainError."""
    if tokens < 1 or temperature < 0 or (top_k is not None and top_k < 1):
        raise TrainError("--tokens and --top-k must be at least 1, --temperature at least 0")
    model, corpus, _ = probe.load_run(folder)
    idx = torch.tensor([[corpus.bos, *corpus.encode(prompt)]])
    out = model.generate(idx, tokens, temperature, top_k, torch.Generator().manual_seed(seed))
    return corpus.decode(out[0, 1:])


def main(words=None) -> int:
    args = vars(parse(words))
    of_sample = {name: args.pop(name) for name in ("sample", "prompt", "tokens", "temperature", "top_k")}
    try:
        if of_sample["sample"] is not None:
            folder = of_sample.pop("sample")
            print(sample(folder, **of_sample, seed=args["seed"]))
            return 0
        result = train(Run(**args))
        if not result.finished:
            return 130
        final = result.final
        print(f"\nvalidation loss {final['val_loss']:.4f} nats per token after {result.seconds:.0f} s; files in {result.folder}/")
        prompt = "import " if data.load(args["data"]).encoding else ""
        print(f"a sample:\n{sample(result.folder, prompt, tokens=80)}\n")
        print(f"next: python probe.py {result.folder}")
        return 0
    except (TrainError, ModelError, data.DataError, probe.ProbeError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
