"""train.py: a run can be stopped, killed and resumed without a bit of difference, and leaves what
it says it leaves. What it refuses stands in test_errors.py."""

import errno
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import probe
import train
from data.common import UserError
from model import ATTENTIONS, GPT
from tests.conftest import TINY, same, tiny_flags
from train import Run

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("tiny_run")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Settings for a text of our own, whose tokens are kept in a folder that pytest removes."""
    folder = tmp_path_factory.mktemp("text")
    lines = [f"Day {i}: the cat sat on the mat, and nothing happened.\n" for i in range(400)]
    (folder / "book.txt").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as m:
        m.setitem(data.load.__kwdefaults__, "cache", folder / "cache")
        yield dict(data=str(folder / "book.txt"), vocab_size=300)


def saved(out):
    return torch.load(Path(out) / "model.pt", weights_only=True)


def same_runs(a, b):
    return same(saved(a), saved(b)) and same(train.read_log(a), train.read_log(b))


def files(out):
    return {path.name: path.read_bytes() for path in Path(out).iterdir() if path.name != ".lock"}


@pytest.fixture
def interrupt_at(monkeypatch):
    """interrupt_at(n) presses Ctrl-C while the nth batch from now on is drawn."""
    draw, waiting = data.Corpus.batch, []

    def batch(self, *args, split="train", **kw):
        if split == "train" and waiting:
            waiting.pop()
            if not waiting:
                signal.raise_signal(signal.SIGINT)
        return draw(self, *args, split=split, **kw)
    monkeypatch.setattr(data.Corpus, "batch", batch)
    return lambda call: waiting.extend(range(call))


# ---------------------------------------------------------------- stopped, and taken up again

@pytest.mark.parametrize("how", [dict(attn=attn) for attn in ATTENTIONS] + ["text"])
def test_an_interrupted_run_goes_on_as_told_and_ends_as_one_that_was_not(
        tmp_path, interrupt_at, tiny_run, book, capsys, how):
    settings = dict(book, num_key_value_heads=1) if how == "text" else how
    whole, parts, before = tmp_path / "whole", tmp_path / "a run", signal.getsignal(signal.SIGINT)
    tiny_run(whole, **settings)
    capsys.readouterr()  # a text was built
    interrupt_at(5)
    assert train.main(tiny_flags(parts, **settings)) == 130 and saved(parts)["step"] == 5
    said = capsys.readouterr()
    words = shlex.split(said.out.splitlines()[-1].split("go on with: python train.py ")[1])
    interrupt_at(2)
    assert train.main(words) == 130 and saved(parts)["step"] == 7
    (parts / "log.jsonl").write_bytes(files(whole)["log.jsonl"])  # with steps that were not saved
    assert train.main(words) == 0 and same_runs(whole, parts)
    ended = files(parts)
    assert train.main(words) == 0 and files(parts) == ended
    assert signal.getsignal(signal.SIGINT) is before and "train.py" not in said.err


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_killed_before_the_first_save(tmp_path, tiny_run, how):
    """config.json is there and model.pt is not. Of what a kill leaves only our own files go."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        out.mkdir()
        (out / "config.json.abcdefgh.part").write_text("{")  # killed before even that was there
        tiny_run(out)
    for name in ("model.pt", "log.jsonl", "curve.png"):
        (killed / name).unlink()
    for name in ("notes.tmp", "film.part", "model.pt.a1b2c3d4.part"):
        (killed / name).write_text("half a file")
    assert tiny_run(killed, **{how: True}).finished and same_runs(whole, killed)
    assert files(killed).keys() == {*files(whole), "notes.tmp", "film.part"}


def test_another_machine_is_told_and_kept(tmp_path, tiny_run):
    tiny_run(tmp_path)
    config, said = tmp_path / "config.json", []
    config.write_text(config.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1"'))
    (tmp_path / "model.pt").unlink()
    tiny_run(tmp_path, resume=True, say=said.append)
    assert any("torch was '1'" in line and "last bits of the weights may" in line for line in said)
    assert json.loads(config.read_text())["earlier"][0]["torch"] == "1"


def test_ctrl_c_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda *_, **kw: signal.raise_signal(signal.SIGINT))
    assert train.main(tiny_flags(tmp_path / "new")) == 130
    assert capsys.readouterr().err == "train.py: stopped\n" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("program, module", [("train.py", "argparse"), ("probe.py", "torch.nn")])
