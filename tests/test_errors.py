"""Mistakes that people make, and damaged files: one line on stderr, exit code 2, and nothing is
written, changed or run."""

import math
import os
import pickle
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import data
import train
from tests.conftest import tiny_flags

# A command, and words of the line that it must end in
COMMANDS = """
--atn softmax                           | unrecognized
--attn linear                           | choose from
--size huge                             | choose from
--steps 0                               | --steps must be at least 1
--seq-len 2                             | --seq-len must be at least 3
--lr -1                                 | --lr must be at least 0
--bos 2                                 | --bos is a share
--num-attention-heads 3                 | hidden_size must be a multiple of num_attention_heads 3
--num-attention-heads 64                | head_dim must be even
--num-key-value-heads 3                 | num_key_value_heads must divide num_attention_heads 4
--device tpu                            | --device must be
--vocab-size 500                        | --vocab-size is for text
--repeat 0.5                            | --repeat is for text
--data text.txt --vocab-size 256        | at least 257
--data text.txt --seq-len 9999          | too short for windows of 9999
--data nowhere.txt                      | 'nowhere.txt': it does not exist
--data wikipedia                        | unknown data
--data blank.txt                        | blank.txt is empty
--data binary.txt                       | binary (zero byte at offset 6)
--data latin1.txt                       | not UTF-8 text (byte 0xe9 at offset 3)
--data utf16.txt                        | UTF-16 text
--data pictures                         | holds no text
--out text.txt                          | choose another --out
--out old                               | --resume old, start anew with --overwrite
--out notes --overwrite                 | holds files that are no run
--prompt hello                          | --prompt does not go with training
--resume                                | expected one argument
--resume nowhere                        | nowhere holds no run
--resume old --attn sigmoid             | --attn does not go with resume
--resume older                          | older is of an older train.py (no 'repeat')
--sample nowhere                        | nowhere holds no run
--sample no-model                       | go on with: python train.py --resume no-model
--sample old --steps 3                  | --steps does not go with sample
--sample old --prompt 7                 | '7' is not a symbol
"""
ROWS = [line.split(" | ") for line in COMMANDS.strip().splitlines()]

TEXTS = {
    "text.txt": b"".join(b"%d sheep and %d legs\n" % (i, i * i) for i in range(300)),
    "blank.txt": b" \n\n ", "binary.txt": b"GIF89a\0\1\2", "pictures/a.png": b"\x89PNG",
    "latin1.txt": "caf\u00e9\n".encode("latin-1") * 500, "utf16.txt": "words".encode("utf-16"),
    "notes/todo.md": b"keep me"}


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("hacked"),)


def with_weight(saved, weight):
    saved["model"]["norm.weight"] = weight
    return saved


def with_moment(saved, moment):
    saved["optimizer"]["state"][0]["exp_avg"] = moment
    return saved


