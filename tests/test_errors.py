"""Mistakes of the user and damaged files: one line on stderr, exit code 2, and nothing is written,
changed or run. A row of the table is a command and words of the line that it must end in."""
import json
import math
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

import data
import train
from data.border import UserError
from tests.conftest import TINY, same, tiny_flags

ROOT = Path(__file__).parent.parent
DIGITS, ENDLESS = "1" * 400, "1" * 5000

# `python train.py` with the settings of a tiny model and --out new, unless the words say otherwise
TRAIN = """
--atn softmax                                | unrecognized
--attn linear                                | choose from
--attn                                       | expected one argument
--size huge                                  | choose from
--steps many                                 | invalid int
--steps 1.5                                  | invalid int
--steps ""                                   | invalid int
--lr fast                                    | invalid float
--compile yes                                | unrecognized
--steps 0                                    | --steps must be from 1
--steps {digits}                             | --steps must be from 1
--steps {endless}                            | invalid int
--batch-size 99999999999999999999            | --batch-size must be from 1
--batch-size 65536 --seq-len 4096            | GB of memory
--seq-len 2                                  | --seq-len must be from 3
--seq-len 65536                              | GB of memory
--evals 0                                    | --evals must be from 1
--evals 2000000000                           | --evals must be from 1 to 10000
--lr nan                                     | --lr must be from
--lr inf                                     | --lr must be from
--lr 0                                       | --lr must be from
--bos 2                                      | --bos must be from 0 to 1
--bos nan                                    | --bos must be from 0 to 1
--repeat -0.1                                | --repeat must be from 0 to 1
--warmup -1                                  | --warmup must be from 0
--weight-decay nan                           | --weight-decay must be from 0
--seed -1                                    | --seed must be from 0
--seed {digits}                              | --seed must be from 0
--threads 0                                  | --threads must be from 1
--threads 99999                              | --threads must be from 1 to 1024
--initializer-range 0                        | --initializer-range must be from
--num-attention-heads 3                      | twice --num-attention-heads 3
--num-attention-heads 32                     | twice --num-attention-heads 32
--num-key-value-heads 3                      | --num-key-value-heads 3 must divide
--hidden-size 1                              | --hidden-size must be from 8
--hidden-size 65536 --num-hidden-layers 900  | GB of memory
--intermediate-size 0                        | --intermediate-size must be from 8
--num-hidden-layers 0                        | --num-hidden-layers must be from 1
--num-hidden-layers 20000                    | --num-hidden-layers must be from 1 to 1000
--vocab-size 0                               | --vocab-size must be from 25
--data text.txt --vocab-size 256             | at least 257
--data nowhere.txt                           | nowhere.txt does not exist
--data no/such/folder                        | does not exist
--data wikipedia                             | unknown data
--data ""                                    | --data is empty
--data empty.txt                             | empty.txt is empty
--data blank.txt                             | blank.txt is empty
--data binary.txt                            | binary (zero byte at offset 6)
--data latin1.txt                            | not UTF-8 text (byte 0xe9 at offset 3)
--data pictures                              | holds no text
--data mixed                                 | bad.txt is not UTF-8
--data short.txt                             | too short
--data one.txt                               | too short
--data text.txt --seq-len 9999               | too short for windows of 9999
--data pipe.txt                              | no ordinary file
--data pipes                                 | no ordinary file
--data /dev/zero                             | no ordinary file
--data /dev/stdin                            | open
--data big.txt                               | 300 MB of text, more than the 134 MB
--data {x300}.txt                            | cannot be opened
--data not{bad}utf8.txt                      | not\\xffutf8.txt does not exist
--out ""                                     | --out is empty
--out "" --overwrite                         | --out is empty
--out text.txt                               | choose another --out
--out text.txt/below                         | choose another --out
--out {x300}                                 | choose another --out
--out old                                    | --resume old, start anew with --overwrite
--out notes                                  | holds files that are no run
--out notes --overwrite                      | holds files that are no run
--out llama --overwrite                      | holds files that are no run
--out config-torn --overwrite                | holds files that are no run
--device tpu                                 | --device must be
--device ""                                  | --device is empty
--device cpu:x                               | --device must be
--device {bad}                               | --device must be
--device cuda:77                             | --device must be
--tokens 3                                   | goes with --sample
--resume                                     | expected one argument
"""