def test_ctrl_c_during_the_imports(program, module):
    """Python tells on stderr what it has imported: Ctrl-C comes right after one of these."""
    process = subprocess.Popen([sys.executable, "-X", "importtime", ROOT / program, "smollm2"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stderr if line.split("|")[-1].strip() == module)
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[1].splitlines()
    said, = (line for line in rest if not line.startswith("import time:"))
    assert process.returncode == 130 and said.endswith(f"{program}: stopped")


def test_a_folder_has_one_writer(tmp_path, tiny_run, capsys):
    def meanwhile(line):
        for words in (["--resume", str(tmp_path)], [*tiny_flags(tmp_path), "--overwrite"]):
            assert train.main(words) == 2
            said, = capsys.readouterr().err.splitlines()
            assert f"(process {os.getpid()})" in said
    tiny_run(tmp_path)
    assert tiny_run(tmp_path, overwrite=True, say=meanwhile).finished


@pytest.mark.parametrize("stdout", ["/dev/full", None])
def test_no_place_for_its_words(tmp_path, monkeypatch, stdout):
    monkeypatch.setattr(sys, "stdout", stdout and open(stdout, "w"))
    assert train.main(tiny_flags(tmp_path)) == 0 and saved(tmp_path)["step"] == 12


# ---------------------------------------------------------------- what a run depends on

def test_evaluation_does_not_change_training(tmp_path, tiny_run):
    few, many = (tiny_run(tmp_path / str(evals), evals=evals).log for evals in (1, 30))
    assert same(saved(tmp_path / "1")["model"], saved(tmp_path / "30")["model"])
    losses = {row["step"]: row["val_loss"] for row in many}
    assert len(few) < len(many) and all(losses[row["step"]] == row["val_loss"] for row in few)


def test_the_variants_share_initial_weights_and_batches(tmp_path, tiny_run):
    """Whoever compares them compares nothing but the attention. At this lr no weight moves."""
    for name in (*ATTENTIONS, "another seed"):
        settings = dict(attn=name) if name in ATTENTIONS else dict(seed=1)
        tiny_run(tmp_path / name, lr=1e-30, **settings)
        first, found = saved(tmp_path / "softmax"), saved(tmp_path / name)
        weights = {key: found["model"][key] for key in first["model"]}
        assert same(found["batches"], first["batches"]) is (name in ATTENTIONS)
        assert same(weights, first["model"]) is (name in ATTENTIONS)


def test_the_model_learns(tmp_path, tiny_run, book):
    """On a text of one line over and over little is left to guess."""
    log = tiny_run(tmp_path, **book, steps=120).log
    assert log[-1]["val_loss"] < 2 < math.log(300) < log[0]["val_loss"] + 0.5


def test_the_first_step_of_adamw(tmp_path, tiny_run):
    """lr times the sign of the gradient, after a decay of the matrices alone; betas 0.9 and 0.95:
    (1 - 0.9)^2 / (1 - 0.95) = 0.2; and no gradient is longer than 1."""
    model = tiny_run(tmp_path, steps=1, warmup=0, lr=1e-2, weight_decay=0.5).model
    for name, w in GPT(model.cfg, seed=0).state_dict().items():
        kept = w * (1 - 0.5e-2) if w.dim() > 1 else w
        assert (model.state_dict()[name] - kept).abs().max() == pytest.approx(1e-2, rel=1e-2), name
    moments = saved(tmp_path)["optimizer"]["state"].values()
    mean, square = (torch.cat([m[key].flatten() for m in moments])
                    for key in ("exp_avg", "exp_avg_sq"))
    moving = square > 1e-12
    assert torch.allclose(mean[moving].square() / square[moving], torch.tensor(0.2), rtol=1e-3)
    assert (mean / (1 - 0.9)).norm() < 1.001


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    run = train.resolve(Run(steps=1000, warmup=100, lr=1.0))
    rates = [train.learning_rate(step, run) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == pytest.approx(1, abs=0.03)
    assert rates[500] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("changes, out", [
    ({}, "out/softmax"), (dict(size="tiny", attn="gated", threads=2), "out/tiny-gated"),
    (dict(seed=1, data="my notes/war & peace.txt"), "out/softmax-datawar___peace-seed1"),
    (dict(data="x" * 300), "out/softmax-data" + "x" * 88)])
def test_the_folder_follows_what_was_changed(changes, out):
    assert train.resolve(Run(**changes)).out == out


def test_without_a_compiler_nothing_is_compiled(tmp_path, tiny_run, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: lambda *x: 1 / 0)
    assert train.resolve(Run()).compile is False  # what is narrow gains little
    assert tiny_run(tmp_path, hidden_size=128, steps=1).run.compile is False


# ---------------------------------------------------------------- what a run leaves and says

def test_files_of_a_run(tmp_path, tiny_run, book):
    result = tiny_run(tmp_path, **book)
    assert files(tmp_path).keys() == {"config.json", "curve.png", "log.jsonl", "model.pt"}
    header, *log = map(json.loads, files(tmp_path)["log.jsonl"].splitlines())
    assert header == json.loads(files(tmp_path)["config.json"])
    assert header["run"] == vars(train.resolve(Run(**TINY | book | {"out": str(tmp_path)})))
    assert header["parameters"] == sum(p.numel() for p in result.model.parameters())
    assert {"torch", "python", "cores", "device", "git"} <= header["environment"].keys()
    assert train.read_log(tmp_path) == log
    assert [row["step"] for row in log] == [0, 6, 10, 12]  # evenly, and more at the birth
    bits = log[-1]["val_loss"] / math.log(2) / result.corpus.bytes_per_token
    assert log[-1]["bpb"] == pytest.approx(bits) and log[-1]["tokens"] == 12 * 4 * 16
    keys = {number.key for number in probe.metrics()}
    assert log[-1]["links"].keys() == log[-1]["links_bos"].keys() == keys
    model, corpus, settings = train.load_run(tmp_path)
    assert same(model.state_dict(), saved(tmp_path)["model"])
    assert settings == header["run"] and corpus.fingerprint() == header["corpus"]


def test_time_to_go_counts_evaluations(tmp_path, monkeypatch, tiny_run):
    forward, said = GPT.forward, []

    def slow_when_evaluated(self, *args, **kw):
        time.sleep(0 if torch.is_grad_enabled() else 0.1)
        return forward(self, *args, **kw)
    monkeypatch.setattr(GPT, "forward", slow_when_evaluated)
    tiny_run(tmp_path, steps=40, evals=12, say=lambda line: said.append((time.monotonic(), line)))
    end = time.monotonic()
    when, line = next(each for each in said if "to go" in each[1])
    told = int(line.split(" to go")[0].rpartition(":")[2])
    assert end - when > 2 and 0.5 * (end - when) - 1 < told < 2 * (end - when) + 1


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, interrupt_at, tiny_run, capsys):
    def half(state, path):
        Path(path).write_bytes(b"the first half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/7\n at somewhere")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    interrupt_at(3)
    tiny_run(tmp_path)
    before = files(tmp_path)["model.pt"]
    for place, name, broken in ((torch, "save", half), (os, "fsync", full), (os, "replace", full)):
        with monkeypatch.context() as m:
            m.setattr(place, name, broken)
            assert train.main(["--resume", str(tmp_path)]) == 2
        line, = capsys.readouterr().err.splitlines()
        assert "could not write" in line and files(tmp_path)["model.pt"] == before
        assert not list(tmp_path.glob("*.part"))
    assert tiny_run(tmp_path, resume=True).finished


@pytest.mark.parametrize("what, evals, stop", [
    ("validation loss", 30, 99), ("loss", 1, 99), ("model", 1, 4)])
def test_what_is_no_longer_finite_stops_the_run(tmp_path, monkeypatch, interrupt_at, capsys, what,
                                                evals, stop):
    """The first gradient is nan. It is found at the next evaluation, loss, or save."""
    interrupt_at(stop)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda p, n: next(iter(p)).grad.fill_(math.nan))
    assert train.main(tiny_flags(tmp_path, evals=evals)) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train.py: the {what} is no longer finite") and "--lr" in line
    assert all(p.isfinite().all() for p in saved(tmp_path)["model"].values())


