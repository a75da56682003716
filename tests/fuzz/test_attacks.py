"""Files made to hurt: each is refused by name, in little memory and time, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.attacks import Result

ROOT = Path(__file__).parents[2]
WAYS = {"upstream": 2, "sharded": 2, "pickled": 1, "ours": 3}
SECONDS = 60  # for all ways of loading one folder; the slowest takes one on a quiet core
PEAK = 200 << 20  # bytes; the largest file that is read whole, a header of 16 MiB, takes less


@pytest.fixture(scope="module")
def results() -> list[Result]:
    """All attacks in a process that may map one GiB more than it starts with."""
    command = [sys.executable, "-m", "tests.fuzz.attacks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [Result(**found) for found in json.loads(done.stdout)]


def named(found: Result) -> bool:
    """Whether every way gave the error that was wanted; our own layout has Transformers' own in some of them."""
    first, *others = found.errors
    same = all(other == found.error or (found.kind == "ours" and "Error" in other) for other in others)
    return first == found.error and same and all(word in found.message for word in found.words)


def test_refused_by_name(results):
    assert len(results) > 200
    assert [found for found in results if len(found.errors) != WAYS[found.kind] or not named(found)] == []


def test_nothing_is_left_or_changed(results):
    assert [found for found in results if not found.kept] == []


def test_little_memory_and_time(results):
    assert [found for found in results if found.seconds > SECONDS] == []
    assert sum(found.grown for found in results) < PEAK  # none where importing took more


def test_no_memory_error_is_taken_for_a_refusal(results):
    assert [found for found in results if "MemoryError" in "".join(found.errors)] == []
