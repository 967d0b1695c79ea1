"""What the chapters share: exercises, tables, figures, and where it works."""

import contextlib
import os
import signal
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import probe
import train
from data.border import UserError
from tests.conftest import TINY

CHAPTERS = Path(__file__).parent.parent / "chapters"


@pytest.fixture(scope="module")
def lesson():
    """As a chapter imports it."""
    sys.path.insert(0, str(CHAPTERS))
    import lesson
    yield lesson
    sys.path.remove(str(CHAPTERS))


@pytest.fixture
def exercise(lesson, tmp_path, monkeypatch):
    """A chapter 99 with checks: half(x), and a value."""
    (tmp_path / "99.py").write_text(
        "from lesson import written_without\n"
        "def half(answer):\n"
        "    written_without(answer, 'sink_score')\n"
        "    assert answer(4) == 2, 'Half of 4 is 2.'\n"
        "def prediction(answer):\n"
        "    assert answer['row'] == 'lock', 'Look again.'\n")
    monkeypatch.setattr(lesson, "CHECKS", tmp_path)


def not_yet(x):
    """Half of x."""
    ...


def wrong(x):
    return x


def right(x):
    return x / 2


def broken(x):
    return helper(x)


def helper(x):
    return x.nothing


def nested(x):
    def inner():
        return probe.sink_score
    return x / 2


def through_a_helper(x):
    return borrowed(x)


def borrowed(x):
    from probe import sink_score
    return x / 2


@pytest.mark.parametrize("answer, says", [
    (not_yet, "half: not yet."), (None, "half: not yet."), (..., "half: not yet."),
    (wrong, "half: not right. Half of 4 is 2."), (right, "half: solved"),
    (nested, "your answer calls sink_score"), (through_a_helper, "your answer calls sink_score"),
    (lambda: 0, "not right. TypeError"), (7, "not right.")])
def test_check_says_what_is_missing(lesson, exercise, capsys, answer, says):
    lesson.check("99.half", answer)
    out = capsys.readouterr().out
    assert says in out and out.count("\n") == 1


def test_a_mistake_shows_the_students_frames_and_no_others(lesson, exercise, capsys):
    lesson.check("99.half", broken)
    out = capsys.readouterr().out
    assert out.startswith("half: a mistake in your code\n")
    assert "in broken" in out and "in helper" in out and out.count("  File ") == 2
    assert out.endswith("AttributeError: 'int' object has no attribute 'nothing'\n")


@pytest.mark.parametrize("answer, says", [
    ({"row": ...}, "not yet"), ({"row": "sink"}, "Look again."), ({"row": "lock"}, "solved")])
def test_a_value_is_checked_too(lesson, exercise, capsys, answer, says):
    lesson.check("99.prediction", answer)
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("answer", [torch.zeros(2), [torch.zeros(2), 1], "none", 0, False])
def test_what_has_a_value_is_an_answer(lesson, answer):
    assert not lesson.unsolved(answer)


@pytest.mark.parametrize("error", [UserError("no disk"), KeyboardInterrupt()])
def test_errors_end_in_one_line(lesson, monkeypatch, error):
    line = str(error) or "stopped; run this cell again to go on"
    with pytest.raises(SystemExit, match=line), lesson.in_one_line():
        raise error
    monkeypatch.setattr(lesson, "notebook", lambda: True)
    with pytest.raises(lesson.Stop) as stopped, lesson.in_one_line():
        raise error
    assert stopped.value._render_traceback_() == [line]


def test_show_saves_in_a_script_and_displays_in_a_notebook(lesson, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lesson, "ROOT", tmp_path)
    lesson.show(lesson.plt.figure(), "00_nothing", "an empty figure")
    assert (tmp_path / "out" / "chapters" / "00_nothing.png").exists()
    assert "00_nothing.png: an empty figure" in capsys.readouterr().out
    shown = []
    display = types.SimpleNamespace(display=lambda *a, **k: shown.append((a, k)))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(lesson, "notebook", lambda: True)
    lesson.show(lesson.plt.figure(figsize=(5, 3)), "00_nothing", "an empty figure")
    (data,), how = shown[0]
    assert data["image/png"][:4] == b"\x89PNG"
    assert how["metadata"]["image/png"] == {"alt": "an empty figure", "width": 480}
    assert not lesson.plt.get_fignums()  # nothing that the notebook would show a second time


