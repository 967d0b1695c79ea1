"""The border between the programs and everything that can go wrong outside them: the user's files,
the disk, the terminal, Ctrl-C. Every other module opens, reads and writes through these functions,
and raises UserError for what a user can mend; `program` turns that into one line and exit code 2.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import zipfile
from dataclasses import field, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

MOST = 2**30  # bytes; whatever is larger is no config, checkpoint or text of ours


class UserError(ValueError):
    """What a user can mend. The message is one line: what was wrong, and what to do."""


def reason(error: BaseException) -> str:
    """One line for an exception of the system or of a library."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:300]


# ---------------------------------------------------------------- reading

def open_regular(path, most=MOST):
    """An ordinary file, opened for reading bytes. A pipe or device, which could hang or never end,
    and a file of more than `most` bytes raise UserError, as whatever cannot be opened does."""
    try:
        # without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        handle = os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"cannot open {show(path)}: {reason(error)}") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        os.close(handle)
        size = f"larger than {most:,} bytes" if stat.S_ISREG(found.st_mode) else "no ordinary file"
        raise UserError(f"cannot open {show(path)}: it is {size}")
    return os.fdopen(handle, "rb")


def read_bytes(path, most=MOST) -> bytes:
    """The content of an ordinary file of at most `most` bytes. Raises UserError."""
    with open_regular(path, most) as file:
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"cannot read {show(path)}: {reason(error)}") from None


def read_json(path, most=2**26) -> dict:
    """A file that holds one JSON object. Raises UserError."""
    try:
        content = json.loads(read_bytes(path, most).decode())
    except UserError:
        raise
    except (ValueError, RecursionError):  # not UTF-8, not JSON, nested too deep, absurd integers
        raise UserError(f"{show(path)} is not JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{show(path)} is not a JSON object")
    return content


def load_tensors(path, groups) -> dict:
    """What torch.save wrote, a dict: damage is found, and no code in it runs. `groups(saved)` gives
    its {name: tensor}, one after the other; each tensor must be a plain one of float32. The
    numbers stay on the disk until they are read. Raises UserError."""
    with open_regular(path, most=2**36) as file:
        size = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(path) as packed:  # torch does not look at the checksums
            if packed.testzip() is not None:
                raise ValueError("it is damaged")
        saved = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        tensors = [t for group in groups(saved) for t in group.values()]
        for t in tensors:
            if (t.dtype, t.layout, t.device.type) != (torch.float32, torch.strided, "cpu"):
                raise ValueError("a tensor is no plain one of float32")
        if sum(t.numel() for t in tensors) > size:  # it would grow when it is copied
            raise ValueError("its tensors are larger than the file")
        return saved
    except Exception as error:  # both have a dozen ways to say that a file is none of theirs
        why = f"{type(error).__name__}: {reason(error):.150}"
        raise UserError(f"{show(path)} is damaged, or no checkpoint ({why}); train it "
                        "anew") from None


def show(path) -> str:
    """A path for a message: what is not UTF-8 in it is escaped."""
    path = os.fsdecode(path) if isinstance(path, (bytes, os.PathLike)) else str(path)
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------- writing

