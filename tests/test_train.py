"""train.py: a run can be stopped, killed and resumed without a bit of difference, and leaves what
it says it leaves. What it refuses stands in test_errors.py."""

import errno
import math
import multiprocessing
import os
import random
import runpy
import shlex
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import probe
import train
from data import common
from data.common import UserError
from data.runs import load_checkpoint, read_film, read_log
from model import ATTENTIONS, GPT
from tests.conftest import draw_curve, same, tiny_flags
from train import Run

pytestmark = pytest.mark.usefixtures("tiny_run")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A text of our own, of one line over and over."""
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("Der Fluß stieg, und die Katze saß auf der Matte.\n" * 400)
    return path


def saved(out):
    return torch.load(Path(out) / "model.pt", weights_only=True)


def film(out):
    return {name: torch.as_tensor(values) for name, values in read_film(out).items()}


def same_runs(a, b):
    return all(same(read(a), read(b)) for read in (saved, read_log, film))


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

@pytest.mark.parametrize("how", ["softmax", "logit", "text", "rest"])
def test_an_interrupted_run_goes_on_as_told_and_ends_as_one_that_was_not(
        tmp_path, interrupt_at, tiny_run, book, capsys, how):
    other = {"text": dict(data=book), "rest": dict(data="rest", bos=0.0)}
    settings = other.get(how, dict(attn=how))
    whole, parts = tmp_path / "whole", tmp_path / "a run"
    tiny_run(whole, **settings)
    interrupt_at(5)
    assert train.main(tiny_flags(parts, **settings)) == 130
    assert saved(parts)["step"] == 5
    last = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(last.split("go on with: python train.py ")[1])
    interrupt_at(2)
    assert train.main(words) == 130
    assert saved(parts)["step"] == 7
    for name in ("log.jsonl", "film.npz"):
        (parts / name).write_bytes(files(whole)[name])  # with steps that were not saved
    assert train.main(words) == 0
    assert same_runs(whole, parts)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_killed_before_the_first_save(tmp_path, tiny_run, how):
    """config.json is there and model.pt is not. Only our own files are removed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    (whole / "config.json.part").write_text("{")  # killed before even that was there
    tiny_run(whole)
    shutil.copytree(whole, killed)
    for name in ("model.pt", "log.jsonl"):
        (killed / name).unlink()
    for name in ("film.part", "model.pt.part"):
        (killed / name).write_text("half a file")
    assert tiny_run(killed, **{how: True}).finished
    assert same_runs(whole, killed)
    assert files(killed).keys() == {*files(whole), "film.part"}


def test_overwrite_removes_what_was_seen_in_the_old_model(tmp_path, tiny_run):
    tiny_run(tmp_path)
    (tmp_path / "words.svg").write_text("the old one")
    tiny_run(tmp_path, overwrite=True)
    assert not (tmp_path / "words.svg").exists()


def test_a_folder_has_one_writer(tmp_path, tiny_run):
    def meanwhile(line):
        with pytest.raises(UserError, match="is being written by"):
            tiny_run(tmp_path, resume=True)
    tiny_run(tmp_path)
    assert tiny_run(tmp_path, overwrite=True, say=meanwhile).finished


def test_a_run_that_ended_while_another_waited_is_kept(tmp_path, tiny_run, monkeypatch):
    tiny_run(tmp_path / "done")
    load, out = train.load_corpus, tmp_path / "out"

    def long(run):
        shutil.copytree(tmp_path / "done", out)
        return load(run)
    monkeypatch.setattr(train, "load_corpus", long)
    with pytest.raises(UserError, match="already holds a run"):
        tiny_run(out)
    assert files(out) == files(tmp_path / "done")


# ---------------------------------------------------------------- what a run depends on

def test_evaluation_does_not_change_training(tmp_path, tiny_run):
    tiny_run(tmp_path / "few", steps=4)
    tiny_run(tmp_path / "many", steps=4, evals=30)
    assert same(saved(tmp_path / "few")["model"], saved(tmp_path / "many")["model"])


def test_the_variants_share_their_batches(tmp_path, tiny_run):
    """Whoever compares them compares nothing but the attention."""
    for attn in ATTENTIONS:
        tiny_run(tmp_path / attn, attn=attn, steps=2)
        drawn = saved(tmp_path / attn)["batches"]
        assert torch.equal(drawn, saved(tmp_path / "softmax")["batches"])


def test_the_model_learns(tmp_path, tiny_run, book):
    """On a text of one line over and over little is left to guess."""
    log = tiny_run(tmp_path, data=book, steps=100).log
    assert log[0]["val_loss"] == pytest.approx(math.log(257), abs=0.5)
    assert log[-1]["val_loss"] < 3


