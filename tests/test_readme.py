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
from data.common import read_json
from tests import bench, claims, cures, retrofit
from tests.runner import fill

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "chapters" / "README.md",
         *sorted((ROOT / "tests" / "results").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every command of the README, from its blocks and from its tables."""
    found = re.findall(r"`((?:python|pip|pytest|jupytext)[^`]*)`", README)
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S):
        found += [line.split("#")[0] for line in block.splitlines()]
    parts = (part.strip() for line in found for part in line.split("&&"))
    return sorted({part for part in parts if part})


def run(*words, cwd=ROOT):
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("command", commands())
def test_command(command):
    """It parses, and what it runs is there."""
    program, *words = shlex.split(command)
    if program != "python":
        assert program in ("pip", "pytest", "jupytext")
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1])
    elif words[0] == "train.py" and "--help" not in words:
        given = train.parse(words[1:])
        settings = {k: v for k, v in given.items() if k in train.Run.__dataclass_fields__}
        train.resolve(train.Run(**settings))
    elif words[0] == "probe.py" and "--help" not in words:
        probe.parse(words[1:])
    else:
        assert (ROOT / words[0]).is_file()


@pytest.mark.parametrize("program, flags", [
    ("train.py", [train.flag(field.name) for field in train.fields(train.Run)]),
    ("probe.py", ["--cut", "--llama", "smollm2"])])
def test_help_names_every_flag_without_docstrings(program, flags):
    done = run("-OO", program, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(flag in done.stdout for flag in flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_tables_are_those_of_the_json():
    of_claims = claims.tables(read_json(claims.FILE))
    of_cures = cures.tables(read_json(cures.FILE))
    rebuilt = retrofit.tables(read_json(retrofit.FILE))
    speed = bench.tables(read_json(bench.FILE))
    made = {page: of_claims for page in claims.PAGES}
    made |= {cures.PAGE: of_cures | rebuilt, bench.PAGE: speed}
    filled = set()
    for path, blocks in made.items():
        text = path.read_text(encoding="utf-8")
        assert fill(text, blocks) == text, f"{path} must be rendered anew"
        filled |= {name for name in blocks if f"<!-- {name} -->" in text}
    assert filled == {name for blocks in made.values() for name in blocks}


@pytest.mark.slow
def test_first_command_in_a_fresh_folder(tmp_path):
    """The README's first command, cut short, where there is nothing but the source."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    first = ("train.py", "--attn", "headnorm", "--steps", "60", "--out", "out/headnorm")
    done = run(*first, cwd=tmp_path)
    assert done.returncode == 0 and "under softmax" in done.stdout, done.stderr
    files = {path.name for path in (tmp_path / "out/headnorm").iterdir()}
    assert files >= {"config.json", "log.jsonl", "model.pt", "curve.png"}
    following, seen = done.stdout.splitlines()[-2:]
    assert following == "next: python probe.py out/headnorm" and seen.startswith("headnorm takes")
    done = run(*following.split()[2:], cwd=tmp_path)
    assert done.returncode == 0 and "sink" in done.stdout, done.stderr
    assert (tmp_path / "out/headnorm/chain.png").exists()
    again = run(*first, cwd=tmp_path)
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1
