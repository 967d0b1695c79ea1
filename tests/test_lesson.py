"""What the chapters share: exercises, tables, figures, and the trainings."""

import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import lesson
import pytest
import torch

import probe
import train
from data.common import UserError
from data.runs import load_checkpoint
from tests.conftest import TINY
from tests.tiny import tiny_model


def not_yet(pattern, k):
    ...


def right(pattern, k):
    return pattern[k:, k].mean()


def wrong(pattern, k):
    return pattern[:, k].mean()


def borrowed(pattern, k):
    return probe.sink_score(pattern, k)


@torch.no_grad()
def broken(pattern, k):
    return wrong(pattern, k).nothing


@pytest.mark.parametrize("answer, says", [
    (not_yet, "not yet."),
    ([...], "not yet."),
    (wrong, "not right. Queries before k cannot see it"),
    (borrowed, "answer calls sink_score"),
    (right, "solved")])
def test_check_says_what_is_missing(capsys, answer, says):
    lesson.check("00.sink_score", answer)
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith("sink_score: ")
    assert says in line


def test_a_mistake_shows_the_students_lines_and_no_others(capsys):
    lesson.check("00.sink_score", broken)
    out = capsys.readouterr().out
    assert out.startswith("sink_score: a mistake in your code\n")
    assert out.count("  File ") == 1
    assert out.endswith("AttributeError: 'Tensor' object has no attribute 'nothing'\n")


@pytest.mark.parametrize("error, line", [
    (UserError("no disk"), "no disk"), (KeyboardInterrupt(), "stopped; run this cell again")])
def test_errors_end_in_one_line(monkeypatch, error, line):
    with pytest.raises(SystemExit, match=line), lesson.in_one_line():
        raise error
    monkeypatch.setattr(lesson, "notebook", lambda: True)
    with pytest.raises(lesson.Stop, match=line), lesson.in_one_line():
        raise error


@pytest.mark.parametrize("prediction, stops", [(..., True), ([...], True), (3, False)])
def test_a_notebook_waits_for_a_prediction(monkeypatch, prediction, stops):
    lesson.ask(prediction)  # a script goes on
    monkeypatch.setattr(lesson, "notebook", lambda: True)
    with pytest.raises(lesson.Stop) if stops else nullcontext():
        lesson.ask(prediction)
    monkeypatch.setenv("ATTENTION_SINK_BOOK", "1")
    lesson.ask(prediction)


def test_a_script_saves_its_figures(monkeypatch, tmp_path):
    monkeypatch.setattr(lesson, "ROOT", tmp_path)
    lesson.show(lesson.plt.figure(), "00_nothing", "an empty figure")
    assert (tmp_path / "out/chapters/00_nothing.png").exists()


@pytest.mark.parametrize("kind", ["bos", "text", "copy", "quiet"])
def test_windows_for_the_small_models(kind):
    x, y = lesson.windows(kind, 4)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert (x[:, 0] == 256).all() == (kind == "bos")


def test_windows_of_letters_have_no_trigger():
    x, _ = lesson.windows("letters", 64)
    assert x.shape == (64, 16) and x.max() == lesson.TASK.K - 1


@pytest.mark.parametrize("draw", [lesson.english, lesson.random_tokens])
def test_another_batch_or_seed_has_other_windows(monkeypatch, draw):
    tokenizer = Mock(encode_ordinary=lambda text: range(2000))
    monkeypatch.setattr(lesson, "real", lambda: (tiny_model(), tokenizer))
    assert not torch.equal(*(draw(2, 16, i)[0] for i in (0, 1)))


def test_runs_live_in_out_of_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in lesson.RUNS:
        assert Path(lesson.placed(name).out).resolve().parent == lesson.ROOT / "out"


def test_what_is_missing_is_trained_and_nothing_else(tiny_run, tmp_path, monkeypatch):
    done, killed, new = (train.Run(**TINY, out=str(tmp_path / str(i))) for i in range(3))
    tiny_run(done.out)
    tiny_run(killed.out)
    Path(killed.out, "model.pt").unlink()
    popen = Mock(side_effect=lambda *_, **how: Mock(returncode=0))
    monkeypatch.setattr(lesson.subprocess, "Popen", popen)
    lesson.trained(done, killed, new)
    first, second = (call.args[0][2:] for call in popen.call_args_list)
    assert train.parse(first)["resume"] == killed.out
    assert train.resolve(train.Run(**train.parse(second))) == train.resolve(new)
    with pytest.raises(UserError, match="holds a run with --steps 12, not 13"):
        lesson.trained(replace(done, steps=13))


@pytest.mark.slow
def test_an_interrupt_saves(tmp_path):
    run = train.Run(**TINY | dict(steps=10**6, evals=1), out=str(tmp_path / "run"))
    saved = tmp_path / "run/model.pt"

    def interrupt():
        while not saved.exists():
            time.sleep(0.1)
        time.sleep(1)  # some steps
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        lesson.trained(run)
    assert load_checkpoint(saved)["step"] > 0
