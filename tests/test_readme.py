"""README: its commands parse, its links lead somewhere, its tables are those of the committed JSON."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests import recipe

ROOT = Path(__file__).parent.parent
PAGES = recipe.PAGES
README = PAGES[0].read_text(encoding="utf-8")
COMMANDS = sorted({part.strip() for line in re.findall(r"^(?:pip|python) .*$|`(python [^`]+)`", README, flags=re.M) or []
                   for part in (line if isinstance(line, str) else line[0]).split("&&")} |
                  {part.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S)
                   for line in block.splitlines() for part in line.split("&&")})
COMMANDS = [c for c in COMMANDS if c]


def test_there_are_commands():
    assert len(COMMANDS) > 10
    assert "python train.py --attn headnorm" in COMMANDS and "pytest" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    words = shlex.split(command)
    if words[:2] == ["python", "train.py"] and "--help" not in words:
        args = vars(train.parse(words[2:]))
        train.resolve(train.Run(**{f: args[f] for f in train.Run.__dataclass_fields__}))
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("pip", "pytest")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_and_places(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for name in re.findall(r"`([\w/]+\.(?:py|json|md))`", text):
        assert (ROOT / name).exists() or (page.parent / name).exists() or name in ("config.json", "chain.json"), name  # those of a run


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_tables_are_those_of_the_json(page):
    text = page.read_text(encoding="utf-8")
    assert recipe.fill(text, recipe.tables()) == text


@pytest.mark.slow
def test_main_job_in_a_fresh_folder(tmp_path):
    """The README's first command, cut short: no cache, no earlier run, nothing but the source."""
    for name in ("model.py", "train.py", "probe.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("cache", "__pycache__"))
    run = lambda *words: subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    done = run("train.py", "--attn", "headnorm", "--steps", "60")
    assert done.returncode == 0, done.stderr  # stderr says that the tokens are learned, once
    assert {path.name for path in (tmp_path / "out/headnorm").iterdir()} == {"config.json", "log.jsonl", "model.pt", "best.pt", "curve.png"}
    following = done.stdout.strip().splitlines()[-1]
    assert following == "next: python probe.py out/headnorm"
    assert "a sample:" in done.stdout and "bits/byte" in done.stdout
    done = run(*following.removeprefix("next: python ").split())
    assert done.returncode == 0 and "sink" in done.stdout, done.stderr
    assert (tmp_path / "out/headnorm/chain.png").exists()
    again = run("train.py", "--attn", "headnorm", "--steps", "60")
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1
