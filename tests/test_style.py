"""What a reader relies on: plain style, imports that run one way, one place for each number."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import probe

ROOT = Path(__file__).parent.parent
LISTED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
TRACKED = LISTED.stdout.split()
PRODUCT = [Path(name) for name in TRACKED if name.endswith(".py") and not name.startswith("tests/")]


def module(path) -> str:
    return path.parent.name if path.stem == "__init__" else path.stem


OURS = {module(path) for path in PRODUCT}


def imported(path) -> set[str]:
    """The modules of ours that a file imports, also those that its functions import."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            found.update(part for name in names for part in name.split("."))
    return found & OURS - {module(path)}


def test_imports_run_one_way():
    graph = {name: set() for name in OURS}
    for path in PRODUCT:
        graph[module(path)] |= imported(path)
    assert graph["train"] >= {"data", "model", "probe"}
    assert "figures" in graph["probe"]  # inside a function
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_model_knows_only_data():
    of_data = {module(path) for path in PRODUCT if path.parts[0] == "data"}
    assert imported(Path("model.py")) <= of_data


def test_ruff():
    command = [sys.executable, "-m", "ruff", "check", "--config", ".ci/ruff.toml", "--quiet"]
    for more in (["."], ["--line-length", "88", "chapters"]):
        done = subprocess.run(command + more, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_number_has_one_place():
    """Keys of LINKS stand nowhere else in the programs, but for the few that a rule rests on."""
    rests_on = {"sink", "norm_ratio", "neuron_contrast", "direction", "variance"}  # words, or RULE
    for name in ("train.py", "probe.py", "chapters/figures.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        most = 1 if name == "probe.py" else 0
        for metric in probe.metrics():
            if metric.key not in rests_on:
                assert text.count(f'"{metric.key}"') <= most, (name, metric.key)


def test_top_level_is_as_promised():
    top = {name.split("/")[0] for name in TRACKED if not name.startswith(".")}
    assert top == {"README.md", "requirements.txt", "model.py", "train.py", "probe.py", "chapters",
                   "data", "tests", "LICENSE"}