# `python train.py` and nothing else
PLAIN = """
--resume old --attn sigmoid                  | leave --attn out (it goes with --device, --threads
--resume old --steps 8                       | leave --steps out
--resume old --out other                     | leave --out out
--resume old --overwrite                     | leave --overwrite out
--resume old --sample old                    | leave --resume out
--resume nowhere                             | nowhere holds no run
--resume ""                                  | holds no run
--resume notes                               | notes holds no run
--resume text.txt                            | text.txt holds no run
--resume {x300}                              | holds no run
--resume no{bad}utf8                         | no\\xffutf8 holds no run
--resume old --threads 0                     | --threads must be from 1
--sample nowhere                             | nowhere holds no run
--sample text.txt                            | text.txt holds no run
--sample notes                               | notes holds no run
--sample llama                               | llama/config.json is not that of a run
--sample {x300}                              | holds no run
--sample old --steps 3                       | leave --steps out
--sample old --prompt 7                      | '7' is not a symbol
--sample old --temperature nan               | --temperature must be
--sample old --temperature -1                | --temperature must be
--sample old --temperature 1e-9              | --temperature must be
--sample old --tokens 0                      | --tokens must be
--sample old --tokens {digits}               | --tokens must be
--sample old --seed -1                       | --seed must be
--sample old --seed {digits}                 | --seed must be
--sample no-model                            | has no model.pt
"""


def rows(table):
    fill = dict(digits=DIGITS, endless=ENDLESS, x300="x" * 300, bad="\udcff")
    parts = [line.rpartition(" | ") for line in table.strip().splitlines()]
    return [(shlex.split(words.format(**fill)), message) for words, _, message in parts]


# ---------------------------------------------------------------- the place

class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("hacked"),)


def checkpoint(edit):
    """Damage model.pt: `edit` changes what was saved."""
    def damage(folder):
        state = torch.load(folder / "model.pt", weights_only=True)
        edit(state)
        torch.save(state, folder / "model.pt")
    return damage


def resave(**changes):
    return checkpoint(lambda state: state.update(changes))


def moments(edit):
    return checkpoint(lambda state: edit(state["optimizer"]["state"]))


def weight(value):
    return checkpoint(lambda state: state["model"].update({"norm.weight": value}))


