"""From text on disk to token streams: find the files, split them, tokenise, remember the result.

A corpus is a list of documents, pairs (name, text). Its files are listed with their size and time
of change, and that list is the key of the cache: a text is read only when it has changed.
"""
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiktoken

from . import bpe
from .common import UserError, bar, read_bytes, reason, say, show, write_atomically

Document = tuple[str, str]
MOST = 2**27  # bytes of text; with all its copies, and tokens of one byte, this takes 2 GB

# What counts as text when a folder is given. A single file may have any name.
SUFFIXES = {".txt", ".md", ".rst", ".tex", ".org", ".html", ".py", ".c", ".h", ".cpp", ".rs", ".go",
            ".js", ".ts", ".java"}
# Tests are repetitive and hold files that are broken on purpose. The rest is not the library.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def walk(root: Path, suffixes: set[str], skip: set[str] = frozenset()) -> list[Path]:
    """All files below `root` with one of these suffixes, sorted, without hidden ones and `skip`."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in skip and not s.startswith(".")]
        found += [Path(folder, name) for name in names
                  if Path(name).suffix.lower() in suffixes and not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def stdlib_files() -> tuple[Path, list[Path]]:
    """The folder of the running Python's standard library, and its source files without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = walk(root, {".py"}, NOT_LIBRARY)
    if not files:
        raise UserError(f"no source files of the standard library in {root}; "
                        "give a file or a folder of text instead")
    return root, files


def own_files(path: Path) -> tuple[Path, list[Path]]:
    """The reader's own file, or the text files of the reader's own folder: (root, files)."""
    try:
        path.stat()
    except (OSError, ValueError):
        raise UserError(f"{show(path)} does not exist or cannot be opened; "
                        "give a file or a folder of text") from None
    if not path.is_dir():
        return path.parent, [path]
    files = walk(path, SUFFIXES, {"__pycache__"})
    if not files:
        raise UserError(f"{show(path)} holds no text: no file ends in {' '.join(sorted(SUFFIXES))}")
    return path, files


def read(path: Path) -> str:
    """The text of a UTF-8 file, with plain line ends. UserError if it is unreadable or not text."""
    raw = read_bytes(path)
    if (at := raw.find(b"\0")) >= 0:
        raise UserError(f"{show(path)} is binary (zero byte at offset {at}); give UTF-8 text")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{show(path)} is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset "
                        f"{error.start}); convert it to UTF-8") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def documents(root: Path, files: list[Path], separator: str | None = None,
              skip_undecodable: bool = False) -> list[Document]:
    """Read the files, each one a document, or several where `separator` cuts it. Empty ones go.

    `skip_undecodable` is for the standard library, where a file may declare another encoding on
    purpose; in the reader's own text such a file is a mistake that must be told.
    """
    found = []
    for path in files:
        try:
            text = read(path)
        except UserError:
            if skip_undecodable:
                continue
            raise
        name = path.relative_to(root).as_posix()
        parts = text.split(separator) if separator else [text]
        for i, part in enumerate(parts):
            if not part.strip():
                continue
            found.append((f"{name}#{i}", part.strip("\n") + "\n") if separator else (name, part))
    if not found:
        which = show(files[0] if len(files) == 1 else root)
        raise UserError(f"{which} is empty; give a text with words in it")
    return found


def split(docs: list[Document]) -> tuple[list[Document], list[Document]]:
    """Divide documents into (training, validation), the same way every time.

    Whole documents are held out, in the order of a hash of their names, until they make up 5 % of
    the characters; one that would bring them above 20 % is passed over. If none fits (one file, or
    a few large ones) the last tenth of every document is held out, cut at a line end.
    """
    total = sum(len(text) for _, text in docs)
    held, size = set(), 0
    for name, text in sorted(docs, key=lambda doc: hashlib.sha256(os.fsencode(doc[0])).digest()):
        if size < 0.05 * total and size + len(text) <= 0.2 * total:
            held.add(name)
            size += len(text)
    if held:
        return [d for d in docs if d[0] not in held], [d for d in docs if d[0] in held]
    train, val = [], []
    for name, text in docs:
        cut = len(text) * 9 // 10
        cut = text.rfind("\n", 0, cut) + 1 or cut  # a text without line ends is cut where it is
        train.append((name, text[:cut]))
        val.append((name, text[cut:]))
    return [d for d in train if d[1]], [d for d in val if d[1]]


