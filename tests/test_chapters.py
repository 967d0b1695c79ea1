"""The chapters: their form, their exercises and solutions, and every one of them run in a real Jupyter kernel."""

import ast
import builtins
import dis
import inspect
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.py"))
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)


def test_there_are_nine():
    assert [int(path.stem[:2]) for path in CHAPTERS] == list(range(9))


@every_chapter
def test_form(path):
    text = path.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    first, code = notebook.cells[0].source, [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert first.startswith(f"# {path.stem[:2]} · ")
    for heading in ("**Claim.**", "**You need**", "**Run time**"):
        assert heading in first
    assert "## What would falsify this" in text and "paper" in text and "## Exercises" in text
    assert any(cell.cell_type == "markdown" and "$$" in cell.source for cell in notebook.cells)
    for source in code:
        if "def check_" not in source:
            assert sum(bool(line.strip()) for line in source.splitlines()) <= 15, source
    assert sum("assert " in source for source in code if "def check_" not in source) >= 2
    assert 2 <= len(re.findall(r"^attempt\(", text, flags=re.M)) <= 4 and 1 <= len(re.findall(r"^show\(", text, flags=re.M))
    source, solution = ast.parse(text), ast.parse((path.parent / "solutions" / path.name).read_text(encoding="utf-8"))
    for module in (source, solution):  # chapters read the model, they do not keep copies of it
        assert not {node.name for node in module.body if isinstance(node, ast.ClassDef)}


def test_jupytext_keeps_every_chapter():
    done = subprocess.run([sys.executable, "-m", "jupytext", "--test", "--to", "ipynb", *map(str, CHAPTERS)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def exercises(path):
    """{name: (check, unsolved stub, solution)} of a chapter, of which only imports and functions are run."""
    chapter, solved = {"__name__": "chapter"}, {"__name__": "solutions"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))]
    sys.path.insert(0, str(path.parent))
    try:
        exec(compile(tree, path.name, "exec"), chapter)
        exec(compile((path.parent / "solutions" / path.name).read_text(encoding="utf-8"), path.name, "exec"), solved)
    finally:
        sys.path.remove(str(path.parent))
    names = [name.removeprefix("check_") for name in chapter if name.startswith("check_")]
    return {name: (chapter[f"check_{name}"], chapter[name], solved[name]) for name in names}


def needs_models(check):
    """Whether a check uses what only a run of the whole chapter computes: then it is tried in the kernel."""
    used = {step.argval for step in dis.get_instructions(check) if step.opname == "LOAD_GLOBAL"}
    return not used <= check.__globals__.keys() | vars(builtins).keys()


@every_chapter
def test_solutions_pass_and_stubs_do_not(path):
    found = exercises(path)
    assert len(found) == len(re.findall(r"^attempt\(", path.read_text(encoding="utf-8"), flags=re.M))
    for name, (check, stub, solution) in found.items():
        if needs_models(check):
            continue
        assert list(inspect.signature(stub).parameters) == list(inspect.signature(solution).parameters), name
        with pytest.raises(AssertionError) as failed:
            check(stub)
        assert len(str(failed.value)) > 20, f"{name} fails without saying what to do"
        check(solution)


def test_a_wrong_answer_does_not_stop_a_chapter(capsys):
    check, stub, solution = exercises(CHAPTERS[0])["sink_score"]
    attempt = sys.modules["lesson"].attempt
    for answer in (stub, solution, lambda: 1 / 0):
        attempt(check, answer)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].split()[0].rstrip(".") for line in lines] == ["not", "solved", "not"]


@pytest.fixture(scope="module")
def shared_runs():
    """The models that the chapters share: trained where they are missing, as the first chapter would."""
    subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, 'chapters'); import lesson; lesson.models(*lesson.RUNS)"],
                   cwd=ROOT, check=True)


@pytest.mark.slow
@every_chapter
def test_runs_in_a_kernel(path, shared_runs):
    """As a reader opens it: a fresh kernel in chapters/. Then the checks are tried on the solutions in that kernel."""
    from nbclient import NotebookClient
    notebook = jupytext.read(path)
    notebook.cells.append(jupytext.reads(f"# %%\nexec(open('chapters/solutions/{path.name}').read())\n"
                                         + "\n".join(f"check_{name}({name})" for name in exercises(path)), fmt="py:percent").cells[-1])
    NotebookClient(notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == len(re.findall(r"^show\(", path.read_text(encoding="utf-8"), flags=re.M))
    assert sum(output.get("text", "").count("not yet.") for output in outputs) == len(exercises(path))
