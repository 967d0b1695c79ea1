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


def modules(paths) -> dict[str, str]:
    """{name by which a module is imported: its name from the root}"""
    names = {}
    for path in paths:
        whole = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        names[whole] = whole
        if path.parent == Path("chapters"):  # a chapter finds its neighbours by their short names
            names[path.stem] = whole
    return names


def imported(path, source, names) -> set[str]:
    """The modules of ours that a file imports, also those that its functions import."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.parts[:-1]) if node.level else ""
            base = ".".join(filter(None, (package, node.module)))
            parts = {f"{base}.{alias.name}" for alias in node.names} & names.keys()
            found |= parts or {base}
    return {names[name] for name in found if name in names}


def circle(sources: dict) -> list[str]:
    """The modules of a circle of imports among {path: source}; [] if there is none."""
    names = modules(sources)
    graph = {}
    for path, source in sources.items():
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        graph[module] = imported(path, source, names) - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_imports_run_one_way():
    assert circle({path: (ROOT / path).read_text(encoding="utf-8") for path in PRODUCT}) == []


def test_a_circle_through_a_function_is_seen():
    sources = {Path("probe.py"): "from chapters import figures",
               Path("chapters/figures.py"): "def curve():\n    from train import KINDS",
               Path("train.py"): "import probe"}
    assert sorted(set(circle(sources))) == ["chapters.figures", "probe", "train"]


def test_model_knows_only_data():
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    known = imported(Path("model.py"), source, modules(PRODUCT))
    assert {name.split(".")[0] for name in known} == {"data"}


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