def test_the_first_step_of_adamw(tmp_path, tiny_run):
    """lr times the sign of the gradient, after a decay of the matrices alone. The gradient was
    clipped to length 1, and the moments have a tenth of it and a twentieth of its square."""
    model = tiny_run(tmp_path, steps=1, warmup=0, lr=1e-2, weight_decay=0.5,
                     initializer_range=1.0).model
    trained = model.state_dict()
    for name, w in GPT(model.cfg, seed=0).state_dict().items():
        kept = w * (1 - 0.5e-2) if w.dim() > 1 else w
        moved = (trained[name] - kept).abs().max()
        assert moved == pytest.approx(1e-2, rel=1e-2), name
    moments = saved(tmp_path)["optimizer"]["state"].values()
    assert sum(m["exp_avg"].square().sum() for m in moments) == pytest.approx(0.1**2, rel=1e-3)
    assert sum(m["exp_avg_sq"].sum() for m in moments) == pytest.approx(0.05, rel=1e-3)


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    run = train.resolve(Run(steps=1000, warmup=100, lr=1.0))
    rates = [train.learning_rate(step, run) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1, abs=0.03)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_without_a_compiler_nothing_is_compiled(tmp_path, tiny_run, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: lambda *x: 1 / 0)
    assert tiny_run(tmp_path, hidden_size=128, steps=1).run.compile is False


# ---------------------------------------------------------------- what a run leaves and says

def test_files_of_a_run(tmp_path, tiny_run, book, monkeypatch):
    monkeypatch.setattr(train, "draw_curve", draw_curve)
    tiny_run(tmp_path, data=book, evals=2)
    assert files(tmp_path).keys() == {"config.json", "curve.png", "film.npz", "log.jsonl",
                                      "model.pt"}
    assert files(tmp_path)["curve.png"].startswith(b"\x89PNG")
    log = read_log(tmp_path)
    assert [row["step"] for row in log] == [0, 6, 10, 12]  # evenly, and more at the birth
    keys = {number.key for number in probe.metrics()}
    assert log[-1]["links"].keys() == log[-1]["links_bos"].keys() == keys
    model, *_ = train.load_run(tmp_path)
    assert same(model.state_dict(), saved(tmp_path)["model"])


def test_a_run_of_rest_that_has_not_learned_is_no_evidence(tmp_path, capsys):
    """By default heads must rest, and committed seeds of softmax stand beside the run."""
    words = ["--attn=headnorm", "--steps=2", "--evals=1", f"--out={tmp_path}"]
    assert train.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("headnorm has not learned the task")
    assert any("under softmax, default settings (5 seeds" in line for line in said)


@pytest.mark.parametrize("attn, weight, begins, ends", [
    ("softmax", 0.9, "rests on the first token with 90% of its attention", "a sink"),
    ("softmax", 0.2, "rests on the first token with 20% of its attention", "no sink"),
    ("headnorm", 0.5, "takes 5", "below softmax's 2.1052 (sd 0.0018)"),
    ("gated", 0.0, "ends softmax's sink", "below softmax's 2.1052 (sd 0.0018)")])
def test_a_run_of_rest_that_has_learned_ends_beside_softmax(tmp_path, monkeypatch, attn, weight,
                                                            begins, ends):
    state = train.train(Run(attn=attn, steps=1, evals=1, out=tmp_path), say=lambda line: None)
    assert train.load_run(tmp_path)[0].cfg.readout == "attn_out"
    monkeypatch.setattr(state.corpus.task, "optimal_loss", lambda x: 1.0)
    state.log[-1]["val_loss"] = 1.0  # softmax's committed seeds end above 2
    monkeypatch.setattr(probe, "resting_weight", lambda *_: [weight] * 4)
    state.run.steps = train.SIZES["rest"]["steps"]
    told, verdict = train.rest_story(state)
    assert verdict.startswith(begins)
    assert verdict.endswith(ends)
    assert f"  {weight:.2f}   under {attn}, here" in told
    assert f"  {weight:.2f}   under softmax, default" not in told
    usual = state.run
    for other in ({"seq_len": 12}, {"lr": 0.01}):  # softmax's committed seeds are not such
        state.run = replace(usual, **other)
        verdict = train.rest_story(state)[1]
        assert "softmax's sink" not in verdict
        assert attn == "softmax" or "(not compared" in verdict


@pytest.mark.parametrize("sink, says", [(0.9, "has a sink"), (0.1, "has no sink")])
def test_any_other_run_ends_with_its_sink(tmp_path, tiny_run, sink, says):
    state = tiny_run(tmp_path, steps=1)
    state.log[-1]["links_bos"]["sink"] = sink
    assert train.sink_story(state)[1].startswith(says)


@pytest.mark.parametrize("wrong", [{"size": "tinny"}, {"attn": "sofmax"}])
def test_a_name_that_does_not_exist_is_refused(wrong):
    with pytest.raises(UserError, match="must be one of"):
        train.resolve(Run(**wrong))


def test_rest_has_no_bos_in_any_size():
    assert train.resolve(train.Run(size="tiny", data="rest")).bos == 0


