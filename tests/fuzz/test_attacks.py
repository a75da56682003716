"""Files made to hurt: each is refused by name, in little memory and time, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.attacks import Attack, Result, all_attacks

ROOT = Path(__file__).parents[2]
ATTACKS = all_attacks()
SECONDS = 10  # for all ways of loading one folder; the slowest takes one on a quiet core
PEAK = 200 << 20  # bytes; the largest file that is read whole, a header of 16 MiB, takes less


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """All attacks in a process that may map one GiB more than it starts with."""
    command = [sys.executable, "-m", "tests.fuzz.attacks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {found["name"]: Result(**found) for found in json.loads(done.stdout)}


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_refused_by_name(attack: Attack, results):
    found = results[attack.name]
    first, *others = found.errors
    assert first == attack.error, found
    assert all(word in found.message for word in attack.words), found.message
    assert all(other == attack.error or (attack.kind == "ours" and "Error" in other) for other in others), found
    assert len(others) == (0 if attack.kind == "pickled" else 2 if attack.kind == "ours" else 1), found
    assert found.seconds < SECONDS and found.grown < PEAK and found.kept, found


def test_the_limit_would_be_noticed(results):
    """The numbers are measured: something was read, and it took time and memory."""
    assert sum(found.seconds for found in results.values()) > 0
    assert 0 < sum(found.grown for found in results.values()) < PEAK
    assert len(results) == len(ATTACKS)
