"""The border between the programs and everything that can go wrong outside them: the user's files,
the disk, the terminal, Ctrl-C. Every other module opens, reads and writes through these functions,
and raises UserError for what a user can mend; `program` turns that into one line and exit code 2.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

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
    text = json.dumps(finite(value), indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def fill(text: str, blocks: dict) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- end -->` replaced by a block."""
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        if start in text:
            head, rest = text.split(start, 1)
            text = f"{head}{start}{block}\n{end}{rest.split(end, 1)[1]}"
    return text


def finite(value):
    """The same without nan and infinity: None stands for what is no number."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def parts(folder, names) -> list[Path]:
    """What killed calls of `write_atomically` for these files have left in a folder."""
    ours = re.compile(rf"({'|'.join(map(re.escape, names))})\.[a-z0-9_]{{8}}\.part")
    return [path for path in Path(folder).iterdir() if ours.fullmatch(path.name)]


def remove_parts(folder, names) -> None:
    for path in parts(folder, names):
        path.unlink(missing_ok=True)


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


def crc_is_right(path) -> bool:
    """Whether every member of a zip, as torch.save writes them, has the checksum that it should."""
    import zipfile
    try:
        with zipfile.ZipFile(path) as packed:
            return packed.testzip() is None
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError,
            zlib.error):
        return False


# ---------------------------------------------------------------- the terminal

def say(*words, end="\n", to=None) -> None:
    """Print, and go on quietly when nobody reads any more: a training outlives its terminal."""
    stream = to or sys.stdout
    try:
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
    """Whether somebody sees a line change: a terminal or a notebook, and no file or pipe."""
    try:
        return stream.isatty() or type(stream).__module__.startswith("ipykernel")
    except (ValueError, AttributeError):
        return False


class Live:
    """One line that is written over and over where somebody watches, and nothing elsewhere."""

    def __init__(self, to=None):
        self.stream = to or sys.stdout
        self.watched = watched(self.stream)
        self.shown = 0  # letters of the line that stands there
        self.next = 0.0  # seconds: not more often than one can read

    def show(self, text: str) -> None:
        if not self.watched or time.monotonic() < self.next:
            return
        self.next = time.monotonic() + 0.2
        text = text[:shutil.get_terminal_size().columns - 1]
        say(f"\r{text:<{self.shown}}", end="", to=self.stream)
        self.shown = len(text)

    def clear(self) -> None:
        if self.shown:
            say("\r" + " " * self.shown + "\r", end="", to=self.stream)
        self.shown, self.next = 0, 0.0

    def say(self, text: str) -> None:
        """A line that stays, above the live one."""
        self.clear()
        say(text, to=self.stream)


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
        if "memory" not in str(error):  # torch's way to say MemoryError
            raise
        message, code = "not enough memory; ask for less", 2
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
