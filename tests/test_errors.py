"""Mistakes that people make, and damaged files: one line on stderr, exit code 2, and nothing is
written, changed or run."""

import math
import os
import pickle
import shlex
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import probe
import train
from data.common import UserError, program
from tests.conftest import tiny_flags
from tests.tiny import tiny_llama_folder

# A command, and words of the line that it must end in
COMMANDS = """
--atn softmax                           | unrecognized
--steps 0                               | --steps must be at least 1
--evals -1                              | --evals must be at least 0
--num-attention-heads 3                 | hidden_size must be a multiple of num_attention_heads 3
--device tpu                            | --device must be
--vocab-size 500                        | --vocab-size changes nothing with --data rest
--data text.txt --vocab-size 256        | at least 257
--data text.txt --seq-len 9999          | too short for windows of 9999
--data nowhere.txt                      | 'nowhere.txt': it does not exist
--data blank.txt                        | blank.txt is empty
--data binary.txt                       | binary (zero byte at offset 6)
--data latin1.txt                       | not UTF-8 text (byte 0xe9 at offset 3)
--data utf16.txt                        | UTF-16 text
--data pictures                         | holds no text
--out text.txt                          | choose another --out
--out old                               | --resume old, start anew with --overwrite
--out notes --overwrite                 | holds files that are no run
--resume nowhere                        | nowhere holds no run
--resume old --attn sigmoid             | --attn does not go with --resume
--resume old --overwrite                | --overwrite does not go with --resume
--resume older                          | older is of an older train.py (no 'repeat')
probe.py no-model                       | go on with: python train.py --resume no-model
probe.py llama                          | python probe.py --llama llama
probe.py old --text 7                   | '7' is not a symbol
--resume cut                            | not a zip file
--resume pickle                         | not a zip file
--resume bit                            | is damaged
--resume hostile                        | Unpickling
probe.py hostile                        | Unpickling
--resume integers                       | not float32
--resume shape                          | does not fit
probe.py nan                            | not finite
--resume no-moments                     | does not fit
--resume short-moment                   | does not fit
--resume nan-moment                     | not finite
--resume no-json                        | is not JSON
--resume bad-log                        | log.jsonl cannot be read
--resume bad-film                       | film.npz cannot be read
probe.py smollm2 out/run --file x       | give smollm2
probe.py smollm2 --windows 1            | --windows must be at least 2
probe.py smollm2 --threads -1           | --threads at least 1
probe.py nowhere                        | nowhere
probe.py old no-bos                     | probe them one by one
probe.py no-bos --text a                | give two words or more
probe.py old --text abc --layer 7       | layers 0 to 1 and heads 0 to 1
probe.py old --text abc --silence 1:99  | layers 0 to 1, and neurons 0 to 63
probe.py old --text abc --silence 1-99  | give a layer and its neurons
probe.py old --text abc --cut           | without --cut
probe.py old --text abc --windows 8     | --windows does not go with --text
probe.py old --page --batches 2         | --batches does not go with --text
probe.py old --layer 1                  | --layer goes with --text
probe.py old --from nowhere.txt         | nowhere.txt
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


# Runs whose model.pt has other bytes: cut short, one bit turned, another kind of file
BYTES = {
    "cut": lambda b: b[:-1000],
    "bit": lambda b: b[:9999] + bytes([b[9999] ^ 1]) + b[10000:],
    "pickle": lambda b: pickle.dumps(Hostile()),
}
# Runs whose model.pt holds something else in this place
OBJECTS = {
    "hostile": ("model", "norm.weight", Hostile()),
    "integers": ("model", "norm.weight", torch.ones(32).int()),
    "shape": ("model", "norm.weight", torch.ones(31)),
    "nan": ("model", "norm.weight", torch.full((32,), math.nan)),
    "no-moments": ("optimizer", "state", {}),
    "short-moment": ("optimizer", "state", 0, "exp_avg", torch.zeros(3)),
    "nan-moment": ("optimizer", "state", 0, "exp_avg", torch.full((34, 32), math.nan)),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_run):
    """The current folder of all commands: texts, foreign folders, a run in `old`, damaged ones."""
    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    tiny_run(folder / "old", steps=1)
    tiny_run(folder / "no-bos", steps=1, bos=0.0)
    os.chdir(folder)
    for name, content in TEXTS.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    for name in (*BYTES, *OBJECTS, "no-model", "older", "no-json", "bad-log", "bad-film"):
        shutil.copytree("old", name)
    for name, change in BYTES.items():
        path = Path(name, "model.pt")
        path.write_bytes(change(path.read_bytes()))
    for name, (*groups, last, value) in OBJECTS.items():
        saved = torch.load("old/model.pt", weights_only=True)
        group = saved
        for key in groups:
            group = group[key]
        group[last] = value
        torch.save(saved, f"{name}/model.pt")
    Path("no-model/model.pt").unlink()
    older = Path("older/config.json")
    older.write_text(older.read_text().replace('"repeat"', '"gone"'))
    Path("no-json/config.json").write_text("{")
    tiny_llama_folder(Path("llama"))
    Path("bad-log/log.jsonl").write_text("header\n{")
    np.savez("bad-film/film.npz", step=np.array([Hostile()]))  # a pickle
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
    if words[0] == "probe.py":
        assert program("probe.py", lambda: probe.main(words[1:])) == 2
    else:
        assert train.main(words) == 2
    line, = capsys.readouterr().err.splitlines()
    assert tree() == before
    return line


@pytest.mark.parametrize("command, message", ROWS)
def test_a_mistake_or_damage_ends_in_one_line(place, capsys, command, message):
    words = shlex.split(command)
    if words[0] not in ("--resume", "probe.py"):
        words = ["--out", "new", "--steps", "1", *words]
    assert message.strip() in refused(words, capsys)


@pytest.mark.parametrize("where, name, error, message", [
    (data, "load", torch.OutOfMemoryError(), "not enough memory"),
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
    tiny_run(out, data=str(path), vocab_size=vocab_size, steps=1)
    path.write_bytes(TEXTS["text.txt"].replace(*CHANGES[what]))
    assert train.main(["--resume", str(out)]) == 2
    assert "has changed since" in capsys.readouterr().err
    with nullcontext() if vocab_size == 257 else pytest.raises(UserError, match="has changed"):
        train.load_run(out)
    path.write_bytes(TEXTS["text.txt"])
    assert train.main(["--resume", str(out)]) == 0
