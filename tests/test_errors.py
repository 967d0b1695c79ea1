"""Mistakes of the user: each is one line on stderr and exit code 2, and no file is written, changed or run."""
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

import data
import train

TINY = dict(data="copy", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            seq_len=16, batch_size=4, steps=4, evals=1, threads=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to start from; the tests work on copies of it."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "EVAL_TOKENS", 256)
        m.setattr(train, "PROBE_TOKENS", 128)
        m.setattr(train, "draw_curve", lambda *_: None)
        train.train(train.Run(**TINY, out=str(out)), say=lambda line: None)
    return out


@pytest.fixture
def place(tmp_path, monkeypatch, finished):
    """The current folder of the command: some files, one run in `old`, and the cache out of the way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "EVAL_TOKENS", 256)
    monkeypatch.setattr(train, "PROBE_TOKENS", 128)
    monkeypatch.setattr(train, "draw_curve", lambda *_: None)
    monkeypatch.setitem(data.load.__kwdefaults__, "cache", Path(os.devnull) / "cache")
    shutil.copytree(finished, "old")
    Path("empty.txt").write_text("")
    Path("blank.txt").write_text(" \n\n ")
    Path("binary.txt").write_bytes(b"GIF89a\0\1\2")
    Path("latin1.txt").write_bytes("caf\u00e9\n".encode("latin-1") * 500)
    Path("short.txt").write_text("too short")
    Path("text.txt").write_text("".join(f"{i} sheep, {i * i} legs and {i % 7} dogs\n" for i in range(300)))
    Path("folder").mkdir()
    Path("folder/picture.png").write_bytes(b"\x89PNG")
    Path("notes").mkdir()
    Path("notes/todo.md").write_text("keep me")
    Path("llama").mkdir()
    Path("llama/config.json").write_text('{"model_type": "llama"}')
    Path("llama/model.safetensors").write_text("precious")
    return tmp_path


def tree(folder):
    """Every file below a folder with its content, every folder with None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(words, folder, capsys):
    """Run the command; it must refuse in one line and leave the folder as it was. Returns the line."""
    before = tree(folder)
    capsys.readouterr()
    try:
        code = train.main(words)
    except SystemExit as exit:  # argparse
        code = exit.code
    said = capsys.readouterr().err.splitlines()
    said = [line for line in said if not line.startswith("data: ")]  # news of the corpus, not the error
    assert code == 2 and len(said) == 1 and said[0].startswith("train.py: "), (code, said)
    assert tree(folder) == before
    return said[0]


def flags(**changes):
    settings = {**TINY, "out": "new", **changes}
    return [w for name, value in settings.items() for w in (
        [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}={value}"])]


@pytest.mark.parametrize("words, message", [
    # words that the command line does not know
    (["--atn", "softmax"], "unrecognized"),
    (["--attn", "linear"], "choose from"),
    (["softmax"], "unrecognized"),
    (["--steps", "many"], "invalid int"),
    (["--steps", "1.5"], "invalid int"),
    (["--lr", "fast"], "invalid float"),
    (["--size", "huge"], "choose from"),
    (["--lr"], "expected one argument"),
    (["--steps", ""], "invalid int"),
    # numbers that make no sense
    (["--steps", "0"], "--steps"),
    (["--batch-size", "-1"], "--batch-size"),
    (["--seq-len", "0"], "--seq-len"),
    (["--seq-len", "2"], "at least 3"),
    (["--batch-size", "99999999999999999999"], "--batch-size"),
    (["--evals", "0"], "--evals"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "-1"], "--lr"),
    (["--lr", "inf"], "--lr"),
    (["--lr", "0"], "--lr"),
    (["--bos", "2"], "--bos"),
    (["--bos", "nan"], "--bos"),
    (["--warmup", "-1"], "--warmup"),
    (["--weight-decay", "nan"], "--weight-decay"),
    (["--seed", "-1"], "--seed"),
    (["--seed", "99999999999999999999"], "--seed"),
    (["--threads", "0"], "--threads"),
    (["--threads", "99999"], "--threads"),
    (["--initializer-range", "0"], "initializer_range"),
    (["--initializer-range", "nan"], "initializer_range"),
    # shapes that do not fit
    (["--num-attention-heads", "3"], "num_attention_heads"),
    (["--num-attention-heads", "0"], "num_attention_heads"),
    (["--num-attention-heads", "32"], "odd"),
    (["--num-key-value-heads", "3"], "num_key_value_heads"),
    (["--num-key-value-heads", "0"], "num_key_value_heads"),
    (["--hidden-size", "1"], "--hidden-size"),
    (["--intermediate-size", "0"], "--intermediate-size"),
    (["--num-hidden-layers", "0"], "num_hidden_layers"),
    (["--num-hidden-layers", "-3"], "num_hidden_layers"),
    # text that is none
    (["--data", "nowhere.txt"], "does not exist"),
    (["--data", "wikipedia"], "unknown data"),
    (["--data", ""], "unknown data"),
    (["--data", "empty.txt"], "empty"),
    (["--data", "blank.txt"], "empty"),
    (["--data", "binary.txt"], "binary"),
    (["--data", "latin1.txt"], "not UTF-8"),
    (["--data", "folder"], "holds no text"),
    (["--data", "short.txt"], "too short"),
    (["--data", "text.txt", "--seq-len", "100000"], "too short"),
    (["--data", "text.txt", "--vocab-size", "256"], "vocab_size"),
    (["--encoding", "klingon"], "choose from"),
    # places that cannot be used
    (["--out", "text.txt"], "another --out"),
    (["--out", "text.txt/below"], "another --out"),
    (["--out", "x" * 300], "another --out"),
    (["--out", "old"], "--resume"),
    (["--out", "notes"], "no run"),
    (["--out", "notes", "--overwrite"], "no run"),
    (["--out", "notes", "--resume"], "no run"),
    (["--out", "llama", "--overwrite"], "no run"),
    (["--resume"], "no run to resume"),
    (["--out", "old", "--resume", "--overwrite"], "one of them"),
    # a machine that lacks something
    (["--device", "tpu"], "--device"),
    (["--device", "cpu:x"], "--device"),
    (["--dtype", "fp8"], "choose from"),
    # other settings than those of the run
    (["--out", "old", "--resume", "--attn", "sigmoid"], "--attn softmax, not sigmoid"),
    (["--out", "old", "--resume", "--hidden-size", "64"], "--hidden-size 32, not 64"),
    (["--out", "old", "--resume", "--steps", "8"], "--steps 4, not 8"),
    # sampling
    (["--sample", "nowhere"], "nowhere"),
    (["--sample", "text.txt"], "text.txt"),
    (["--sample", "notes"], "notes"),
    (["--sample", "x" * 300], "xxx"),
    (["--sample", "old", "--prompt", "A"], "'A' is not a symbol"),
    (["--sample", "old", "--prompt", "a", "--temperature", "nan"], "--temperature"),
    (["--sample", "old", "--prompt", "a", "--temperature", "-1"], "--temperature"),
    (["--sample", "old", "--prompt", "a", "--tokens", "0"], "--tokens"),
    (["--sample", "old", "--prompt", "a", "--top-k", "0"], "--top-k"),
    (["--sample", "old", "--prompt", "a", "--seed", "-1"], "--seed"),
    (["--top-k", "0"], "--top-k"),
], ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "")
def test_bad_command(place, capsys, words, message):
    assert message in refused([*flags(), *words], place, capsys)


@pytest.mark.parametrize("changes, message", [
    (dict(steps="many"), "must be of type int"), (dict(lr=None, steps=2.0), "must be of type int"), (dict(bos=True), "type float"),
    (dict(attn="Softmax"), "one of"), (dict(data=3), "type str"), (dict(compile="yes"), "type bool")])
def test_bad_setting_in_python(place, changes, message):
    with pytest.raises(train.TrainError, match=message):
        train.train(train.Run(**{**TINY, "out": "new", **changes}))
    assert not Path("new").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
def test_absent_device(place, monkeypatch, capsys, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "no such device" in refused(flags(device=device), place, capsys)


def test_bf16_without_the_instructions(place, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert "no bf16 instructions" in refused(flags(dtype="bf16", device="cpu"), place, capsys)


def test_out_of_memory_and_no_compiler(place, monkeypatch, capsys):
    def full(*args, **kw):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory\nmore")
    monkeypatch.setattr(train, "GPT", full)
    assert "--batch-size" in refused(flags(), place, capsys)

    def missing(*args, **kw):
        raise TorchDynamoException("no g++")
    monkeypatch.setattr(train, "GPT", missing)
    assert "--compile failed" in refused(flags(compile=True), place, capsys)


# --- files of a run that somebody or something has changed ---------------------------------------------

class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("hacked"),)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flipped(path):
    state = torch.load(path, weights_only=True)
    torch.save({**state, "batches": state["batches"][:100]}, path)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncated,
    "half": cut_in_half,
    "text": lambda path: path.write_text("hello"),
    "hostile pickle": lambda path: path.write_bytes(pickle.dumps({"model": Hostile()})),
    "hostile torch file": lambda path: torch.save({"model": {"x": Hostile()}}, path),
    "hostile old torch file": lambda path: torch.save(Hostile(), path, _use_new_zipfile_serialization=False),
    "list": lambda path: torch.save([1, 2], path),
    "tensor": lambda path: torch.save(torch.ones(3), path),
    "foreign": lambda path: torch.save({"state_dict": {"w": torch.ones(3)}}, path),
    "weights of another model": lambda path: torch.save({"model": {"w": torch.ones(3)}}, path),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.filterwarnings("ignore")  # torch also warns about some of these
@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("words", [flags(out="old", resume=True), ["--sample", "old", "--prompt", "abc"]], ids=["resume", "sample"])
def test_damaged_checkpoint(place, capsys, words, what):
    DAMAGE[what](Path("old/model.pt"))
    assert "model.pt" in refused(words, place, capsys)
    assert not Path("hacked").exists()


@pytest.mark.parametrize("change", [
    dict(optimizer={}), dict(optimizer=None), dict(batches=torch.zeros(3)), dict(batches="x"), dict(model=None),
    dict(step="3"), dict(step=None), dict(step=-1), dict(step=10**9), dict(best="low"), dict(smooth="x"), dict(seconds=None)],
    ids=lambda change: str(change)[:30])
def test_checkpoint_with_a_wrong_part(place, capsys, change):
    path = Path("old/model.pt")
    torch.save(torch.load(path, weights_only=True) | change, path)
    assert "model.pt" in refused(flags(out="old", resume=True), place, capsys)


def test_checkpoint_of_another_run(place, capsys):
    train.train(train.Run(**{**TINY, "attn": "headnorm", "out": "other"}), say=lambda line: None)
    shutil.copy("other/model.pt", "old/model.pt")
    assert "does not fit" in refused(flags(out="old", resume=True), place, capsys)
    assert "does not fit" in refused(["--sample", "old", "--prompt", "a"], place, capsys)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"run": 3}', '{"run": {}}', "\xff", '{"model": {}}', "null"])
def test_damaged_config(place, capsys, text):
    Path("old/config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refused(flags(out="old", resume=True), place, capsys)
    assert "config.json" in refused(["--sample", "old", "--prompt", "a"], place, capsys)


@pytest.mark.parametrize("text", ["header\n{", "header\n[1]\n", "header\n{}\n", 'header\n{"step": "x"}\n', "header\n\xff\n", 'header\n3\n', 'header\n{"step": 0}\n'])
def test_damaged_log(place, capsys, text):
    Path("old/log.jsonl").write_bytes(text.encode("latin-1"))
    assert "log.jsonl" in refused(flags(out="old", resume=True), place, capsys)


def test_a_run_goes_on_without_its_log(place):
    Path("old/log.jsonl").unlink()
    assert train.train(train.Run(**TINY, out="old", resume=True), say=lambda line: None).finished
    assert [row["step"] for row in train.read_log("old")] == [4]


def test_a_damaged_run_can_be_started_anew(place):
    Path("old/config.json").write_text("{")
    Path("old/model.pt").write_text("?")
    assert train.train(train.Run(**TINY, out="old", overwrite=True), say=lambda line: None).finished
    assert json.loads(Path("old/config.json").read_text())["run"]["steps"] == 4


def test_resume_on_a_text_that_has_changed(place, capsys):
    """The tokens would mean something else, and nobody would notice."""
    settings = dict(data="text.txt", vocab_size=270, out="mine")
    train.train(train.Run(**{**TINY, **settings}), say=lambda line: None)
    assert train.train(train.Run(**{**TINY, **settings, "resume": True}), say=lambda line: None).finished
    text = Path("text.txt").read_text()
    Path("text.txt").write_text(text.replace("sheep", "goats"))
    assert "no longer" in refused(flags(**settings, resume=True), place, capsys)
    Path("text.txt").write_text(text)
    assert train.train(train.Run(**{**TINY, **settings, "resume": True}), say=lambda line: None).finished


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for field in train.fields(train.Run):
        assert f"--{field.name.replace('_', '-')}" in text
        if not isinstance(field.default, bool) and field.default is not None:
            assert f"(default: {field.default})" in text, field.name