def write_atomically(path, write) -> None:
    """Call `write(temporary path)`, then rename: a reader finds the old file or the new one, never
    a half. Two writers have two temporary files. Raises UserError, with the old file untouched."""
    path = Path(path)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        write(Path(part))
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~umask())  # mkstemp makes it private
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise UserError(f"could not write {show(path)} ({reason(error)}); "
                        "what was there before is untouched") from None
    finally:
        with contextlib.suppress(OSError, TypeError):  # gone after the renaming, or never made
            os.unlink(part)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, value) -> None:
    """A JSON file; nan and infinity become null, which JSON can hold."""
    text = json.dumps(nan_to_none(value), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def nan_to_none(value):
    """The same without nan and infinity: None stands for what is no number."""
    if isinstance(value, dict):
        return {key: nan_to_none(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_none(v) for v in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def parts(folder, names) -> list[Path]:
    """What killed calls of `write_atomically` for these files have left in a folder."""
    ours = re.compile(rf"({'|'.join(map(re.escape, names))})\.[a-z0-9_]{{8}}\.part")
    return [path for path in Path(folder).iterdir() if ours.fullmatch(path.name)]


def check_folder(folder: Path, files, keys, overwrite: bool) -> None:
    """Raise UserError where no run can be started: one whose `files` are ours if config.json has
    these keys. Writes nothing."""
    try:
        left = {path.name for path in parts(folder, files)}  # by a kill
        names = {path.name for path in folder.iterdir()} - {".lock"} - left
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{show(folder)} cannot be a run's folder ({reason(error)}); "
                        "choose another --out") from None
    ours = False
    with contextlib.suppress(UserError):
        ours = read_json(folder / "config.json").keys() >= set(keys)
    if names and not ours:
        raise UserError(f"{show(folder)} holds files that are no run of train.py; "
                        "choose another --out")
    if names and not overwrite:
        raise UserError(f"{show(folder)} already holds a run; go on with --resume {show(folder)}, "
                        "start anew with --overwrite, or choose another --out")


@contextlib.contextmanager
def one_writer(folder):
    """Make a folder and hold it for writing, or raise UserError naming the process that does. The
    system lets go of the lock when that process ends, however it ends; the file `.lock` stays."""
    path = Path(folder) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write to {show(folder)} ({reason(error)}); "
                        "choose another --out") from None
    try:
        try:
            lock(handle)
        except (BlockingIOError, PermissionError):
            os.lseek(handle, 1, os.SEEK_SET)
            holder = os.read(handle, 20).decode("ascii", "replace").strip()
            raise UserError(f"{show(folder)} is being written by another training (process "
                            f"{holder or '?'}); wait for it, stop it, or choose another "
                            "--out") from None
        except OSError:  # a disk that knows no locks
            pass
        os.lseek(handle, 0, os.SEEK_SET)
        os.ftruncate(handle, 0)
        os.write(handle, f" {os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)


def lock(handle) -> None:
    """An exclusive lock on an open file, or OSError at once."""
    try:
        import fcntl
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows locks a range of bytes: the first, which holds nothing
        import msvcrt
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)


# ---------------------------------------------------------------- flags and settings

class Parser(argparse.ArgumentParser):
    """Tells a wrong flag as every other mistake is told, and completes no shortened one."""

    def __init__(self, prog: str, **how):
        super().__init__(prog=prog, allow_abbrev=False, **how)

    def error(self, message):
        raise UserError(f"{message:.300}; see python {self.prog} --help")

    def add_settings(self, settings, unless: str) -> None:
        """A flag for each field of a class of settings; `unless` says what stands for None."""
        for f in fields(settings):
            text, how = f.metadata["help"].replace("%", "%%"), dict(type=type_of(f))
            if f.default is None and "default" not in text:
                text += f" (default: {unless})"
            elif f.default is not None and f.default is not False:
                text += f" (default: {f.default})"
            how["choices"] = f.metadata["choices"]
            if type_of(f) is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            self.add_argument(flag(f.name), help=text, **how)


def within(flag: str, value, least, most) -> None:
    """Raise UserError for a number out of all proportion, and for nan."""
    if not least <= value <= most:
        raise UserError(f"{flag} must be from {least} to {most}, not {value!r:.60}")


def setting(default, text, least=None, most=None, choices=None):
    """A field of a dataclass of settings, and what its flag may be."""
    return field(default=default, metadata=dict(help=text, limits=(least, most), choices=choices))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def type_of(f) -> type:
    """The type of a field, without its `| None`."""
    return f.type if isinstance(f.type, type) else f.type.__args__[0]


def check_settings(settings) -> None:
    """Raise UserError, naming the flag, for a value that its field cannot have."""
    for f in fields(settings):
        value, name, kind = getattr(settings, f.name), flag(f.name), type_of(f)
        choices, limits = f.metadata["choices"], f.metadata["limits"]
        if value is None and f.default is None:  # it will be filled in
            continue
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"{name} must be of type {kind.__name__}, not {value!r:.60}")
        if choices and value not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r:.60}")
        if value == "":
            raise UserError(f"{name} is empty; give a name, or leave the flag out")
        if limits != (None, None):
            within(name, value, *limits)


