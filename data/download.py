"""Two small public corpora by name, for readers who are online. Checked by SHA-256, not trusted."""
import hashlib
import http.client
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from .common import UserError, bar, read_bytes, reason, write_atomically

ADVICE = "mend that and try again, or use a corpus that needs no download, such as stdlib"


@dataclass(frozen=True)
class File:
    url: str  # pinned to a commit, so that it cannot change under us
    size: int  # bytes
    sha256: str
    separator: str | None = None  # what stands between two documents


FILES = {
    # Tiny Shakespeare, from Karpathy's char-rnn: 40,000 lines of plays in one file.
    "shakespeare": File(
        "https://raw.githubusercontent.com/karpathy/char-rnn"
        "/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt", 1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    # TinyStories (Eldan and Li 2023, arXiv 2305.07759; CDLA-Sharing-1.0): its validation file,
    # 22,000 very short stories. Small enough to wait for, large enough to train on.
    "tinystories": File(
        "https://huggingface.co/datasets/roneneldan/TinyStories/resolve"
        "/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStories-valid.txt", 19_447_282,
        "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4", "<|endoftext|>"),
}


def fetch(name: str, file: File, folder: Path, timeout: float = 30) -> Path:
    """The path of the checked file in `folder`, downloaded if it is not there yet.

    It gets its name only when size and SHA-256 are right, so a file with that name is whole;
    whatever fails leaves nothing, and the next call starts afresh. Raises UserError.
    """
    path = folder / f"{name}-{file.sha256[:8]}.txt"
    if path.exists() and hashlib.sha256(read_bytes(path)).hexdigest() == file.sha256:
        return path
    try:
        write_atomically(path, lambda part: receive(name, file, part, timeout))
    except http.client.HTTPException as error:
        raise UserError(f"cannot download {name} ({reason(error)}); {ADVICE}") from None
    return path


def receive(name: str, file: File, part: Path, timeout: float) -> None:
    """Download into `part`. Raises UserError with what happened and what to do."""
    digest, done = hashlib.sha256(), 0
    try:
        answer = urllib.request.urlopen(file.url, timeout=timeout)
    except OSError as error:  # no network, no such page
        why = getattr(error, "reason", None) or error
        raise UserError(f"cannot download {name} ({reason(why)}); {ADVICE}") from None
    progress = bar(what=f"data: {name}", total=file.size, unit="B", unit_scale=True)
    with answer, part.open("wb") as out, progress:
        while done <= file.size and (block := answer.read(1 << 16)):  # never fill the disk
            out.write(block)
            digest.update(block)
            done += len(block)
            progress.update(len(block))
    if done < file.size:
        raise UserError(f"the download of {name} was cut at {done} of {file.size} bytes; {ADVICE}")
    if digest.hexdigest() != file.sha256:
        raise UserError(f"the download of {name} is not the expected file (another SHA-256): "
                        f"{file.url} may have changed; nothing was kept")