def test_beside_is_a_table(lesson, capsys):
    lesson.beside(("tau of W_O", 0.32, 0.123456), ("longest", "not reported", "token 0"))
    assert capsys.readouterr().out.splitlines() == [
        "            the paper     this run", "tau of W_O  0.32          0.123",
        "longest     not reported  token 0"]


@pytest.mark.parametrize("kind", ["bos", "text", "copy", "rest"])
def test_windows_for_the_small_models(lesson, kind):
    x, y = lesson.windows(kind, 4)
    assert x.shape == y.shape == (4, 64) and (x[:, 1:] == y[:, :-1]).all()
    assert ((x[:, 0] == 256).all().item()) == (kind == "bos")
    assert (lesson.windows(kind, 4)[0] == x).all()


def test_english_lies_end_to_end(lesson, monkeypatch):
    """Whatever the tokenizer: here a letter is a token."""
    text = lesson.of_text.english()
    letters = types.SimpleNamespace(encode_ordinary=lambda text: list(map(ord, text)))
    monkeypatch.setattr(lesson, "real", lambda: (None, letters))
    batches = (len(text) - 1) // (8 * 64)
    first, second = (lesson.english(8, 64, batch) for batch in (0, 1))
    assert "".join(map(chr, first[0][0])) == text[:64]
    assert "".join(map(chr, first[1][0])) == text[1:65]
    assert "".join(map(chr, second[0][2])) == text[64 * (1 + 2 * batches):][:64]
    with pytest.raises(SystemExit, match="too few for 1 windows"):
        lesson.english(1, 10**6)


def test_runs_live_in_out_of_the_repository(lesson, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in lesson.RUNS:
        assert Path(lesson.placed(name).out).resolve() == CHAPTERS.parent / "out" / name
    run = train.resolve(train.Run())
    assert Path(lesson.placed("softmax").out).resolve() == CHAPTERS.parent / run.out


# ---------------------------------------------------------------- several trainings

def test_what_is_missing_is_trained_and_nothing_else(lesson, tmp_path, capsys):
    a, b = (train.Run(**{**TINY, "seed": n, "out": str(tmp_path / f"{n}")}) for n in (0, 1))
    lesson.trained(a, b)
    assert capsys.readouterr().out == f"training {a.out}, {b.out}, about 1 minute\n"
    before = (tmp_path / "0/model.pt").stat().st_mtime_ns
    lesson.trained(a, b)
    assert capsys.readouterr().out == ""
    assert (tmp_path / "0/model.pt").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds a run with --steps 12, not 13"):
        lesson.trained(replace(a, steps=13))
    (tmp_path / "new").mkdir()
    (tmp_path / "new/notes").touch()  # what the other process says reaches the caller
    with pytest.raises(UserError, match="new: train.py: .*holds files that are no run"):
        lesson.trained(replace(a, out=str(tmp_path / "new")))


def test_an_interrupt_saves_all(lesson, tmp_path, monkeypatch):
    """Ctrl-C while the one line shows both at work; then they go on."""
    runs = [train.Run(**{**TINY, "steps": 10**6, "evals": 1, "seed": n, "out": f"{tmp_path}/{n}"})
            for n in (0, 1)]

    def show(text):
        if text.count("to go") == 2 and not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGINT))
    line = types.SimpleNamespace(set_description_str=show)
    monkeypatch.setattr(lesson, "bar", lambda **_: contextlib.nullcontext(line))
    for before in (0, 5):
        stopped = []
        with pytest.raises(UserError, match="run it again to go on"):
            lesson.trained(*runs)
        steps = [train.load_checkpoint(f"{run.out}/model.pt")["step"] for run in runs]
        assert min(steps) > before
