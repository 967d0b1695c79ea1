"""Shared helpers: files, flags, devices, terminal.

Every module raises UserError for what a user can mend; `program` turns it into one line on stderr
and exit code 2.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import numpy as np
import torch


# CACHE keeps what is fetched, OUT what is trained and measured; a class on one server, or a
# clone that nobody may write to, has them elsewhere.
CACHE = Path(os.environ.get("ATTENTION_SINK_CACHE") or Path(__file__).parent / "cache").expanduser()
OUT = str(Path(os.environ.get("ATTENTION_SINK_OUT") or "out").expanduser())


class UserError(ValueError):
    """What a user can mend. The message is one line: what was wrong, and what to do."""


def reason(error: BaseException) -> str:
    """One line for an exception of the system or of a library."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:300]


# ---------------------------------------------------------------- reading

def read_json(path) -> dict:
    """Read a file that holds one JSON object. Raises UserError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot open {path}: {reason(error)}") from None
    except ValueError:  # not UTF-8, or not JSON
        raise UserError(f"{path} is not JSON") from None


# ---------------------------------------------------------------- writing

def write_atomically(path, write) -> None:
    """Call `write(temporary path)`, then rename: a reader finds the old file or the new one, never
    a half. A temporary file that a kill left behind is overwritten by the next call.
    Raises UserError, with the old file untouched."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(f"could not write {path} ({reason(error)}); "
                        "what was there before is untouched") from None
    finally:
        with contextlib.suppress(OSError):  # after the renaming it is gone
            part.unlink()


def write_json(path, value) -> None:
    """Write a JSON file; nan and infinity become null."""
    text = json.dumps(nan_to_none(value), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def nan_to_none(value):
    """Replace nan and infinity by None, for JSON, in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: nan_to_none(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_none(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def one_writer(folder):
    """Make a folder and hold it for writing. UserError at once if another process holds it. The
    system releases the lock when the process ends, however it ends; the file `.lock` stays."""
    lock = filelock.FileLock(Path(folder) / ".lock")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{folder} is being written by another program; wait for it, "
                        "or choose another folder") from None
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({reason(error)}); choose another folder, "
                        "for good by ATTENTION_SINK_OUT and ATTENTION_SINK_CACHE") from None
    with held:
        yield


# ---------------------------------------------------------------- the machine

def pick_device(name: str) -> tuple[torch.device, str]:
    """The device and the reason for it. Raises UserError if the wanted one is absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), "a CUDA GPU is here"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "an Apple GPU is here"
        return torch.device("cpu"), "no GPU is here"
    if name.split(":")[0] in ("cpu", "cuda", "mps"):
        with contextlib.suppress(Exception):  # each kind of device fails in its own way
            torch.empty(1, device=name)
            return torch.device(name), "asked for"
    raise UserError("--device must be auto, cpu, or a cuda or mps that torch finds here, not "
                    f"{name!r}; leave the flag out")


@contextlib.contextmanager
def plain_torch():
    """Gradients, float32 and the CPU are torch's defaults, whatever a notebook has set."""
    dtype, cpu = torch.get_default_dtype(), torch.device("cpu")
    elsewhere = torch.get_default_device() != cpu  # a context that is not needed costs time
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            with cpu if elsewhere else contextlib.nullcontext():
                yield
    finally:
        torch.set_default_dtype(dtype)


def multiplies_bf16(device: torch.device) -> bool:
    """True if bf16 is faster there: on a GPU that has it, or a CPU with AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch has none
    return device.type == "cpu" and known.get("avx512_bf16", False)


def environment(device: torch.device, threads: int) -> dict:
    """Versions and hardware, to stand beside a result. Names no user, host or path."""
    here, git = Path(__file__).parent.parent, None
    if (here / ".git").exists():
        with contextlib.suppress(OSError):  # no git on this machine
            words = ["git", "-C", here, "rev-parse", "HEAD"]
            git = subprocess.run(words, capture_output=True, text=True).stdout.strip() or None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(), "system": platform.system(),
            "machine": platform.machine(), "cores": os.cpu_count(), "threads": threads,
            "device": name, "git": git}


# ---------------------------------------------------------------- flags and terminal

class Parser(argparse.ArgumentParser):
    """Raises UserError for a wrong flag, and takes no abbreviations."""

    def __init__(self, prog: str, **options):
        super().__init__(prog=prog, allow_abbrev=False, **options)

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")


def digits(v) -> str:
    """Three digits of a number; "-" for one that does not exist."""
    if v is None or not math.isfinite(v):
        return "-"
    if abs(v) < 1000:
        return f"{v:.3g}"
    return f"{v:.0f}" if abs(v) < 1e5 else f"{v:.1e}"


@contextlib.contextmanager
def interrupts():
    """An event that Ctrl-C sets, for a program that stops when its state is whole."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def program(name: str, main) -> int:
    """Run `main()` and return its exit code. What a user can mend ends in one line on stderr and
    code 2, Ctrl-C in one line and 130."""
    with contextlib.suppress(AttributeError):  # a terminal may lack a letter; a notebook has all
        sys.stdout.reconfigure(errors="backslashreplace")
        sys.stderr.reconfigure(errors="backslashreplace")
    code = 2
    try:
        code = main()
        sys.stdout.flush()  # so that a closed pipe is met here, not at exit
        return code
    except UserError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        message = f"{error}: pip install -r requirements.txt"
    except KeyboardInterrupt:
        message, code = "stopped", 130
    except BrokenPipeError:  # as in `probe.py ... | head`: what is still to be printed vanishes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell says of a program that a closed pipe has ended
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{reason(error)}"
    except (MemoryError, torch.OutOfMemoryError):
        message = "not enough memory; ask for less"
    except RuntimeError as error:  # of torch on a CPU
        if "allocate memory" not in str(error):
            raise
        message = "not enough memory; ask for less"
    print(f"{name}:", " ".join(message.split()), file=sys.stderr)
    return code
