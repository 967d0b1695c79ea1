"""The pages: commands parse, the short ones run, links lead somewhere, numbers are the JSON's."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import probe
import train
from data.border import fill, read_json
from tests import bench, claims, cures

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "results"
PAGES = [ROOT / "README.md", ROOT / "chapters" / "README.md", *sorted(RESULTS.glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every command of the README, from its blocks and from its tables."""
    found = re.findall(r"`((?:python|pip|pytest|jupytext)[^`]*)`", README)
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S):
        found += [line.split("#")[0] for line in block.splitlines()]
    parts = (part.strip() for line in found for part in line.split("&&"))
    return sorted({part for part in parts if part})


def test_first_screen():
    screen = README.splitlines()[:40]
    assert "pip install -r requirements.txt && python train.py --attn headnorm" in screen
    assert "pip install -r requirements.txt && pytest" in screen
    assert len(README.splitlines()) <= 175 and len(README.split()) < 2200


@pytest.mark.parametrize("command", commands())
def test_command(command):
    words = shlex.split(command)
    if words[:2] == ["python", "train.py"]:
        given = train.parse(words[2:]) if "--help" not in words else {}
        settings = {k: v for k, v in given.items() if k in train.Run.__dataclass_fields__}
        train.resolve(train.Run(**settings))
    elif words[:2] == ["python", "probe.py"]:
        if "--help" not in words:
            probe.check(probe.parse(words[2:]))
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("pip", "pytest", "jupytext")


@pytest.mark.parametrize("program", ["train.py", "probe.py"])
def test_help_runs(program):
    done = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0 and not done.stderr
    assert "smollm2" in done.stdout or "--attn" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_tables_are_those_of_the_json():
    blocks = claims.tables(read_json(claims.FILE))
    for path in claims.PAGES:
        text = path.read_text(encoding="utf-8")
        assert fill(text, blocks) == text, f"{path}: python -m tests.claims --render"
    text = cures.PAGE.read_text(encoding="utf-8")
    assert fill(text, cures.tables(read_json(cures.FILE))) == text
    text = bench.PAGE.read_text(encoding="utf-8")
    tables = map(bench.table, read_json(bench.RESULTS)["shapes"].values())
    assert fill(text, {"speed": "\n\n".join(tables)}) == text


@pytest.mark.slow
def test_first_command_in_a_fresh_folder(tmp_path):
    """The README's first command, cut short, where there is nothing but the source."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.splitlines():
        if name.split("/")[0] in ("model.py", "train.py", "probe.py", "data", "chapters"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())

    def run(*words):
        return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True,
                              text=True)

    done = run("train.py", "--attn", "headnorm", "--steps", "60", "--out", "out/headnorm")
    assert done.returncode == 0, done.stderr
    files = {path.name for path in (tmp_path / "out/headnorm").iterdir()} - {".lock"}
    assert files == {"config.json", "log.jsonl", "model.pt", "curve.png"}
    following, seen = done.stdout.strip().splitlines()[-2:]
    assert following == "next: python probe.py out/headnorm"
    assert "a sample:" in done.stdout and seen.startswith("headnorm has")
    done = run(*following.removeprefix("next: python ").split())
    assert done.returncode == 0 and "sink" in done.stdout, done.stderr
    assert (tmp_path / "out/headnorm/chain.png").exists()
    again = run("train.py", "--attn", "headnorm", "--steps", "60", "--out", "out/headnorm")
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1
