"""What the chapters share: exercises, tables, figures, and where it works."""

import contextlib
import os
import signal
import sys
import types
from dataclasses import replace
from pathlib import Path

import lesson
import pytest
import torch

import probe
import train
from data.common import UserError
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent
CHECKS = """
from lesson import written_without

def half(answer):
    written_without(answer, "sink_score")
    assert answer(4) == 2, "Half of 4 is 2."

def prediction(answer):
    assert answer["row"] == "lock", "Look again."
"""


def not_yet(x):
    """Half of x."""
    ...


def borrowed(x):
    return [probe.sink_score for _ in "a"]


def broken(x):
    return x.nothing


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """check(exercise, answer) of a chapter 99 -> what it prints."""
    (tmp_path / "99.py").write_text(CHECKS)
    monkeypatch.setattr(lesson, "CHECKS", tmp_path)

    def said(exercise, answer):
        lesson.check(f"99.{exercise}", answer)
        return capsys.readouterr().out
    return said


@pytest.mark.parametrize("exercise, answer, says", [
    ("half", not_yet, "half: not yet."), ("half", None, "not yet."), ("half", ..., "not yet."),
    ("half", lambda x: x, "half: not right. Half of 4 is 2."), ("half", 0, "not right."),
    ("half", [torch.zeros(2), 1], "not right."), ("half", lambda x: x / 2, "half: solved"),
    ("half", lambda x: borrowed(x) and x / 2, "calls sink_score"),
    ("half", lambda: 0, "not right. TypeError"), ("prediction", {"row": ...}, "not yet."),
    ("prediction", {"row": "sink"}, "Look again."), ("prediction", {"row": "lock"}, "solved")])
def test_check_says_what_is_missing(check, exercise, answer, says):
    out = check(exercise, answer)
    assert says in out and out.count("\n") == 1


def test_a_mistake_shows_the_students_frames_and_no_others(check):
    out = check("half", lambda x: broken(x))
    assert out.startswith("half: a mistake in your code\n") and out.count("  File ") == 2
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


def test_show_saves_in_a_script_and_displays_in_a_notebook(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lesson, "ROOT", tmp_path)
    lesson.show(lesson.plt.figure(), "00_nothing", "an empty figure")
    assert (tmp_path / "out/chapters/00_nothing.png").exists()
    assert "00_nothing.png: an empty figure" in capsys.readouterr().out
    shown = []
    display = types.SimpleNamespace(display=lambda data, **how: shown.append(how["metadata"]))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(lesson, "notebook", lambda: True)
    lesson.show(lesson.plt.figure(figsize=(5, 3)), "00_nothing", "an empty figure")
    assert shown[0]["image/png"] == {"alt": "an empty figure", "width": 480}
    assert not lesson.plt.get_fignums()  # nothing that the notebook would show a second time


def test_beside_is_a_table(capsys):
    lesson.beside(("tau of W_O", 0.32, 0.123456))
    assert capsys.readouterr().out == ("            the paper  this run\n"
                                       "tau of W_O  0.32       0.123\n")


@pytest.mark.parametrize("kind", ["bos", "copy", "rest"])
def test_windows_for_the_small_models(kind):
    x, y = lesson.windows(kind, 4)
    assert x.shape == y.shape == (4, 64) and (x[:, 1:] == y[:, :-1]).all()
    assert (x[:, 0] == 256).all() == (kind == "bos") and (lesson.windows(kind, 4)[0] == x).all()


def test_english_lies_end_to_end(monkeypatch):
    """Whatever the tokenizer: here a letter is a token."""
    letters = types.SimpleNamespace(encode_ordinary=lambda text: list(map(ord, text)))
    monkeypatch.setattr(lesson, "real", lambda: (None, letters))
    batches = [lesson.english(8, 64, batch)[0] for batch in (0, 1)]
    windows = torch.stack(batches, 1).flatten().tolist()
    assert "".join(map(chr, windows[:128])) == lesson.of_text.english()[:128]


def test_runs_live_in_out_of_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, run in lesson.RUNS.items():
        assert train.resolve(run).out == f"out/{name}"
        assert Path(lesson.placed(name).out).resolve() == ROOT / "out" / name


def test_what_is_missing_is_trained_and_nothing_else(tmp_path, capsys):
    a, b = (train.Run(**{**TINY, "seed": n, "out": f"{tmp_path}/{n}"}) for n in (0, 1))
    for says in (f"training {a.out}, {b.out}, about 1 minute\n", ""):
        lesson.trained(a, b)
        assert capsys.readouterr().out == says
    with pytest.raises(UserError, match="holds a run with --steps 12, not 13"):
        lesson.trained(replace(a, steps=13))
    with pytest.raises(UserError, match="train.py: .*holds files that are no run"):
        lesson.trained(replace(a, out=str(tmp_path)))  # what the other process says


def test_an_interrupt_saves_all(tmp_path, monkeypatch):
    """Ctrl-C while the one line shows both at work; then they go on."""
    runs = [train.Run(**{**TINY, "steps": 10**6, "evals": 1, "seed": n, "out": f"{tmp_path}/{n}"})
            for n in (0, 1)]

    def show(text):
        if text.count("to go") == 2 and not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGINT))
    line = types.SimpleNamespace(set_description_str=show)
    monkeypatch.setattr(lesson, "bar", lambda **_: contextlib.nullcontext(line))
    before = (0, 0)
    for _ in range(2):
        stopped = []
        with pytest.raises(UserError, match="run it again to go on"):
            lesson.trained(*runs)
        steps = [train.load_checkpoint(f"{run.out}/model.pt")["step"] for run in runs]
        assert steps[0] > before[0] and steps[1] > before[1]
        before = steps
