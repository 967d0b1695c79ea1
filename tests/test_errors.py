"""Mistakes of the user and damaged files: one line on stderr, exit code 2, and nothing is written,
changed or run."""

import math
import os
import pickle
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

import data
import train
from tests.conftest import tiny_flags

# A command, and words of the line that it must end in
COMMANDS = """
--atn softmax                                | unrecognized
--attn linear                                | choose from
--steps 0                                    | --steps must be from 1
--steps {digits}                             | --steps must be from 1
--lr nan                                     | --lr must be from
--num-attention-heads 3                      | twice --num-attention-heads 3
--num-key-value-heads 3                      | --num-key-value-heads 3 must divide
--batch-size 65536 --seq-len 4096            | GB of memory
--device tpu                                 | --device must be
--vocab-size 500                             | --vocab-size is for text
--repeat 0.5                                 | --repeat is for text
--data text.txt --vocab-size 256             | at least 257
--data text.txt --seq-len 9999               | too short for windows of 9999
--data not{bad}utf8.txt                      | not\\xffutf8.txt does not exist
--data {x300}.txt                            | cannot be opened
--data wikipedia                             | unknown data
--data blank.txt                             | blank.txt is empty
--data binary.txt                            | binary (zero byte at offset 6)
--data latin1.txt                            | not UTF-8 text (byte 0xe9 at offset 3)
--data pictures                              | holds no text
--data pipe.txt                              | no ordinary file
--data big.txt                               | 300 MB of text, more than the 134 MB
--out ""                                     | --out is empty
--out text.txt                               | choose another --out
--out old                                    | --resume old, start anew with --overwrite
--out notes --overwrite                      | holds files that are no run
--tokens 3                                   | goes with --sample
--resume old --attn sigmoid                  | leave --attn out (it goes with --device, --threads
--resume nowhere                             | nowhere holds no run
--sample no-model                            | has no model.pt
--sample piped                               | no ordinary file
--sample old --prompt 7                      | '7' is not a symbol
--sample old --temperature nan               | --temperature must be
"""
FILL = dict(digits="1" * 400, x300="x" * 300, bad="\udcff")
ROWS = [line.split(" | ") for line in COMMANDS.format(**FILL).strip().splitlines()]

TEXTS = {
    "text.txt": b"".join(b"%d sheep and %d legs\n" % (i, i * i) for i in range(300)),
    "blank.txt": b" \n\n ", "binary.txt": b"GIF89a\0\1\2",
    "latin1.txt": "caf\u00e9\n".encode("latin-1") * 500, "pictures/a.png": b"\x89PNG",
    "notes/todo.md": b"keep me"}


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("hacked"),)


def other_weight(s, w):
    return s | {"model": s["model"] | {"norm.weight": w}}


def other_moments(s, **changes):
    """AdamW would write beyond the end of a short one."""
    s["optimizer"]["state"][0].update(changes)
    return s


# A damaged file of a run; what becomes of its bytes, or of what was saved; words of the line
DAMAGED = {
    "cut": ("model.pt", lambda b: b[:-1000], "not a zip file"),
    "pickle": ("model.pt", lambda b: pickle.dumps(Hostile()), "not a zip file"),
    "hostile": ("saved", lambda s: {"model": {"x": Hostile()}}, "Unpickling"),
    "integers": ("saved", lambda s: other_weight(s, torch.ones(32).int()), "no plain one"),
    "huge": ("saved", lambda s: other_weight(s, torch.ones(1).expand(2**40)), "larger than the"),
    "shape": ("saved", lambda s: other_weight(s, torch.ones(31)), "of shape (31,)"),
    "nan": ("saved", lambda s: other_weight(s, torch.full((32,), math.nan)), "not finite"),
    "step": ("saved", lambda s: s | {"step": -1}, "step is no number"),
    "smooth": ("saved", lambda s: s | {"smooth": math.nan}, "loss or seconds is no number"),
    "generator": ("saved", lambda s: s | {"batches": torch.zeros(3)}, "generator"),
    "config-torn": ("config.json", lambda b: b"{", "is not JSON"),
    "config-deep": ("config.json", lambda b: b"[" * 10**5, "is not JSON"),
    "config-bare": ("config.json", lambda b: b'{"run": {}}', "is not that of a run"),
    "config-word": ("config.json", lambda b: b.replace(b": 12", b': "many"'), "type int"),
    "bit": ("model.pt", lambda b: b[:9999] + bytes([b[9999] ^ 1]) + b[10000:], "damaged"),
}
TO_RESUME = {  # what only --resume reads
    "late": ("saved", lambda s: s | {"step": 10**9}, "not of this run"),
    "no-moments": ("saved", lambda s: s | {"optimizer": {"state": {}}}, "not of this run"),
    "short": ("saved", lambda s: other_moments(s, exp_avg=torch.zeros(3)), "shape"),
    "count": ("saved", lambda s: other_moments(s, step=torch.tensor(math.nan)), "not finite"),
    "log-torn": ("log.jsonl", lambda b: b[:-9], "log.jsonl cannot be read"),
    "log-empty": ("log.jsonl", lambda b: b"header\n{}\n", "log.jsonl cannot be read"),
}