def bytes_of(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def settings(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        config["run"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))
    return damage


SHORT, LONG, NAN = torch.zeros(3), torch.zeros(10**4), torch.tensor(math.nan)
MODEL = {  # damage of model.pt that every door must find; and words of the line
    "empty": (bytes_of("model.pt", lambda b: b""), "not a zip file"),
    "cut": (bytes_of("model.pt", lambda b: b[:-1000]), "not a zip file"),
    "half": (bytes_of("model.pt", lambda b: b[:len(b) // 2]), "not a zip file"),
    "words": (bytes_of("model.pt", lambda b: b"hello"), "not a zip file"),
    "pickle": (bytes_of("model.pt", lambda b: pickle.dumps(Hostile())), "not a zip file"),
    "hostile": (lambda f: torch.save({"model": {"x": Hostile()}}, f / "model.pt"), "Unpickling"),
    "list": (lambda f: torch.save([1, 2], f / "model.pt"), "no checkpoint"),
    "tensor": (lambda f: torch.save(torch.ones(3), f / "model.pt"), "no checkpoint"),
    "foreign": (lambda f: torch.save({"weights": {"w": SHORT}}, f / "model.pt"), "no checkpoint"),
    "no-weights": (resave(model=None), "no checkpoint"),
    "other-weights": (resave(model={"w": torch.ones(3)}), "model.pt"),
    "int-weights": (weight(torch.ones(32, dtype=torch.int)), "no plain one"),
    "sparse": (weight(torch.ones(32).to_sparse()), "no plain one"),
    "huge": (weight(torch.ones(1).expand(2**40)), "larger than the file"),
    "shape": (weight(torch.ones(31)), "of shape (31,)"),
    "nan": (weight(torch.full((32,), math.nan)), "not finite"),
    "inf": (weight(torch.full((32,), math.inf)), "not finite"),
    "more-layers": (settings(num_hidden_layers=900), "too few"),
    "wider": (settings(hidden_size=2**12), "asks for"),
    "folder": (lambda f: ((f / "model.pt").unlink(), (f / "model.pt").mkdir()), "open"),
    "piped": (lambda f: ((f / "model.pt").unlink(), os.mkfifo(f / "model.pt")), "ordinary file"),
    "step-word": (resave(step="3"), "step is no number"),
    "step-none": (resave(step=None), "step is no number"),
    "step-minus": (resave(step=-1), "step is no number"),
    "seconds": (resave(seconds=None), "loss or seconds is no number"),
    "smooth": (resave(smooth=math.nan), "loss or seconds is no number"),
    "generator": (resave(batches=torch.zeros(3)), "generator"),
    "generator-word": (resave(batches="x"), "generator"),
    "optimizer": (resave(optimizer=None), "no checkpoint"),
}
RESUME = {  # what only --resume reads
    "step-late": (resave(step=10**9), "not of this run"),
    "no-moments": (resave(optimizer={"state": {}, "param_groups": []}), "not of this run"),
    "short-moment": (moments(lambda m: m[0].update(exp_avg=SHORT)), "shape"),
    "long-moment": (moments(lambda m: m[0].update(exp_avg_sq=LONG)), "shape"),
    "nan-moment": (moments(lambda m: m[0]["exp_avg"].fill_(math.nan)), "moments 0 are not finite"),
    "nan-count": (moments(lambda m: m[0].update(step=NAN)), "moments 0 are not finite"),
    "less-moments": (moments(lambda m: m.pop(0)), "not of this run"),
    "other-index": (moments(lambda m: m.update({99: m.pop(0)})), "not of this run"),
    "no-sq": (moments(lambda m: m[0].pop("exp_avg_sq")), "shape"),
    "generator-zeros": (resave(batches=torch.zeros(5056, dtype=torch.uint8)), "generator"),
    "log-torn": (bytes_of("log.jsonl", lambda b: b[:-9]), "log.jsonl cannot be read"),
    "log-list": (bytes_of("log.jsonl", lambda b: b"header\n[1]\n"), "log.jsonl cannot be read"),
    "log-empty": (bytes_of("log.jsonl", lambda b: b"header\n{}\n"), "log.jsonl cannot be read"),
    "log-bytes": (bytes_of("log.jsonl", lambda b: b"header\n\xff\n"), "log.jsonl cannot be read"),
    "log-deep": (bytes_of("log.jsonl", lambda b: b"\n" + b"[" * 10**5), "log.jsonl cannot be read"),
}
CONFIG = {
    "config-torn": (bytes_of("config.json", lambda b: b"{"), "is not JSON"),
    "config-list": (bytes_of("config.json", lambda b: b"[]"), "is not a JSON object"),
    "config-bytes": (bytes_of("config.json", lambda b: b"\xff"), "is not JSON"),
    "config-deep": (bytes_of("config.json", lambda b: b"[" * 10**5), "is not JSON"),
    "config-run": (bytes_of("config.json", lambda b: b'{"run": 3}'), "is not that of a run"),
    "config-bare": (bytes_of("config.json", lambda b: b'{"run": {}}'), "is not that of a run"),
    "steps-word": (settings(steps="many"), "--steps must be of type int"),
    "steps-digits": (settings(steps=10**400), "--steps must be from 1"),
    "lr-digits": (settings(lr=10**400), "--lr must be from"),
    "layers-many": (settings(num_hidden_layers=20_000), "--num-hidden-layers must be from"),
    "config-piped": (lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
                     "ordinary file"),
}
DAMAGED = {**MODEL, **RESUME, **CONFIG}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_run):
    """The current folder of all commands: texts, foreign folders, a run in `old`, damaged ones."""
    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    tiny_run(folder / "old")
    os.chdir(folder)
    texts = {"empty.txt": b"", "blank.txt": b" \n\n ", "binary.txt": b"GIF89a\0\1\2",
             "one.txt": b"x", "latin1.txt": "caf\u00e9\n".encode("latin-1") * 500,
             "short.txt": b"too short",
             "text.txt": "".join(f"{i} sheep and {i * i} legs\n" for i in range(300)).encode(),
             "pictures/a.png": b"\x89PNG", "mixed/a.txt": b"good\n" * 500, "mixed/bad.txt": b"\xff",
             "notes/todo.md": b"keep me", "llama/config.json": b'{"model_type": "llama"}',
             "llama/model.safetensors": b"precious"}
    for name, content in texts.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    Path("pipes").mkdir()
    os.mkfifo("pipe.txt"), os.mkfifo("pipes/a.txt")
    Path("big.txt").touch()
    os.truncate("big.txt", 300_000_000)
    for name, (damage, _) in DAMAGED.items():
        shutil.copytree("old", name)
        damage(Path(name))
    shutil.copytree("old", "no-model")
    Path("no-model/model.pt").unlink()
    with pytest.MonkeyPatch.context() as m:
        m.setitem(data.load.__kwdefaults__, "cache", Path(os.devnull) / "cache")
        m.setattr(sys, "stdin", open(os.devnull))
        yield folder
    os.chdir(before)


def tree():
    """Every file with its size and its time of change; locks come and go."""
    found = {}
    for path in Path().rglob("*"):
        stat = path.lstat()
        if path.name != ".lock":
            found[path] = (stat.st_size, path.is_dir() or stat.st_mtime_ns)
    return found


def refused(words, capsys) -> str:
    """Run the command; it must refuse in one line and leave the folder as it was."""
    before = tree()
    capsys.readouterr()
    code = train.main(words)
    said = capsys.readouterr().err.splitlines()
    said = [line for line in said if not line.startswith("data: ")]  # news, and not the error
    assert code == 2 and len(said) == 1 and said[0].startswith("train.py: "), (code, said)
    assert len(said[0]) < 800 and tree() == before
    return said[0]


def in_new(words):
    """The settings of a tiny model in the folder `new`, unless the words say otherwise."""
    usual = (word for word in tiny_flags("new") if word.split("=")[0] not in words)
    return [*usual, *words]


def name_of(value):
    return " ".join(value)[:40].encode("ascii", "replace").decode() if type(value) is list else ""


@pytest.mark.parametrize("words, message", rows(TRAIN), ids=name_of)
def test_bad_training(place, capsys, words, message):
    assert message in refused(in_new(words), capsys)


@pytest.mark.parametrize("words, message", rows(PLAIN), ids=name_of)
def test_bad_command(place, capsys, words, message):
    assert message in refused(words, capsys)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_run(place, capsys, name):
    message = DAMAGED[name][1]
    assert message in refused(["--resume", name], capsys)
    if name not in RESUME:
        assert message in refused(["--sample", name], capsys)
    assert not Path("hacked").exists()


# ---------------------------------------------------------------- what no row can show

def test_flipped_bits_are_found(tmp_path, tiny_run):
    """200 bits of a checkpoint, one at a time: whatever changes a number of it is refused."""
    path = Path(tiny_run(tmp_path).folder, "model.pt")
    raw, right = path.read_bytes(), train.load_checkpoint(path)
    found = 0
    for i in range(200):
        at = len(raw) * i // 200 + i % 7
        flipped = bytearray(raw)
        flipped[at] ^= 1 << i % 8
        path.write_bytes(flipped)
        try:  # bytes that no reader looks at, such as padding, may differ
            assert same(train.load_checkpoint(path), right), f"bit {i % 8} of byte {at}"
        except UserError:
            found += 1
    assert found > 150


@pytest.mark.parametrize("changes, message", [
    (dict(steps="many"), "type int"), (dict(steps=2.0), "type int"), (dict(bos=True), "type float"),
    (dict(attn="Softmax"), "one of"), (dict(data=3), "type str"), (dict(compile=1), "type bool"),
    (dict(attn=None), "type str"), (dict(lr=10**400), "from 1e-30")])
def test_bad_setting_in_python(changes, message):
    with pytest.raises(UserError, match=message):
        train.resolve(train.Run(**changes))


@pytest.mark.parametrize("error, message", [
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore"), "not enough"),
    (MemoryError(), "not enough memory"), (TorchDynamoException("no g++"), "--compile failed"),
    (PermissionError(13, "Permission denied", "x"), "x: Permission denied")])
def test_what_the_system_refuses(place, monkeypatch, capsys, error, message):
    def broken(*_, **kw):
        raise error
    monkeypatch.setattr(train, "State", broken)
    assert train.main([*tiny_flags("x"), "--compile"]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert message in line
    shutil.rmtree("x")


def test_a_folder_that_cannot_be_written(place, monkeypatch, capsys):
    def refuse(*_, **kw):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", refuse)  # a mode does not stop root
    assert "cannot write to new" in refused(tiny_flags("new"), capsys)


def test_resume_on_a_text_that_has_changed(tmp_path, monkeypatch, tiny_run, capsys):
    """The tokens would mean something else, and nobody would notice. Held-out text counts too."""
    monkeypatch.setitem(data.load.__kwdefaults__, "cache", tmp_path / "cache")
    path, out = tmp_path / "text.txt", tmp_path / "out"
    text = "".join(f"{i} sheep, {i * i} legs and {i % 7} dogs\n" for i in range(300))
    path.write_text(text)
    tiny_run(out, data=str(path), vocab_size=270)
    for changed in (text.replace("sheep", "goats"), text[:-9] + "cats " + text[-4:]):
        path.write_text(changed)
        for words in (["--resume", str(out)], ["--sample", str(out)]):
            assert train.main(words) == 2
            assert "is no longer the one" in capsys.readouterr().err
    path.write_text(text)
    assert train.main(["--resume", str(out)]) == 0


def test_help_names_every_flag_without_docstrings():
    words = [sys.executable, "-OO", "train.py", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    assert done.returncode == 0 and done.stderr == ""
    for field in train.fields(train.Run):
        assert train.flag(field.name) in text
        if field.default not in (None, False):
            assert f"(default: {field.default})" in text, field.name
