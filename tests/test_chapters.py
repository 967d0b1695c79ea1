"""The chapters: their form, their exercises and solutions, the book that is made of them, and every
one of them run in a real Jupyter kernel."""

import contextlib
import re
from pathlib import Path

import jupytext
import lesson
import pytest

from chapters import book
from data.common import UserError
from tests import real

CHAPTERS = book.chapters()
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


def read(path):
    return path.read_text(encoding="utf-8")


def exercises(path) -> list[str]:
    return re.findall(r'^ *check\("\d\d\.(\w+)"', read(path), flags=re.M)


# ---------------------------------------------------------------- exercises

class NeedsModel(BaseException):
    """The check or the solution opens a model: it is tried in the kernel below."""


@every_chapter
def test_stubs_are_open_and_solutions_pass(path, monkeypatch, capsys):
    def opened(*_, **how):
        raise NeedsModel
    for name in ("real", "models", "windows", "english", "random_tokens"):
        monkeypatch.setattr(lesson, name, opened)
    solved = {}
    with contextlib.suppress(NeedsModel):
        exec(read(path.parent / "solutions" / path.name), solved)
    assert "prediction" in exercises(path)
    for name in exercises(path):
        stub = rf"^(def {name}\(.*\):\n    \.\.\.$|{name} = [^#]*\.\.\.)"
        assert re.search(stub, read(path), flags=re.M), name
        with contextlib.suppress(NeedsModel):
            lesson.check(f"{path.stem[:2]}.{name}", solved[name] if name in solved else opened())
            assert capsys.readouterr().out == f"{name}: solved\n"


# ---------------------------------------------------------------- the book

def test_the_book_shows_the_chapters():
    assert book.stale() == [], "run python -m chapters.book with these numbers"


@every_chapter
def test_github_shows_the_formulas(path):
    """It refuses the macro, and takes a backslash before a sign in $..$ for Markdown's."""
    page = read(book.BOOK / f"{path.stem[:2]}.md")
    prose = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    assert "operatorname" not in page
    assert "$$" not in prose
    assert not re.search(r"\$[^$]*\\[^a-zA-Z\s][^$]*\$", prose)


@every_chapter
def test_figures_of_the_book(path):
    text = read(book.BOOK / f"{path.stem[:2]}.md")
    named = re.findall(r'^<img src="([^"]+)" width="\d+" alt="[^"]+">$', text, flags=re.M)
    assert len(named) == text.count("<img")
    assert set(named) == {p.name for p in book.BOOK.glob(f"{path.stem[:2]}_*")}


TINY = '''# %% [markdown]
# # 00 · A tiny chapter
#
# **Claim.** It is [one](00_tiny.py), see [probe](../probe.py).
#
# **You need** nothing.

# %%
import sys
from lesson import plt, show
print("three", end="  \\n\\n")
print("a bar", file=sys.stderr)
3 - 2

# %%
show(plt.figure(figsize=(2, 1)), "00_dot", 'a "dot" < 2')
'''
TEXT = "3 - 2\n```\n\n```text\nthree\n\n1\n```\n\n```python\n"
FIGURE = '\n\n<img src="00_dot.png" width="192" alt="a &quot;dot&quot; &lt; 2">\n'


@pytest.fixture
def tiny_chapter(tmp_path, monkeypatch):
    monkeypatch.setattr(book, "HERE", tmp_path)
    monkeypatch.setattr(book, "BOOK", tmp_path / "book")
    monkeypatch.setenv("PYTHONPATH", str(Path(lesson.__file__).parent))
    return tmp_path / "00_tiny.py"


def test_a_book_is_made_without_a_chapter_that_fails(tiny_chapter):
    tiny_chapter.write_text(TINY)
    fails = tiny_chapter.with_name("01_fails.py")
    fails.write_text(TINY.replace("from lesson import plt, show", "1 / 0"))
    with pytest.raises(UserError, match="01_fails.py stops at the cell above"):
        book.make([tiny_chapter, fails])  # side by side
    for part in ("](00.md), see [probe](../../probe.py)", TEXT, FIGURE):
        assert part in read(book.BOOK / "00.md")
    assert (book.BOOK / "00_dot.png").exists()
    assert not (book.BOOK / "01.md").exists()
    book.make([])
    assert book.stale() == ["01"]
    tiny_chapter.write_text(TINY.replace("3 - 2", "2 - 1"))
    assert book.stale() == ["00", "01"]


# ---------------------------------------------------------------- slow: everything for real

@pytest.mark.slow
@every_chapter
def test_runs_in_a_kernel(path):
    """From the first cell to the last; then its solutions are checked in that kernel. The models
    of all chapters are trained first, two at a time, where they are missing."""
    real.folder()
    book.prepare(book.chapters())
    notebook = jupytext.read(path)
    checks = [f'check("{path.stem[:2]}.{name}", {name})' for name in exercises(path)]
    source = "\n".join([f"exec(open('solutions/{path.name}').read())", *checks])
    last = jupytext.reads(source, fmt="py:percent").cells[0]
    notebook.cells.append(last)
    book.execute(path, notebook)
    for name in exercises(path):
        assert f"{name}: solved" in str(last.outputs)
