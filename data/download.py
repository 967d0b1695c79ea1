"""Two small public corpora by name, for readers who are online. Checked by SHA-256, never by trust."""
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class File:
    url: str
    size: int  # bytes
    sha256: str
    separator: str | None = None  # what stands between two documents


FILES = {}