def half_written(state, path):
    Path(path).write_bytes(b"the first half")
    raise RuntimeError("PytorchStreamWriter failed writing file data/7\n at somewhere")


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place, name, broken", [
    (torch, "save", half_written), (os, "fsync", no_space), (os, "replace", no_space)])
def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, interrupt_at, tiny_run,
                                            place, name, broken):
    interrupt_at(3)
    tiny_run(tmp_path)
    before = files(tmp_path)["model.pt"]
    with monkeypatch.context() as m, pytest.raises(UserError, match="could not write"):
        m.setattr(place, name, broken)
        tiny_run(tmp_path, resume=True)
    assert files(tmp_path)["model.pt"] == before
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("evals, stop", [(30, 99), (1, 99), (1, 4)],
                         ids=["evaluation", "loss", "save"])
def test_what_is_no_longer_finite_stops_the_run(tmp_path, monkeypatch, interrupt_at, tiny_run,
                                                evals, stop):
    """The first gradient is nan. It is found at the next evaluation, loss, or save."""
    interrupt_at(stop)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda p, n: next(iter(p)).grad.fill_(math.nan))
    with pytest.raises(UserError, match="no longer finite .* smaller --lr"):
        tiny_run(tmp_path, evals=evals)
    assert all(p.isfinite().all() for p in saved(tmp_path)["model"].values())


def test_numbers_of_the_chain_may_be_missing(tmp_path, monkeypatch):
    chain = probe.chain
    monkeypatch.setattr(probe, "chain", lambda *a, **kw: dict.fromkeys(chain(*a, **kw), math.nan))
    assert train.main(tiny_flags(tmp_path)) == 0
    assert set(read_log(tmp_path)[-1]["links"].values()) == {None}


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["softmax", "sigmoid"])
def test_compiled_steps_are_those_of_plain_ones(tmp_path, tiny_run, attn):
    """From a width of 128 on by default: nearly the same weights, and one that can be opened."""
    wide = dict(attn=attn, hidden_size=128, intermediate_size=344, lr=1e-3)
    fast = tiny_run(tmp_path / "fast", **wide)
    plain = tiny_run(tmp_path / "plain", **wide, compile=False)
    assert fast.run.compile
    assert fast.log[-1]["val_loss"] < fast.log[0]["val_loss"] - 0.1
    for a, b in zip(fast.log, plain.log):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=0.02)
    GPT.from_run(tmp_path / "fast")


def start(words):
    """train.main in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=train.main, args=[words])
    process.start()
    return process


@pytest.mark.slow
def test_sigkill_loses_nothing(tmp_path):
    """SIGKILL, 60 times, half of them while a file is being written; the end is the same bits."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    model, resume = out / "model.pt", ["--resume", str(out)]
    long, dice = dict(steps=400, evals=400), random.Random(0)
    step = midway = 0

    def changed():
        return model.stat().st_mtime_ns if model.exists() else None

    for number in range(60):
        begun, since = (out / "config.json").exists(), changed()
        process = start(resume if begun else tiny_flags(out, **long))
        while number % 4 and changed() == since and process.is_alive():
            time.sleep(0.001)  # from the first save on; every fourth time whenever
        time.sleep(dice.uniform(0, 0.05))
        while number % 2 and not list(out.glob("*.part")) and process.is_alive():
            pass  # aim at a write
        process.kill()
        process.join()
        midway += any(out.glob("*.part"))
        if model.exists():
            before, step = step, load_checkpoint(model)["step"]
            assert step >= before, "a save that had succeeded is gone"
    assert step >= 44  # 45 times a save was waited for, the first of them of step 0
    assert midway > 10
    for words in (resume, tiny_flags(whole, **long)):
        start(words).join()
    assert same_runs(whole, out)
    assert not list(out.glob("*.part"))


# ---------------------------------------------------------------- whatever surrounds it

def test_what_a_notebook_has_set_changes_nothing(tmp_path, tiny_run, request):
    plain, here = tmp_path / "plain", tmp_path / "here"
    tiny_run(plain, steps=2)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    for surroundings in (torch.no_grad(), torch.inference_mode(), torch.device("meta")):
        with surroundings:
            left = torch.get_default_dtype(), torch.is_grad_enabled()
            tiny_run(here, overwrite=True, steps=2)
            assert left == (torch.get_default_dtype(), torch.is_grad_enabled())
        assert same_runs(plain, here)


def test_the_places_can_be_moved(monkeypatch):
    """A clone that nobody may write to stays as it is."""
    monkeypatch.setenv("ATTENTION_SINK_CACHE", "/elsewhere")
    monkeypatch.setenv("ATTENTION_SINK_OUT", "~/sinks")
    moved = runpy.run_path(common.__file__)
    assert moved["CACHE"] == Path("/elsewhere")
    monkeypatch.setattr(train, "OUT", moved["OUT"])
    assert train.resolve(Run()).out == str(Path.home() / "sinks/softmax")