def damage(folder, file, change):
    path = Path(folder, "model.pt" if file == "saved" else file)
    if file == "saved":
        torch.save(change(torch.load(path, weights_only=True)), path)
    else:
        path.write_bytes(change(path.read_bytes()))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_run):
    """The current folder of all commands: texts, foreign folders, a run in `old`, damaged ones."""
    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    tiny_run(folder / "old")
    os.chdir(folder)
    for name, content in TEXTS.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    Path("big.txt").touch()
    os.truncate("big.txt", 300_000_000)
    for name in (*DAMAGED, *TO_RESUME, "no-model", "piped"):
        shutil.copytree("old", name)
    for name, (file, change, _) in {**DAMAGED, **TO_RESUME}.items():
        damage(name, file, change)
    for name in ("no-model", "piped"):
        Path(name, "model.pt").unlink()
    os.mkfifo("piped/model.pt"), os.mkfifo("pipe.txt")
    with pytest.MonkeyPatch.context() as m:
        m.setitem(data.load.__kwdefaults__, "cache", Path(os.devnull) / "cache")
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
    code, said = train.main(words), capsys.readouterr().err.splitlines()
    line, = (line for line in said if not line.startswith("data: "))  # news, and not the error
    assert code == 2 and line.startswith("train.py: ") and len(line) < 800
    assert tree() == before
    return line


# ---------------------------------------------------------------- one line, and nothing is lost

@pytest.mark.parametrize("command, message", ROWS)
def test_bad_command(place, capsys, command, message):
    words = shlex.split(command)
    if words[0] not in ("--resume", "--sample"):
        words = ["--out", "new", "--steps", "1", *words]
    assert message.strip() in refused(words, capsys)


@pytest.mark.parametrize("name", [*DAMAGED, *TO_RESUME])
def test_damaged_run(place, capsys, name):
    *_, message = {**DAMAGED, **TO_RESUME}[name]
    assert message in refused(["--resume", name], capsys)
    if name in DAMAGED:
        assert message in refused(["--sample", name], capsys)
    assert not Path("hacked").exists()


@pytest.mark.parametrize("where, name, error, message", [
    (data, "load", RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore"), "not enough"),
    (data, "load", MemoryError(), "not enough memory"),
    (data, "load", TorchDynamoException("no g++"), "--compile failed"),
    (data, "load", PermissionError(13, "Permission denied", "x"), "x: Permission denied"),
    (Path, "mkdir", PermissionError(13, "Permission denied"), "cannot write to new")])
def test_what_the_system_refuses(place, monkeypatch, capsys, where, name, error, message):
    def broken(*_, **kw):
        raise error
    monkeypatch.setattr(where, name, broken)
    assert message in refused(tiny_flags("new"), capsys)


def test_resume_on_a_text_that_has_changed(tmp_path, monkeypatch, tiny_run, capsys):
    """The tokens would mean something else, and nobody would notice. Held-out text counts too."""
    monkeypatch.setitem(data.load.__kwdefaults__, "cache", tmp_path / "cache")
    path, out, text = tmp_path / "text.txt", tmp_path / "out", TEXTS["text.txt"]
    path.write_bytes(text)
    tiny_run(out, data=str(path), vocab_size=270)
    for changed in (text.replace(b"sheep", b"goats"), text[:-9] + b"cats\n" + text[-4:]):
        path.write_bytes(changed)
        for door in ("--resume", "--sample"):
            assert train.main([door, str(out)]) == 2
            assert "is no longer the one" in capsys.readouterr().err
    path.write_bytes(text)
    assert train.main(["--resume", str(out)]) == 0