def fingerprint(root: Path, files: list[Path], **params) -> str:
    """A key that changes when a file is added, removed, resized or rewritten, or `params` do."""
    try:
        found = [(path.relative_to(root).as_posix(), path.stat()) for path in files]
    except OSError as error:
        raise UserError(f"cannot read {show(error.filename)}: {reason(error)}") from None
    size = sum(stat.st_size for _, stat in found)
    if size > MOST:
        raise UserError(f"{show(files[0] if len(files) == 1 else root)} is {size / 1e6:,.0f} MB of "
                        f"text, more than the {MOST / 1e6:.0f} MB that fit in 2 GB of memory; give "
                        "a part of it: head -c 100000000 BIG.txt > part.txt")
    stats = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    # The rules of this package are part of the key: an edit here is never met by an old file.
    rules = [bpe.PATTERN, sys.version, Path(__file__).read_text(), Path(bpe.__file__).read_text()]
    whole = json.dumps([str(root.resolve()), stats, params, rules])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def tokenise(name: str, key: str, read_documents: Callable[[], list[Document]], vocab_size: int,
             cache: Path):
    """Token streams of a corpus: (encoding, train, val, bytes_per_token), from the cache if it can.

    train, val: (N,) int16 (int32 beyond 32,767 tokens), every document preceded by the id of the
    encoding's last token. Our own BPE is trained on the training part. The cache is two files: the
    tokens as .npz, and the BPE as .tiktoken text, which the other file knows by its hash.
    """
    tokens_file, ranks_file = cache / f"{name}-{key}.npz", cache / f"{name}-{key}.tiktoken"
    try:
        with np.load(tokens_file) as saved:  # a zip: every array is checked by its CRC
            train, val = saved["train"], saved["val"]
            bytes_per_token, ranks_hash = float(saved["bytes_per_token"]), str(saved["ranks_hash"])
        text = ranks_file.read_text()
        if hashlib.sha256(text.encode()).hexdigest() != ranks_hash:
            raise ValueError("not the BPE of these tokens")
        return bpe.encoding(bpe.from_text(text), name), train, val, bytes_per_token
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # a damaged file can fail in any way; the remedy is the same
        say(f"data: {show(tokens_file.name)} is damaged ({type(error).__name__}), "
            "building it again", to=sys.stderr)

    say(f"data: building the tokens of {show(name)}, once ...", to=sys.stderr)
    train_docs, val_docs = split(read_documents())
    tokens = bpe.train((text for _, text in train_docs), vocab_size)
    ranks, encoding = bpe.to_text(tokens), bpe.encoding(tokens, name)
    train, val = stream(train_docs, encoding), stream(val_docs, encoding)
    size = sum(len(text.encode()) for _, text in val_docs)
    bytes_per_token = size / max(1, len(val) - len(val_docs))

    def pack(part):
        with part.open("wb") as file:
            np.savez(file, train=train, val=val, bytes_per_token=bytes_per_token,
                     ranks_hash=hashlib.sha256(ranks.encode()).hexdigest())
    try:
        write_atomically(ranks_file, lambda part: part.write_text(ranks))
        write_atomically(tokens_file, pack)
    except UserError as error:  # a full or read-only disk costs the next start some seconds
        say(f"data: {error}", to=sys.stderr)
    return encoding, train, val, bytes_per_token


def stream(docs: list[Document], encoding: tiktoken.Encoding) -> np.ndarray:
    """(N,) the tokens of all documents one after another, each preceded by the last id, the
    `<|bos|>`. Where a text says `<|bos|>`, that is ordinary text."""
    bos, total, parts = encoding.n_vocab - 1, sum(len(text) for _, text in docs), []
    dtype = np.int16 if encoding.n_vocab <= 2**15 else np.int32
    with bar(what="data: to tokens", total=total, unit=" letters", unit_scale=True) as progress:
        for _, text in docs:
            parts.append(np.array([bos], dtype))
            for piece in bpe.pieces(text):  # a list of all tokens would take 20 times the text
                parts.append(np.array(encoding.encode_ordinary(piece), dtype))
                progress.update(len(piece))
    return np.concatenate([np.zeros(0, dtype), *parts])
