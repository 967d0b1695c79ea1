"""The chapters: their form, their exercises and solutions, the book that is made of them, and every
one of them run in a real Jupyter kernel."""

import ast
import inspect
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
from data.border import UserError
from tests import real

ROOT = Path(__file__).parent.parent
CHAPTERS = book.chapters()
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
OF_MODELS = {"real", "models", "windows", "english", "random_tokens"}  # what checks open


def read(path):
    return path.read_text(encoding="utf-8")


def exercises(path) -> list[str]:
    return re.findall(r'^ *check\("\d\d\.(\w+)"', read(path), flags=re.M)


def shown(text, pattern=r"^ *show\("):
    return len(re.findall(pattern, text, flags=re.M))


# ---------------------------------------------------------------- form

def test_there_are_nine():
    assert [int(path.stem[:2]) for path in CHAPTERS] == list(range(9))
    for folder in ("checks", "solutions"):
        files = sorted((ROOT / "chapters" / folder).glob("*.py"))
        assert [path.stem[:2] for path in files] == [path.stem[:2] for path in CHAPTERS]


@every_chapter
def test_form(path):
    """Headings, a figure, few assertions, cells of one idea."""
    text, cells = read(path), jupytext.read(path).cells
    assert cells[0].source.startswith(f"# {path.stem[:2]} · ") and "$$" in text and shown(text)
    for heading in ("**Claim.**", "**You need**", "**Run time**"):
        assert heading in cells[0].source
    for heading in ("In one that you train", "Beside the paper", "What would falsify this",
                    "Exercises"):
        assert f"\n# ## {heading}" in text or path.stem[:2] == "07", heading
    nodes = ast.walk(ast.parse(text))
    assert 3 <= sum(isinstance(node, ast.Assert) for node in nodes) <= 10
    for cell in cells:
        lines = [line for line in cell.source.splitlines() if line.strip().strip("#")]
        assert len(lines) <= 22 or cell.cell_type != "code", cell.source


def test_jupytext_keeps_every_chapter():
    command = [sys.executable, "-m", "jupytext", "--test", "--to", "ipynb", *map(str, CHAPTERS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- exercises

def need_models(path) -> set:
    """The exercises of which the check opens a model: those are tried in the kernel."""
    tree = ast.parse(read(path.parent / "checks" / f"{path.stem[:2]}.py"))
    return {check.name for check in tree.body if isinstance(check, ast.FunctionDef)
            and OF_MODELS & {node.id for node in ast.walk(check) if isinstance(node, ast.Name)}}


def is_plain(value):
    plain = (ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.UnaryOp, ast.USub, ast.Load)
    return all(isinstance(part, plain) for part in ast.walk(value))


def is_cheap(node):
    if isinstance(node, ast.Assign):
        return is_plain(node.value)
    if isinstance(node, ast.FunctionDef):
        return all(map(is_plain, node.args.defaults))
    return isinstance(node, (ast.Import, ast.ImportFrom))


def cheap(path) -> dict:
    """What a chapter or its solutions define without running a model."""
    tree, space = ast.parse(read(path)), {}
    tree.body = [node for node in tree.body if is_cheap(node)]
    exec(compile(tree, path.name, "exec"), space)
    return space


@every_chapter
def test_stubs_are_not_yet_and_solutions_pass(path, capsys):
    stubs, solved = cheap(path), cheap(path.parent / "solutions" / path.name)
    assert 3 <= len(exercises(path)) <= 5 and "prediction" in exercises(path)
    for name in exercises(path):
        lesson.check(f"{path.stem[:2]}.{name}", stubs[name])
        assert capsys.readouterr().out.startswith(f"{name}: not yet."), name
        if name in solved and name not in need_models(path):
            lesson.check(f"{path.stem[:2]}.{name}", solved[name])
            assert capsys.readouterr().out == f"{name}: solved\n", name
        if inspect.isfunction(stubs[name]):
            assert inspect.signature(stubs[name]) == inspect.signature(solved[name]), name
            lesson.written_without(solved[name], name)


# ---------------------------------------------------------------- the book

def test_the_book_shows_the_chapters():
    assert book.stale() == [], "run python -m chapters.book with these numbers"


@every_chapter
def test_figures_of_the_book(path):
    text = read(book.BOOK / f"{path.stem[:2]}.md")
    found = re.findall(r'^<img src="([^"]+)" width="(\d+)" alt="([^"]+)">$', text, flags=re.M)
    assert len(found) == text.count("<img") == shown(read(path)) and "Traceback" not in text
    on_disk = {p.name for p in book.BOOK.glob(f"{path.stem[:2]}_*.png")}
    assert {name for name, _, _ in found} == on_disk
    for name, width, alt in found:
        assert int(width) <= 845 and len(alt.split()) >= 6, (name, alt)
        assert (book.BOOK / name).stat().st_size < 400_000


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
print("and a bar", file=sys.stderr)
3 - 2

# %%
show(plt.figure(figsize=(2, 1)), "00_dot", 'a "dot" < 2')
'''


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A chapter that needs no model, and a place for its book."""
    for name, place in {"HERE": ".", "BOOK": "book", "SITE": "site"}.items():
        monkeypatch.setattr(book, name, tmp_path / place)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "chapters"))
    path = tmp_path / "00_tiny.py"
    path.write_text(TINY)
    return path


def test_a_book_is_made_twice_alike(tiny):
    book.make([tiny])
    made = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in book.BOOK.iterdir()}
    text, site = read(book.BOOK / "00.md"), read(book.SITE / "00.html")
    assert "\n3 - 2\n```\n\n```text\nthree\n\n1\n```\n" in text
    assert text.count("and a bar") == 1  # in the code, and not below it
    assert "](00.md), see [probe](../../probe.py)" in text
    assert '<img src="00_dot.png" width="192" alt="a &quot;dot&quot; &lt; 2">' in text
    assert "<mfrac>" in site and "$" not in site and (book.SITE / "00_dot.png").exists()
    book.make([tiny])
    assert made == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in book.BOOK.iterdir()}
    assert book.stale() == []
    tiny.write_text(TINY.replace("3 - 2", "2 - 1"))
    assert book.stale() == ["00"]


@pytest.mark.parametrize("code, says", [
    ("print(object())", "memory address"), ("1 / 0", "stops at the cell above"),
    ("plt.plot([1]); plt.show()", "without a name")])
def test_what_is_no_book(tiny, code, says):
    tiny.write_text(TINY.replace("3 - 2", code))
    with pytest.raises(UserError, match=says):
        book.make([tiny])
    assert not book.BOOK.exists()


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