def test_numbers_of_the_chain_may_be_missing(tmp_path, monkeypatch):
    chain = probe.chain
    monkeypatch.setattr(probe, "chain", lambda *a, **kw: dict.fromkeys(chain(*a, **kw), math.nan))
    assert train.main(tiny_flags(tmp_path)) == 0
    assert set(train.read_log(tmp_path)[-1]["links"].values()) == {None}


def test_sampling(tmp_path, tiny_run, book, capsys):
    tiny_run(tmp_path, **book)

    def sample(prompt, *more):
        words = ["--sample", str(tmp_path), "--prompt", prompt, "--tokens=20", *more]
        assert train.main(words) == 0
        return capsys.readouterr().out
    assert sample("Day 1", "--temperature=0") == sample("Day 1", "--temperature=0", "--seed=1")
    assert sample("Day 1") == sample("Day 1") != sample("Day 1", "--seed=1")
    for prompt in ("", "🙂 née", "a\0b", "Day 1: " * 50, "<|bos|>"):
        assert sample(prompt).startswith(prompt)
    sample("\udcff")


def test_a_sample_begins_as_the_windows_of_training_do(tmp_path, tiny_run, monkeypatch):
    """Where no <|bos|> was in front, nobody has trained its embedding."""
    tiny_run(tmp_path, bos=0.0)
    (model, corpus, _), seen = train.load_run(tmp_path), []
    monkeypatch.setattr(GPT, "generate", lambda self, idx, *_: seen.append(idx[0].tolist()) or idx)
    for bos, prompt in ((0.0, None), (0.0, "ab"), (0.5, "ab")):
        train.write_text(model, corpus, bos, prompt)
    (letter,), *prompted = seen
    assert letter < corpus.task.K and prompted == [[0, 1], [corpus.bos, 0, 1]]