# ---------------------------------------------------------------- the machine

def pick_device(name: str) -> tuple[torch.device, str]:
    """The device and the reason for it. Raises UserError when the wanted one is absent."""
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
                    f"{show(name)!r:.60}; leave the flag out")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether it gains speed from bf16: a GPU, or a CPU with AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch has none
    return device.type == "cpu" and known.get("avx512_bf16", False)


def memory_of(device: torch.device) -> float:
    """Bytes that there are, used or not; infinity where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return float("inf")


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


# ---------------------------------------------------------------- the terminal

def say(*words, end="\n", to=None) -> None:
    """Print, and go on quietly when nobody reads any more: a training outlives its terminal."""
    stream = to or sys.stdout
    try:
        with tqdm.external_write_mode(stream):  # a bar makes room
            print(*words, end=end, file=stream, flush=True)
    except (OSError, ValueError):  # the reader is gone, the disk is full, the stream is closed
        hush(stream)


def hush(stream) -> None:
    """Let what is printed to a stream, and what still waits in it, vanish."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    except (OSError, ValueError, AttributeError):  # it has no file of the system any more
        name = "stdout" if stream is sys.stdout else "stderr"
        setattr(sys, name, open(os.devnull, "w"))
    os.close(nowhere)


def watched(stream) -> bool:
    """Whether somebody sees a line change: a terminal, a notebook, or whoever sets SHOW_PROGRESS
    and reads it through a pipe, as the chapters do."""
    try:
        notebook = type(stream).__module__.startswith("ipykernel")
        return stream.isatty() or notebook or "SHOW_PROGRESS" in os.environ
    except (ValueError, AttributeError):
        return False


def bar(of=None, what="", **how) -> tqdm:
    """A bar on stderr for the iterable `of`, or to be moved by `update`. Where nobody watches there
    is none, and when it is closed it is gone."""
    wide, high = shutil.get_terminal_size((100, 24))  # the latter in a notebook
    size = dict(ncols=wide - 1, nrows=high)
    how = dict(leave=False, mininterval=0.2, file=sys.stderr) | size | how
    return tqdm(of, what, disable=not watched(sys.stderr), **how)


@contextlib.contextmanager
def interrupts():
    """An event that Ctrl-C sets, for a program that obeys it when its state is whole."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def program(name: str, main) -> int:
    """Run `main()` -> exit code. What a user can mend ends in one line on stderr and code 2,
    Ctrl-C in one line and 130."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started us
            setattr(sys, stream, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError, ValueError):  # a terminal may lack a letter
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    before = None
    try:
        before = take_interrupts()
        code = main()
        say(end="")  # flush, while an error can still be told
        return code
    except UserError as error:
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "stopped", 130
    except BrokenPipeError:
        hush(sys.stdout)
        return 0
    except MemoryError:
        message, code = "not enough memory; ask for less", 2
    except OSError as error:
        where = f"{show(error.filename)}: " if error.filename else ""
        message, code = f"{where}{reason(error)}", 2
    except RuntimeError as error:
        message, code = "not enough memory; ask for less", 2
        if "torch._" in type(error).__module__:  # the compiler has many
            message = (f"--compile failed ({type(error).__name__}): it needs a C++ compiler; "
                       "give --no-compile")
        elif "memory" not in str(error):  # torch's way to say MemoryError
            raise
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    say(f"{name}:", " ".join(message.split()), to=sys.stderr)
    return code


def take_interrupts():
    """Let Ctrl-C raise KeyboardInterrupt, whatever a program did with it while it was starting.
    Returns the handler for afterwards, or None where nothing was changed."""
    if threading.current_thread() is not threading.main_thread():
        return None
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None):  # whoever started us wants no Ctrl-C
        return None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return before
