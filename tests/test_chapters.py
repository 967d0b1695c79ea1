"""The chapters: their form, their exercises and solutions, the book that is made of them, and every
one of them run in a real Jupyter kernel."""

import ast
import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jupytext
import lesson
import pytest

from chapters import book
from data.common import UserError
from tests import real

ROOT = Path(__file__).parent.parent
CHAPTERS = book.chapters()
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


def read(path):
    return path.read_text(encoding="utf-8")


def exercises(path) -> list[str]:
    return re.findall(r'^ *check\("\d\d\.(\w+)"', read(path), flags=re.M)


def shown(text, pattern=r"^ *show\("):
    return len(re.findall(pattern, text, flags=re.M))


def test_jupytext_keeps_every_chapter():
    command = [sys.executable, "-m", "jupytext", "--test", "--to", "ipynb", *map(str, CHAPTERS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@every_chapter
def test_a_chapter_is_read_in_one_sitting(path):
    """At most 310 lines and ten assertions; a cell of code holds one idea, 22 lines."""
    text = read(path)
    asserted = sum(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(text)))
    assert len(text.splitlines()) <= 310 and 3 <= asserted <= 10
    for cell in jupytext.read(path).cells:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert cell.cell_type != "code" or len(lines) <= 22, cell.source


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
    assert "prediction" in exercises(path) and len(exercises(path)) >= 3
    for name in exercises(path):
        stub = rf'^(def {name}\(.*\):\n(    """[^"]*"""\n)?    \.\.\.$|{name} = [^#]*\.\.\.)'
        assert re.search(stub, read(path), flags=re.M), name
        with contextlib.suppress(NeedsModel):
            lesson.check(f"{path.stem[:2]}.{name}", solved.get(name) or opened())
            assert capsys.readouterr().out == f"{name}: solved\n"


# ---------------------------------------------------------------- the book

def test_the_book_shows_the_chapters():
    assert book.stale() == [], "run python -m chapters.book with these numbers"


@every_chapter
def test_figures_of_the_book(path):
    text = read(book.BOOK / f"{path.stem[:2]}.md")
    found = re.findall(r'^<img src="([^"]+)" width="(\d+)" alt="([^"]+)">$', text, flags=re.M)
    assert len(found) == text.count("<img") == shown(read(path)) and "Traceback" not in text
    assert {name for name, *_ in found} == {p.name for p in book.BOOK.glob(f"{path.stem[:2]}_*")}
    assert all(int(width) <= 845 and len(alt.split()) >= 6 for _, width, alt in found)


TINY = '''# %% [markdown]
# # 00 · A tiny chapter
#
# **Claim.** It is $\\tfrac12$ of [one](00_tiny.py), see [probe](../probe.py).
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
SHOWN = '''\
3 - 2
```

```text
three

1
```

```python
show(plt.figure(figsize=(2, 1)), "00_dot", 'a "dot" < 2')
```

<img src="00_dot.png" width="192" alt="a &quot;dot&quot; &lt; 2">
'''


def test_a_book_is_made_twice_alike_or_not_at_all(tmp_path, monkeypatch):
    for name, place in {"HERE": ".", "BOOK": "book", "SITE": "site"}.items():
        monkeypatch.setattr(book, name, tmp_path / place)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "chapters"))
    path = tmp_path / "00_tiny.py"
    for code, says in (("print(object())", "memory address"), ("1 / 0", "stops at the cell above"),
                       ("plt.plot([1]); plt.show()", "without a name")):
        path.write_text(TINY.replace("3 - 2", code))
        with pytest.raises(UserError, match=says):
            book.make([path])
        assert not book.BOOK.exists()
    path.write_text(TINY)
    book.make([path])
    made = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in book.BOOK.iterdir()}
    text = read(book.BOOK / "00.md")
    assert SHOWN in text and "](00.md), see [probe](../../probe.py)" in text
    assert "<mfrac>" in read(book.SITE / "00.html") and (book.SITE / "00_dot.png").exists()
    book.make([path])
    assert made == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in book.BOOK.iterdir()}
    assert book.stale() == []
    path.write_text(TINY.replace("3 - 2", "2 - 1"))
    assert book.stale() == ["00"]


# ---------------------------------------------------------------- slow: everything for real

@pytest.mark.slow
@every_chapter
def test_runs_in_a_kernel(path):
    """From the first cell to the last; then its solutions are checked in that kernel. What the
    chapters share is trained first, where it is missing."""
    real.folder()
    book.prepare([path])
    notebook = jupytext.read(path)
    calls = [f'check("{path.stem[:2]}.{name}", {name})' for name in exercises(path)]
    source = "\n".join([f"exec(open('solutions/{path.name}').read())", *calls])
    notebook.cells.append(jupytext.reads(source, fmt="py:percent").cells[0])
    *cells, last = book.execute(path, notebook).cells
    before, after = (book.page(path, SimpleNamespace(cells=part))[0] for part in (cells, [last]))
    assert shown(before, "^<img") == shown(read(path))
    assert before.count(": not yet.") == len(exercises(path))
    for name in exercises(path):
        assert f"{name}: solved" in after, after


@pytest.mark.slow
def test_site_in_a_browser(tmp_path):
    """Every page as a browser shows it: each image has loaded, no formula is left as LaTeX."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("no Chromium here")
    book.site()
    script = ("<script>onload = () => document.title = JSON.stringify("
              "[...document.images].map(i => i.naturalWidth))</script>")
    for path in sorted(book.SITE.glob("*.html")):
        page = book.SITE / f".test_{path.name}"
        page.write_text(read(path) + script, encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                   f"--user-data-dir={tmp_path}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        page.unlink()
        widths = json.loads(re.search(r"<title>(.*)</title>", done.stdout)[1])
        assert len(widths) == read(path).count("<img") and all(widths), path.name
        text = re.sub(r"<(pre|code|script).*?</\1>", "", done.stdout, flags=re.S)
        assert not re.search(r"\$|\\[a-zA-Z]+", re.sub(r"<[^>]+>", "", text)), path.name