def test_a_run_that_ended_while_another_waited_is_kept(tmp_path, tiny_run, monkeypatch):
    tiny_run(tmp_path / "done")
    load, out = train.load_corpus, tmp_path / "out"

    def long(*words):
        shutil.copytree(tmp_path / "done", out)
        return load(*words)
    monkeypatch.setattr(train, "load_corpus", long)
    with pytest.raises(UserError, match="already holds a run"):
        tiny_run(out)
    assert files(out) == files(tmp_path / "done")


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["softmax", "sigmoid"])
def test_compiled_steps_are_those_of_plain_ones(tmp_path, tiny_run, attn):
    """From a width of 128 on by default: nearly the same weights, and one that can be opened."""
    wide = dict(attn=attn, hidden_size=128, intermediate_size=344, lr=1e-3)
    fast, plain = (tiny_run(tmp_path / name, **wide, **how)
                   for name, how in (("fast", {}), ("plain", {"compile": False})))
    assert fast.run.compile and fast.log[-1]["val_loss"] < fast.log[0]["val_loss"] - 0.1
    for a, b in zip(fast.log, plain.log):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=0.02)
    opened, *_ = train.load_run(tmp_path / "fast")
    assert opened(torch.zeros(1, 4, dtype=torch.long))[0].isfinite().all()


@pytest.mark.slow
def test_sigkill_loses_nothing(tmp_path):
    """SIGKILL, 60 times, half of them while a file is being written; the end is the same bits."""
    out, whole, dice, step, midway = tmp_path / "killed", tmp_path / "whole", random.Random(0), 0, 0
    model, resume, long = out / "model.pt", ["--resume", str(out)], dict(steps=900, evals=900)

    def start(words):
        process = multiprocessing.get_context("fork").Process(target=train.main, args=[words])
        process.start()
        return process

    def changed():
        return model.stat().st_mtime_ns if model.exists() else None

    for number in range(60):
        since, deadline = changed(), time.monotonic() + 20
        begun = (out / "config.json").exists()
        process = start(resume if begun else tiny_flags(out, **long))
        while number % 4 and changed() == since and time.monotonic() < deadline:
            time.sleep(0.001)  # from the first save on; every fourth time whenever
        time.sleep(dice.uniform(0, 0.05))
        while number % 2 and not list(out.glob("*.part")) and time.monotonic() < deadline:
            pass  # aim at a write
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        midway += any(out.glob("*.part"))
        if model.exists():
            before, step = step, train.load_checkpoint(model)["step"]
            assert step >= before, "a save that had succeeded is gone"
    assert 60 < step < 900 and midway > 10
    for words in (resume, tiny_flags(whole, **long)):
        start(words).join()
    assert saved(out)["step"] == 900 and same_runs(whole, out) and not list(out.glob("*.part"))