# What becomes of the bytes of model.pt, and words of the line
BYTES = {
    "cut": (lambda b: b[:-1000], "not a zip file"),
    "bit": (lambda b: b[:9999] + bytes([b[9999] ^ 1]) + b[10000:], "is damaged"),
    "pickle": (lambda b: pickle.dumps(Hostile()), "not a zip file"),
}
# What becomes of the objects in it
OBJECTS = {
    "hostile": (lambda s: {"model": {"x": Hostile()}}, "Unpickling"),
    "integers": (lambda s: with_weight(s, torch.ones(32).int()), "not float32"),
    "shape": (lambda s: with_weight(s, torch.ones(31)), "does not fit"),
    "nan": (lambda s: with_weight(s, torch.full((32,), math.nan)), "not finite"),
    "keys": (lambda s: {"model": s["model"], "optimizer": s["optimizer"]}, "batches is missing"),
}
# The same, where only --resume can notice
TO_RESUME = {
    "late": (lambda s: s | {"step": 10**9}, "does not fit"),
    "no-moments": (lambda s: s | {"optimizer": {"state": {}}}, "does not fit"),
    "short-moment": (lambda s: with_moment(s, torch.zeros(3)), "does not fit"),
    "nan-moment": (lambda s: with_moment(s, torch.full((34, 32), math.nan)), "not finite"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_run):
    """The current folder of all commands: texts, foreign folders, a run in `old`, damaged ones."""
    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    tiny_run(folder / "old")
    os.chdir(folder)
    for name, content in TEXTS.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    for name in (*BYTES, *OBJECTS, *TO_RESUME, "no-model", "older", "config"):
        shutil.copytree("old", name)
    for name, (change, _) in BYTES.items():
        path = Path(name, "model.pt")
        path.write_bytes(change(path.read_bytes()))
    for name, (change, _) in {**OBJECTS, **TO_RESUME}.items():
        path = Path(name, "model.pt")
        torch.save(change(torch.load(path, weights_only=True)), path)
    Path("no-model/model.pt").unlink()
    older = Path("older/config.json")
    older.write_text(older.read_text().replace('"repeat"', '"gone"'))
    yield
    os.chdir(before)


def tree():
    """Every file with its size and its time of change; locks come and go."""
    stats = {path: path.lstat() for path in Path().rglob("*") if path.name != ".lock"}
    return {path: (s.st_size, path.is_dir() or s.st_mtime_ns) for path, s in stats.items()}


def refused(words, capsys) -> str:
    """Run the command; it must refuse in one line and leave the folder as it was."""
    before = tree()
    capsys.readouterr()
    assert train.main(words) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ")
    assert tree() == before
    return line


@pytest.mark.parametrize("command, message", ROWS)
def test_bad_command(place, capsys, command, message):
    words = shlex.split(command)
    if words[0] not in ("--resume", "--sample"):
        words = ["--out", "new", "--steps", "1", *words]
    assert message.strip() in refused(words, capsys)


@pytest.mark.parametrize("door", ["--resume", "--sample"])
@pytest.mark.parametrize("name", [*BYTES, *OBJECTS])
def test_damaged_model(place, capsys, name, door):
    _, message = {**BYTES, **OBJECTS}[name]
    assert message in refused([door, name], capsys)
    assert not Path("hacked").exists()


@pytest.mark.parametrize("name", TO_RESUME)
def test_damaged_optimiser(place, capsys, name):
    _, message = TO_RESUME[name]
    assert message in refused(["--resume", name], capsys)


@pytest.mark.parametrize("name, content, message", [
    ("config.json", "{", "is not JSON"), ("config.json", '{"run": {}}', "corpus is missing"),
    ("log.jsonl", "header\n{", "log.jsonl cannot be read")])
def test_damaged_text_file(place, capsys, name, content, message):
    before = Path("config", name).read_text()
    Path("config", name).write_text(content)
    assert message in refused(["--resume", "config"], capsys)
    Path("config", name).write_text(before)


@pytest.mark.parametrize("where, name, error, message", [
    (data, "load", MemoryError(), "not enough memory"),
    (data, "load", torch.OutOfMemoryError(), "not enough memory"),
    (data, "load", PermissionError(13, "Permission denied", "x"), "x: Permission denied"),
    (Path, "mkdir", PermissionError(13, "Permission denied"), "cannot write to new")])
def test_what_the_system_refuses(place, monkeypatch, capsys, where, name, error, message):
    def broken(*_, **kw):
        raise error
    monkeypatch.setattr(where, name, broken)
    assert message in refused(tiny_flags("new"), capsys)


CHANGES = {"training text": (b"sheep", b"goats"), "held-out text": (b"299 sheep", b"299 goats")}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("vocab_size", [257, 270])
def test_a_text_that_has_changed(tmp_path, monkeypatch, tiny_run, capsys, what, vocab_size):
    """Tokens would mean something else, and nobody would notice; only bytes mean the same in any
    text, so that such a model can still be opened."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    path, out = tmp_path / "text.txt", tmp_path / "out"
    path.write_bytes(TEXTS["text.txt"])
    tiny_run(out, data=str(path), vocab_size=vocab_size)
    path.write_bytes(TEXTS["text.txt"].replace(*CHANGES[what]))
    assert train.main(["--resume", str(out)]) == 2
    assert "has changed since" in capsys.readouterr().err
    assert train.main(["--sample", str(out), "--tokens=1"]) == (0 if vocab_size == 257 else 2)
    path.write_bytes(TEXTS["text.txt"])
    assert train.main(["--resume", str(out)]) == 0
