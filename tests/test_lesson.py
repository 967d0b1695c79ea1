"""What the chapters share: exercises, tables, figures, and the trainings."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import lesson
import pytest
import torch

import probe
import train
from data.common import UserError
from data.runs import load_checkpoint
from tests.conftest import TINY

CHECKS = """
from lesson import written_without

def half(answer):
    written_without(answer, "sink_score")
    assert answer(4) == 2, "Half of 4 is 2."
"""


def not_yet(x):
    ...


def borrowed(x):
    return x / 2 or probe.sink_score


def broken(x):
    return x.nothing


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """check(answer) to exercise `half` -> what it prints."""
    def said(answer):
        lesson.check("99.half", answer)
        return capsys.readouterr().out

    (tmp_path / "99.py").write_text(CHECKS)
    monkeypatch.setattr(lesson, "CHECKS", tmp_path)
    return said


@pytest.mark.parametrize("answer, says", [
    (not_yet, "not yet."), (..., "not yet."), ([...], "not yet."), ({"row": ...}, "not yet."),
    (lambda x: 5, "not right. Half of 4 is 2."), (lambda: 0, "not right. TypeError"),
    ([torch.zeros(2), 1], "not right. AttributeError"), (borrowed, "answer calls sink_score"),
    (lambda x: x / 2, "solved")])
def test_check_says_what_is_missing(check, answer, says):
    out = check(answer)
    assert out.startswith("half: ")
    assert says in out
    assert out.count("\n") == 1


def test_a_mistake_shows_the_students_lines_and_no_others(check):
    out = check(torch.no_grad()(lambda x: broken(x)))
    assert out.startswith("half: a mistake in your code\n")
    assert out.count("  File ") == 2
    assert out.endswith("AttributeError: 'int' object has no attribute 'nothing'\n")


@pytest.mark.parametrize("error", [UserError("no disk"), KeyboardInterrupt()])
def test_errors_end_in_one_line(monkeypatch, error):
    line = str(error) or "stopped; run this cell again to go on"
    with pytest.raises(SystemExit, match=line), lesson.in_one_line():
        raise error
    monkeypatch.setattr(lesson, "notebook", lambda: True)
    with pytest.raises(lesson.Stop) as stopped, lesson.in_one_line():
        raise error
    assert stopped.value._render_traceback_() == [line]


def test_a_script_saves_its_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lesson, "ROOT", tmp_path)
    lesson.show(lesson.plt.figure(), "00_nothing", "an empty figure")
    assert (tmp_path / "out/chapters/00_nothing.png").exists()
    assert "00_nothing.png: an empty figure" in capsys.readouterr().out


def test_beside_is_a_table(capsys):
    lesson.beside(("tau of W_O", 0.32, 0.123456))
    assert capsys.readouterr().out == ("            the paper  this run\n"
                                       "tau of W_O  0.32       0.123\n")


@pytest.mark.parametrize("kind", ["bos", "text", "copy", "rest"])
def test_windows_for_the_small_models(kind):
    x, y = lesson.windows(kind, 4)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert (x[:, 0] == 256).all() == (kind == "bos")


def test_runs_live_in_out_of_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in lesson.RUNS:
        assert Path(lesson.placed(name).out).resolve() == lesson.ROOT / "out" / name


def test_what_is_missing_is_trained_and_nothing_else(tmp_path, capsys):
    a, b = (train.Run(**{**TINY, "seed": n, "out": f"{tmp_path}/{n}"}) for n in (0, 1))
    lesson.trained(a, b)
    Path(b.out, "model.pt").unlink()
    lesson.trained(a, b)  # which goes on with b
    lesson.trained(a, b)
    assert capsys.readouterr().out == (f"training {a.out}, {b.out}: 1 to 3 minutes\n"
                                       f"training {b.out}: 1 to 3 minutes\n")
    with pytest.raises(UserError, match="holds a run with --steps 12, not 13"):
        lesson.trained(replace(a, steps=13))
    with pytest.raises(UserError, match="train.py: .*holds files that are no run"):
        lesson.trained(replace(a, out=str(tmp_path)))  # the last line of its stderr


def test_an_interrupt_saves_all(tmp_path):
    folders = [tmp_path / "0", tmp_path / "1"]
    runs = [train.Run(**TINY | dict(steps=10**6, evals=1, out=str(out))) for out in folders]

    def interrupt():
        while not all((folder / "model.pt").exists() for folder in folders):
            time.sleep(0.1)
        time.sleep(1)  # some steps
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        lesson.trained(*runs)
    for folder in folders:
        assert load_checkpoint(folder / "model.pt")["step"] > 0
