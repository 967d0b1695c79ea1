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
from tests import bench, claims, cures, rest, retrofit, why
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
        assert program in ("pip", "pytest", "jupytext", "git", "cd", ".")
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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_chain_is_a_list_in_the_order_of_links():
    items = re.findall(r"^\d\. \[(.+?)\]", README, flags=re.M)
    assert items == [link.name for link in probe.LINKS]


def test_what_smollm2_writes_stands_in_the_book():
    book = (ROOT / "chapters/book/03.md").read_text(encoding="utf-8")
    for line in re.findall(r"^The capital of France is.*$", README, flags=re.M):
        assert line in book


def test_tables_are_those_of_the_json():
    of_claims = claims.tables(read_json(claims.FILE))
    of_cures = cures.tables(read_json(cures.FILE)) | retrofit.tables(read_json(retrofit.FILE))
    made = {page: of_claims for page in claims.PAGES}
    made[cures.PAGE] = of_cures
    of_why = {"why": why.table(read_json(why.FILE))}
    made[rest.PAGE] = rest.tables(read_json(rest.FILE)) | of_why
    made[bench.PAGE] = bench.tables(read_json(bench.FILE))
    for path, blocks in made.items():
        text = path.read_text(encoding="utf-8")
        assert fill(text, blocks) == text, f"{path} must be rendered anew"


# Numbers that several pages name: the page, its words (# is the number), and what the JSON has. Of
# SmolLM2 those of the batch that the chapters read, the first one of claims.json.
RANDOM = read_json(claims.FILE)["SmolLM2"]["0"]["softmax"]["random"]
FIRST = RANDOM["first"]
NAMED = [
    ("chapters/book/00.md", "random tokens: strongest head #", FIRST["sink"]),
    ("chapters/book/00.md", "head 8 reads a value of #", FIRST["drain"]),
    ("chapters/book/01.md", "random tokens discrepancy #", FIRST["variance"]),
    ("chapters/book/01.md", "random tokens .*, of the law's own curve #", FIRST["variance_law"]),
    ("chapters/book/02.md", "random tokens, .* before W_O #", FIRST["variance"]),
    ("chapters/book/02.md", "random tokens, .*, after #, after a random", FIRST["variance_out"]),
    ("chapters/book/02.md", "random tokens  columns .* over layers #", FIRST["wo_tau"]),
    ("chapters/book/02.md", "random tokens  columns .* alone  #", RANDOM["tau of layer 0"]),
    ("chapters/book/04.md", "token 0 after RMSNorm .*  #\n", FIRST["dominance"]),
]


@pytest.mark.parametrize("page, words, value", NAMED)
def test_pages_agree(page, words, value):
    text = (ROOT / page).read_text(encoding="utf-8")
    quoted = re.search(words.replace("#", r"([-+]?\d[\d.]*\d|\d)"), text)[1]
    digits = len(quoted.partition(".")[2])
    assert float(quoted) == pytest.approx(value, abs=0.51 * 10**-digits)


@pytest.mark.slow
def test_first_command_in_a_fresh_folder(tmp_path):
    """The README's first command, cut short, where there is nothing but the source."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    first = ("train.py", "--attn", "headnorm", "--steps", "60", "--out", "out/headnorm")
    done = run(*first, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = {path.name for path in (tmp_path / "out/headnorm").iterdir()}
    assert files >= {"config.json", "log.jsonl", "model.pt", "curve.png"}
    following, seen = done.stdout.splitlines()[-2:]
    assert following == "next: python probe.py out/headnorm"
    assert "has not learned" in seen
