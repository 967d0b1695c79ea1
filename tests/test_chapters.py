"""The chapters: their form, their exercises and solutions, the book that is made of them, and every
one of them run in a real Jupyter kernel."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import jupytext
import pytest

from chapters import book
from data.border import UserError
from tests import real

ROOT = Path(__file__).parent.parent
CHAPTERS = book.chapters()
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
OF_MODELS = {"real", "models", "windows", "english", "random_tokens"}  # what checks open
BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"


def read(path):
    return path.read_text(encoding="utf-8")


def code(path):
    return [cell.source for cell in jupytext.read(path).cells if cell.cell_type == "code"]


def exercises(path) -> list[str]:
    return re.findall(r'^ *check\("\d\d\.(\w+)"', read(path), flags=re.M)


# ---------------------------------------------------------------- form

def test_there_are_nine():
    assert [int(path.stem[:2]) for path in CHAPTERS] == list(range(9))
    assert sum(len(exercises(path)) for path in CHAPTERS) >= 26
    for folder in ("checks", "solutions"):
        files = sorted((ROOT / "chapters" / folder).glob("*.py"))
        assert [path.stem[:2] for path in files] == [path.stem[:2] for path in CHAPTERS]


@every_chapter
def test_words(path):
    text, number = read(path), path.stem[:2]
    first = jupytext.read(path).cells[0].source
    assert first.startswith(f"# {number} · ")
    for heading in ("**Claim.**", "**You need**", "**Run time**"):
        assert heading in first
    for heading in ("In one that you train", "Beside the paper", "What would falsify this",
                    "Exercises"):
        assert number == "07" or f"\n# ## {heading}" in text, heading
    assert "$$" in text and re.search(r"^show\(", text, flags=re.M)
    prose = "\n".join(cell.source for cell in jupytext.read(path).cells
                      if cell.cell_type == "markdown")
    assert not re.search(r"\b(lanes?|recipes?)\b", re.sub("`.*?`", "", prose), flags=re.I)
    assert sum(bool(line.strip("#% \n")) for line in text.splitlines()) <= 315


@every_chapter
def test_cells(path):
    tree = ast.parse(read(path))
    nodes = list(ast.walk(tree))
    assert not any(isinstance(node, ast.ClassDef) for node in nodes)  # models are read, not copied
    assert 2 <= sum(isinstance(node, ast.Assert) for node in nodes) <= 10
    kinds = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
    a_line = Counter(node.lineno for node in nodes if isinstance(node, kinds))
    assert [line for line, count in a_line.items() if count > 2] == []
    for source in code(path):
        lines = [line for line in source.splitlines() if line.strip().strip("#")]
        assert len(lines) <= 22, source


def test_jupytext_keeps_every_chapter():
    command = [sys.executable, "-m", "jupytext", "--test", "--to", "ipynb", *map(str, CHAPTERS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_working_copies_are_ignored_and_the_book_is_not():
    command = ["git", "check-ignore", "chapters/00_see_a_sink.ipynb", "chapters/book/00.md",
               "chapters/book/00_window.png", "out/book/00.html"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["chapters/00_see_a_sink.ipynb", "out/book/00.html"]


# ---------------------------------------------------------------- exercises

@pytest.fixture(scope="module", autouse=True)
def lesson():
    """As a chapter, in its folder, imports it."""
    sys.path.insert(0, str(ROOT / "chapters"))
    import lesson
    yield lesson
    sys.path.remove(str(ROOT / "chapters"))


def cheap(path) -> dict:
    """What a file defines without running a model: imports, functions and plain values."""
    tree, space = ast.parse(read(path)), {"__name__": path.stem}
    tree.body = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom,
                 ast.FunctionDef)) or isinstance(n, ast.Assign) and is_plain(n.value)]
    exec(compile(tree, str(path), "exec"), space)
    return space


def is_plain(node):
    try:
        return ast.literal_eval(node) or True
    except ValueError:
        return False


def solution_of(path):
    return path.parent / "solutions" / path.name


def need_models(path) -> set:
    """The exercises of which the check opens a model: those are tried in the kernel."""
    tree = ast.parse(read(path.parent / "checks" / f"{path.stem[:2]}.py"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)
            and OF_MODELS & {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}}


def stubs(path) -> dict:
    """Exercises of a chapter by name: a function without a body, or what stands for a value."""
    found = {}
    for node in ast.parse(read(path)).body:
        if isinstance(node, ast.FunctionDef) and node.name in exercises(path):
            module = ast.Module([node], [])
            exec(compile(module, path.name, "exec"), found)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in exercises(path):
            exec(compile(ast.Module([node], []), path.name, "exec"), found)
    return {name: found.get(name, "missing") for name in exercises(path)}


@every_chapter
def test_stubs_are_not_yet_and_solutions_pass(lesson, path, capsys):
    solved, open_ones, slow = cheap(solution_of(path)), stubs(path), need_models(path)
    assert 3 <= len(open_ones) <= 5 and "prediction" in open_ones
    for name, stub in open_ones.items():
        lesson.check(f"{path.stem[:2]}.{name}", stub)
        assert capsys.readouterr().out.startswith(f"{name}: not yet."), name
        if name in solved and name not in slow:
            lesson.check(f"{path.stem[:2]}.{name}", solved[name])
            assert capsys.readouterr().out == f"{name}: solved\n", name
        if inspect.isfunction(stub):
            assert list(inspect.signature(stub).parameters) == list(
                inspect.signature(solved[name]).parameters), name


@every_chapter
def test_solutions_are_written_without_what_they_write(lesson, path):
    for name, answer in cheap(solution_of(path)).items():
        if inspect.isfunction(answer) and name in exercises(path):
            lesson.written_without(answer, name)


# ---------------------------------------------------------------- the book

def test_the_book_shows_the_chapters():
    assert book.stale() == [], "run python -m chapters.book with these numbers"


@every_chapter
def test_figures_of_the_book(path):
    text = read(book.BOOK / f"{path.stem[:2]}.md")
    found = re.findall(r'^<img src="([^"]+)" width="(\d+)" alt="([^"]+)">$', text, flags=re.M)
    assert len(found) == text.count("<img") == len(re.findall(r"^ *show\(", read(path), flags=re.M))
    on_disk = {p.name for p in book.BOOK.glob(f"{path.stem[:2]}_*.png")}
    assert {name for name, _, _ in found} == on_disk
    for name, width, alt in found:
        assert int(width) <= 845 and len(alt.split()) >= 6, (name, alt)
        assert (book.BOOK / name).stat().st_size < 400_000
    assert not book.ADDRESS.search(text) and "Traceback" not in text


TINY = '''# %% [markdown]
# # {number} · A tiny chapter
#
# **Claim.** It is $\\tfrac12$ of [one](00_tiny.py), see [probe](../probe.py).
#
# **You need** nothing. $$\\alpha_0 = \\frac{{1}}{{T}}
# \\text{{ at }} k$$

# %%
import base64, io, sys
from IPython.display import display
print("three", end="  \\n\\n")
print("and a bar", file=sys.stderr)
3 - 2

# %%
dot = base64.b64decode("{dot}")
how = {{"image/png": {{"alt": 'a "dot" < 2', "width": 30}}, "name": "{number}_dot"}}
display({{"image/png": dot}}, metadata=how, raw=True)
'''
DOT = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
       "rkJggg==")


@pytest.fixture
def tiny_book(tmp_path, monkeypatch):
    """Two chapters that need no model, and a place for their book."""
    places = {"HERE": tmp_path, "BOOK": tmp_path / "book", "SITE": tmp_path / "site"}
    for name, place in places.items():
        monkeypatch.setattr(book, name, place)
    monkeypatch.setattr(book, "prepare", lambda paths: None)
    for number in ("00", "01"):
        (tmp_path / f"{number}_tiny.py").write_text(TINY.format(number=number, dot=DOT))
    return tmp_path


def test_a_book_of_two(tiny_book):
    book.make(book.chapters())
    text = read(book.BOOK / "01.md")
    assert "\n3 - 2\n```\n\n```text\nthree\n\n1\n```\n" in text
    assert text.count("and a bar") == 1  # in the code, and not below it
    assert "](00.md), see [probe](../../probe.py)" in text
    assert text.endswith("---\n\n← [00 · A tiny chapter](00.md) | [Contents](README.md) | "
                         "[Source](../01_tiny.py)\n")
    assert '<img src="01_dot.png" width="30" alt="a &quot;dot&quot; &lt; 2">' in text
    made = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in book.BOOK.iterdir()}
    book.make(book.chapters()[1:])
    assert made == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in book.BOOK.iterdir()}
    shown = read(book.SITE / "01.html")
    assert "<mfrac>" in shown and "$" not in shown
    assert {p.name for p in book.SITE.iterdir()} == {
        "00.html", "01.html", "index.html", "style.css", "00_dot.png", "01_dot.png"}
    assert book.stale() == []
    path = tiny_book / "00_tiny.py"
    path.write_text(read(path).replace("3 - 2", "2 - 1"))
    assert book.stale() == ["00"]


@pytest.mark.parametrize("code, says", [
    ("print(object())", "memory address"), ("1 / 0", "stops at the cell above"),
    ("import matplotlib.pyplot as plt; plt.plot([1])", "memory address|without a name")])
def test_what_is_no_book(tiny_book, code, says):
    path = tiny_book / "00_tiny.py"
    path.write_text(read(path).replace("3 - 2", code))
    with pytest.raises(UserError, match=says):
        book.make([path])
    assert not book.BOOK.exists()


# ---------------------------------------------------------------- slow: everything for real

@pytest.fixture(scope="module")
def executed():
    """A chapter run from the first cell to the last, then its solutions checked in that kernel.
    What the chapters share is trained first, where it is missing, as the first one would."""
    real.folder()
    book.prepare(CHAPTERS)

    def run(path):
        notebook = jupytext.read(path)
        calls = "\n".join(f'check("{path.stem[:2]}.{name}", {name})' for name in exercises(path))
        source = f"exec(open('solutions/{path.name}').read())\n{calls}"
        notebook.cells.append(jupytext.reads(source, fmt="py:percent").cells[0])
        return book.execute(path, notebook)
    return run


@pytest.mark.slow
@every_chapter
def test_runs_in_a_kernel(executed, path):
    cells = executed(path).cells
    *before, after = [book.page(path, types.SimpleNamespace(cells=part))[0]
                      for part in (cells[:-1], cells[-1:])]
    assert len(re.findall("^<img", before[0], flags=re.M)) == len(
        re.findall(r"^ *show\(", read(path), flags=re.M))
    assert before[0].count(": not yet.") == len(exercises(path))
    for name in exercises(path):
        assert f"{name}: solved" in after, after


@pytest.mark.slow
def test_site_in_a_browser(tmp_path):
    """Every page as a browser shows it: each image has loaded, no formula is left as LaTeX."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip("no Chromium here")
    book.site()
    probe = ("<script>onload = () => document.title = JSON.stringify("
             "[...document.images].map(i => i.naturalWidth))</script>")
    for path in sorted(book.SITE.glob("*.html")):
        page = book.SITE / f".test_{path.name}"
        page.write_text(read(path) + probe, encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                   f"--user-data-dir={tmp_path}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        page.unlink()
        widths = re.search(r"<title>\[(.*)\]</title>", done.stdout)[1]
        assert widths.count(",") + bool(widths) == read(path).count("<img"), path.name
        assert "0" not in widths.split(","), f"{path.name}: an image that does not load"
        text = re.sub(r"<pre.*?</pre>|<code.*?</code>|<script.*?</script>", "", done.stdout,
                      flags=re.S)
        shown = re.sub(r"<[^>]+>", "", text)
        assert not re.search(r"\$|\\[a-zA-Z]+", shown), path.name
