"""From text on disk to token streams: find the files, split them in two parts, encode them.

A corpus is a list of documents, pairs (name, text). By default its tokens are bytes. A larger
vocabulary is learned from the training part by the package tokenizers (byte-pair encoding on
bytes: GPT-2, Radford et al. 2019) and used through tiktoken.
"""
import codecs
import hashlib
import json
import math
import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from .common import UserError, read_json, write_json

Document = tuple[str, str]
BOS = "<|bos|>"

# What counts as text when a folder is given. A single file may have any name.
SUFFIXES = {".txt", ".md", ".rst", ".tex", ".org", ".html", ".py", ".c", ".h", ".cpp", ".rs", ".go",
            ".js", ".ts", ".java"}
# Tests are repetitive and hold files that are broken on purpose. The rest is not the library.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


# ---------------------------------------------------------------- documents

def walk(root: Path, suffixes: set[str], skip: set[str]) -> list[Path]:
    """All files below `root` with one of these suffixes, sorted. Hidden files and folders are left
    out, and folders named in `skip`."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in skip and s[0] != "."]
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in suffixes and name[0] != ".":
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def stdlib_files() -> tuple[Path, list[Path]]:
    """The folder of the running Python's standard library, and its source files without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return root, walk(root, {".py"}, NOT_LIBRARY)


def own_files(path: Path) -> tuple[Path, list[Path]]:
    """The reader's own file, or the text files of the reader's own folder: (root, files)."""
    if not path.is_dir():
        return path.parent, [path]
    files = walk(path, SUFFIXES, {"__pycache__"})
    if not files:
        raise UserError(f"{path} holds no text: no file ends in {' '.join(sorted(SUFFIXES))}")
    return path, files


def read(path: Path) -> str:
    """The text of a UTF-8 file, with plain line ends. UserError if it is not UTF-8 text."""
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is UTF-16 text; save it as UTF-8")
    if (at := raw.find(b"\0")) >= 0:
        raise UserError(f"{path} is binary (zero byte at offset {at}); give UTF-8 text")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset "
                        f"{error.start}); convert it to UTF-8") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def documents(root: Path, files: list[Path], skip_undecodable: bool = False) -> list[Document]:
    """Read the files, each one a document named by its path below `root`. Empty ones are left out.

    `skip_undecodable` is for the standard library, where a file may declare another encoding on
    purpose; in the reader's own text such a file is a mistake, and raises UserError.
    """
    found = []
    for path in files:
        try:
            text = read(path)
        except UserError:
            if skip_undecodable:
                continue
            raise
        if text.strip():
            found.append((path.relative_to(root).as_posix(), text))
    if not found:
        where = files[0] if len(files) == 1 else root
        raise UserError(f"{where} is empty; give a text with words in it")
    return found


def split(docs: list[Document]) -> tuple[list[Document], list[Document]]:
    """Divide documents into (training, validation), the same way every time.

    Whole documents are held out, in the order of a hash of their names, until they make up 5 % of
    the characters; one that would bring them above 20 % is passed over. If none fits (one file, or
    a few large ones) the last tenth of every document is held out, cut at a line end.
    """
    def order(doc):
        return hashlib.sha256(os.fsencode(doc[0])).digest()

    total = sum(len(text) for _, text in docs)
    held, size = set(), 0
    for name, text in sorted(docs, key=order):
        if size < 0.05 * total and size + len(text) <= 0.2 * total:
            held.add(name)
            size += len(text)
    train, val = [], []
    for name, text in docs:
        if held:
            part = val if name in held else train
            part.append((name, text))
            continue
        cut = len(text) * 9 // 10
        cut = text.rfind("\n", len(text) * 8 // 10, cut) + 1 or cut  # no line ends near: cut here
        if cut > 0:
            train.append((name, text[:cut]))
        val.append((name, text[cut:]))
    return train, val


# ---------------------------------------------------------------- tokens

# A word is: letters, up to three digits, or punctuation, each with the blank before it; or white
# space, whose last blank is left to the word that follows. A line end and the indentation after it
# are one word, which suits code. A run of blanks is cut at 128: tiktoken dies of a few million.
PATTERN = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s{1,128}(?!\S)|\s+"


def byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: a printable byte is itself, the others are 256, 257, ..."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + n): byte for n, byte in enumerate(others)}
    return letters


def to_bytes(vocab: dict[str, int]) -> dict[bytes, int]:
    """A vocabulary in GPT-2's letters, as the bytes and ids that tiktoken wants."""
    letters = byte_letters()
    return {bytes(letters[letter] for letter in token): i for token, i in vocab.items()}


def learn(texts: list[str], size: int) -> dict[str, int]:
    """The vocabulary {token: id} of a byte-level BPE: 256 bytes, then the merges in the order in
    which they were learned. It is smaller than `size` if no pair of tokens is left that occurs
    twice."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False,
                                  initial_alphabet=list(byte_letters()))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.get_vocab()


MOST = 2**26  # characters, about, from which a vocabulary is learned: a minute on a laptop


def encoding(docs: list[Document], vocab_size: int, cache: Path) -> tiktoken.Encoding:
    """The tokenizer of a corpus: bytes, or a BPE learned from these documents. The last id is
    <|bos|>.

    A learned vocabulary is kept in `cache` under a hash of the documents. Raises UserError for a
    vocab_size below 257, which has no room for the bytes and <|bos|>.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size is {vocab_size}, but 256 bytes and {BOS} need at least 257")
    if vocab_size == 257:
        name = "bytes"
        ranks = {bytes([byte]): byte for byte in range(256)}
    else:
        whole = json.dumps([vocab_size, docs]).encode()
        name = f"vocab-{hashlib.sha256(whole).hexdigest()[:16]}"
        file = cache / f"{name}.json"
        if not file.exists():
            print(f"data: learning {vocab_size:,} tokens, once ...", file=sys.stderr)
            size = sum(len(text) for _, text in docs)
            texts = [text for _, text in docs[::math.ceil(size / MOST)]]
            write_json(file, learn(texts, vocab_size - 1))
        ranks = to_bytes(read_json(file))
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={BOS: len(ranks)})


def stream(docs: list[Document], encoding: tiktoken.Encoding) -> np.ndarray:
    """(N,) int16 (int32 beyond 32,768 tokens): the tokens of all documents one after another, each
    preceded by the id of <|bos|>. Where a text says `<|bos|>`, that is ordinary text."""
    dtype = np.int16 if encoding.n_vocab <= 2**15 else np.int32
    bos = np.array([encoding.n_vocab - 1], dtype)
    texts = [text for _, text in docs]

    def ids(text):
        return np.array(encoding.encode_ordinary(text), dtype)

    if encoding.name == "bytes":
        found = [np.frombuffer(text.encode(), np.uint8) for text in texts]
    else:
        with ThreadPoolExecutor() as pool:  # tiktoken's threads do not wait for each other
            found = list(pool.map(ids, texts))
    parts = [part for tokens in found for part in (bos, tokens)]
    return np.concatenate(parts, dtype=dtype)
