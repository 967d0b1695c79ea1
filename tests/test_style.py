"""What a reader relies on: lines that fit, imports that go one way, one place for each number."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LISTED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
TRACKED = LISTED.stdout.split()
FILES = [ROOT / name for name in TRACKED if name.endswith(".py")]
KNOWS = {  # who may import whom, at the top of a file
    "data": {"data"}, "model": {"data"}, "probe": {"data", "model"},
    "train": {"data", "model", "probe"},
    "chapters": {"data", "model", "probe", "train", "chapters"}}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_lines_fit(path):
    most = 88 if path.parent.name in ("chapters", "checks", "solutions") else 100
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > most] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    who = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        known = {name.split(".")[0] for name in names} & {*KNOWS, "tests"}
        assert known <= KNOWS.get(who, {*KNOWS, "tests"}), (path, known)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) chapters\.[0-9]", text, flags=re.M)


def test_a_number_has_one_place():
    """Keys of LINKS stand nowhere else in the programs, but for the few that a rule rests on."""
    import probe
    rests_on = {"sink", "norm_ratio", "neuron_contrast", "direction", "variance"}  # words, or RULE
    for name in ("train.py", "probe.py", "chapters/figures.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for number in probe.metrics():
            if number.key not in rests_on:
                most = 1 if name == "probe.py" else 0
                assert text.count(f'"{number.key}"') <= most, (name, number.key)


def test_top_level_is_as_promised():
    top = {name.split("/")[0] for name in TRACKED if not name.startswith(".")}
    assert top == {"README.md", "requirements.txt", "model.py", "train.py", "probe.py", "chapters",
                   "data", "tests", "LICENSE"}
