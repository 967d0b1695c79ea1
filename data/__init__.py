"""Where the batches come from: real text or a synthetic task, behind one small class.

    corpus = load("stdlib")                          # or a task, or your own file or folder
    x, y = corpus.batch(8, 128, torch.Generator().manual_seed(1))
"""
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from . import tasks, text
from .common import CACHE, UserError

TASKS = tasks.TASKS
NAMES = ["stdlib", *TASKS]


@dataclass
class Corpus:
    """Text as two token streams, or a synthetic task. Token ids are 0 .. vocab_size - 1.

    A corpus of text has `encoding`, `train` and `val`; a task has `task`.
    """
    name: str
    vocab_size: int  # <|bos|> included
    bos: int  # the id of <|bos|>, the beginning of a document; always the last id
    encoding: tiktoken.Encoding | None = None
    train: torch.Tensor | None = None  # (N,) int16 or int32; a bos stands before every document
    val: torch.Tensor | None = None  # (M,) the same, of the held-out documents
    task: tasks.Copy | tasks.Rest | None = None

    def batch(self, batch_size: int, seq_len: int, generator: torch.Generator,
              split: str = "train", bos: float = 0.5, repeat: float = 0.0):
        """Draw windows: x, y, each (B, T) int64, y the token that follows x at each position.

        A share `bos` of the windows, drawn one by one, starts with <|bos|> and goes on with the
        text: x = bos, s_0 .. s_{T-2} and y = s_0 .. s_{T-1}. The others begin with an ordinary
        token: x = s_0 .. s_{T-1} and y = s_1 .. s_T. A share `repeat` of the windows of text shows
        its first 8 .. T/2 tokens over and over. Everything is drawn from `generator`, so the same
        state gives the same batch. A task ignores `split` and `repeat`, because it never repeats a
        window; Rest ignores `bos` too, and its y are targets of its own (-100: none).
        """
        if isinstance(self.task, tasks.Rest):  # whose targets are no next tokens
            return self.task.batch(batch_size, seq_len, generator)
        if self.task:
            tokens = self.task.windows(batch_size, seq_len + 1, generator)
        else:
            stream = {"train": self.train, "val": self.val}[split]
            tokens = draw_windows(stream, self.bos, batch_size, seq_len + 1, generator)
            if repeat:
                tokens = repeat_passages(tokens, repeat, generator)
        lead = torch.rand(batch_size, 1, generator=generator) < bos
        first = torch.full((batch_size, 1), self.bos)
        tokens = torch.cat([first, tokens], 1)  # (B, T + 2)
        tokens = torch.where(lead, tokens[:, :-1], tokens[:, 1:])  # (B, T + 1)
        return tokens[:, :-1], tokens[:, 1:]

    def rest(self, n: int, seq_len: int, generator: torch.Generator):
        """x, y of the copying task, each (n, T) int64, where nothing can be copied and every query
        rests. Only for tasks.Copy."""
        tokens = self.task.rest(n, seq_len + 1, generator)
        return tokens[:, :-1], tokens[:, 1:]

    def fingerprint(self) -> dict:
        """Sizes and checksums: tells whether a text is still the one that a run was trained on."""
        if self.task:
            return {"vocab_size": self.vocab_size}
        return {
            "vocab_size": self.vocab_size,
            "train_tokens": len(self.train),
            "val_tokens": len(self.val),
            "crc32": zlib.crc32(self.train.numpy()),
            "val_crc32": zlib.crc32(self.val.numpy()),
        }

    def optimal_loss(self, seq_len: int, bos: float = 0.5) -> float | None:
        """The loss in nats of a perfect predictor on such batches of the copying task, computed;
        None for other data, and for windows so long that this would take minutes."""
        if not isinstance(self.task, tasks.Copy) or seq_len > 128:
            return None
        loss = self.task.position_loss(seq_len + 1)  # (T + 1,)
        with_bos, without = loss[:-1].mean(), loss[1:].mean()
        return float(bos * with_bos + (1 - bos) * without)

    def encode(self, text: str) -> list[int]:
        """Token ids of any text, without <|bos|>. UserError for a symbol that a task lacks."""
        if self.task:
            return self.task.encode(text)
        return self.encoding.encode_ordinary(text)

    def decode(self, ids) -> str:
        """The text of token ids (a list or a 1-d tensor); <|bos|> appears by its name."""
        ids = torch.as_tensor(ids).tolist()
        if self.task:
            return self.task.decode(ids)
        return self.encoding.decode(ids)


def draw_windows(stream, bos: int, n: int, length: int, generator) -> torch.Tensor:
    """(n, length) int64 stretches of a stream (N,), none of which starts at a bos."""
    starts = torch.randint(len(stream) - length, (n,), generator=generator)
    starts += stream[starts] == bos  # documents are not empty, so the next token is ordinary
    # Indexing this view copies n contiguous rows: faster than an (n, length) table of indices.
    return stream.unfold(0, length, 1)[starts].long()


def repeat_passages(windows, share: float, generator) -> torch.Tensor:
    """Let a share of the windows (n, length) show their first 8 .. length / 2 tokens again and
    again."""
    n, length = windows.shape
    longest = max(9, length // 2 + 1)
    passage = torch.randint(8, longest, (n, 1), generator=generator)
    whole = torch.rand(n, 1, generator=generator) >= share
    passage[whole] = length
    return windows.gather(1, torch.arange(length) % passage)


def load(name: str | Path = "stdlib", *, seq_len: int = 128, vocab_size: int = 257) -> Corpus:
    """Open a corpus by name, or the reader's own file or folder of text.

    name        `stdlib` (the source text of the running Python's standard library), a task
                (`rest`, `copy`), or a path: one file, whose last tenth is for validation, or a
                folder, whose text files (`text.SUFFIXES`) are documents and are held out whole
                (`text.split`)
    seq_len     the length T of the windows to come: a text too short for one is told now
    vocab_size  of text, <|bos|> included: 257 is bytes, more are learned by byte-pair encoding;
                a short text may support fewer

    Raises UserError for what is wrong with these.
    """
    name = str(name)
    if name in TASKS:
        task = TASKS[name]()
        bos = len(task.symbols)
        return Corpus(name, bos + 1, bos, task=task)
    if name == "stdlib":
        docs = text.documents(*text.stdlib_files(), skip_undecodable=True)
    elif os.path.exists(name):
        docs = text.documents(*text.own_files(Path(name)))
    else:
        raise UserError(f"unknown data {name!r}: it does not exist; give one of "
                        f"{', '.join(NAMES)}, or a file or folder of text")
    train_docs, val_docs = text.split(docs)
    encoding = text.encoding(train_docs, vocab_size, CACHE)
    train = torch.from_numpy(text.stream(train_docs, encoding))
    val = torch.from_numpy(text.stream(val_docs, encoding))
    for part, stream in (("training", train), ("validation", val)):
        if len(stream) < seq_len + 2:
            raise UserError(f"{name} is too short for windows of {seq_len} tokens: its {part} part "
                            f"has {len(stream)}, and needs {seq_len + 2}; give more text or a "
                            "smaller seq_len")
    bos = encoding.n_vocab - 1
    return Corpus(name, bos + 1, bos, encoding, train, val)
