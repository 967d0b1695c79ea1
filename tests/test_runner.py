"""tests/runner.py: only missing results are measured."""

import time
from types import SimpleNamespace

import pytest

from data.common import read_json, write_json
from tests import claims, cures, rest, runner, why


def square(number):
    return {"square": number**2}


def test_only_missing_results_are_measured(tmp_path):
    file, seen = tmp_path / "found.json", []
    write_json(file, {"a": {"2": "kept"}})
    plan = {("a", "2"): (square, 2), ("a", "3"): (square, 3), ("b",): (square, 4)}
    runner.run(file, plan, seen.append, SimpleNamespace(render=True, jobs=1))
    assert seen == [{"a": {"2": "kept"}}]
    runner.run(file, plan, seen.append, SimpleNamespace(render=False, jobs=1))
    assert seen[1] == {"a": {"2": "kept", "3": {"square": 9}}, "b": {"square": 16}}
    assert read_json(file) == seen[1]


@pytest.mark.parametrize("program", [claims, cures, rest, why], ids=lambda m: m.__name__)
def test_nothing_is_missing_in_what_is_committed(program):
    found = read_json(program.FILE)
    assert [path for path in program.plan() if not runner.holds(found, path)] == []


def touch(path):
    time.sleep(0.05)  # all of them together would take five seconds
    path.touch()
    return {"touched": True}


def test_when_one_fails_the_others_are_not_begun(tmp_path):
    """What they found would be lost."""
    plan = {("a",): (square, None)} | {(str(i),): (touch, tmp_path / str(i)) for i in range(99)}
    with pytest.raises(TypeError):
        runner.measure(tmp_path / "found.json", plan, jobs=1)
    assert len(list(tmp_path.iterdir())) < 99
