"""The matrix itself is tested: the folders pass here, wrong code in them fails, and the README shows what was found."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.matrix import table
from tests.matrix.environments import FULL, HUB, NEWEST, OLDEST, QUICK, Environment
from tests.matrix.write import write_converted

WORKER = Path(__file__).with_name("worker.py")
FEEDS = ("whole", "token_by_token", "static_cache", "left_padded", "padded_token_by_token", "packed")
DECODING = {"token_by_token", "static_cache", "padded_token_by_token"}

# Added to positions_alibi.py of a folder, which makes the distances of every call.
WRONG = """

_right = make_distances


def make_distances(*args, **kwargs):
    made = _right(*args, **kwargs)
    {}
    return made
"""
MISTAKES = {
    "zero": "made.slopes = made.slopes * 0",
    "sign": "made.slopes = -made.slopes",
    "decode": "made.slopes = made.slopes * (made.query_index.numel() > 1 or made.num_keys == 1)",
    "past": "made.slopes = made.slopes * (made.num_keys <= 32)",  # the training length
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the worker says of a right folder and of the wrong ones, in one process in which the package is hidden."""
    sources = tmp_path_factory.mktemp("sources")
    write_converted(sources / "right-converted")
    for name, line in MISTAKES.items():
        shutil.copytree(sources / "right-converted", sources / f"{name}-converted")
        code = sources / f"{name}-converted" / "out" / "positions_alibi.py"
        code.write_text(code.read_text() + WRONG.format(line))
    output = tmp_path_factory.mktemp("found") / "found.json"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**kept, "HF_MODULES_CACHE": str(output.parent / "modules")}
    command = [sys.executable, "-I", WORKER, sources, output, "--hide", "--backends", "sdpa"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=output.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def failed(found: dict, name: str, group: str) -> set[str]:
    """The checks of a group that failed, by the last word of their name."""
    checks = [check for check in found["sources"][f"{name}-converted"] if check["group"] == group]
    assert checks
    return {check["check"].split(", ")[-1] for check in checks if not check["passed"]}


@pytest.mark.slow
def test_the_right_folder_passes_everything(found):
    only = {"versions": found["versions"], "sources": {"a-b": found["sources"]["right-converted"]}}
    assert table.failures(only) == []
    (row,) = table.rows(only)
    assert row["written with"] == "a" and row["heads"] == "2 of 2" and row["agree"] == "14 of 14"


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["zero", "sign", "past"])
def test_a_wrong_bias_fails(found, mistake):
    assert failed(found, mistake, "agree") == set(FEEDS)
    assert failed(found, mistake, "generate") and failed(found, mistake, "train") and failed(found, mistake, "heads")
    assert not failed(found, mistake, "save")  # the folder is whole; what it computes is not


@pytest.mark.slow
def test_a_bias_that_is_wrong_in_decoding_only_fails_there(found):
    assert failed(found, "decode", "agree") == DECODING
    assert failed(found, "decode", "generate")
    assert not failed(found, "decode", "train") and not failed(found, "decode", "heads")


def test_a_folder_without_a_group_of_checks_has_not_passed():
    empty = {"versions": {"transformers": "5"}, "sources": {"a-b": []}}
    assert len(table.failures(empty)) == len(table.GROUPS)
    assert table.failures({**empty, "sources": {}})


def test_the_worker_refuses_to_run_where_the_package_is():
    done = subprocess.run([sys.executable, "-I", WORKER, "a", "b"], capture_output=True, text=True)
    assert done.returncode == 1 and "can be imported here" in done.stderr


def test_the_readme_shows_the_rows_that_are_recorded():
    text = Path("README.md").read_text(encoding="utf-8")
    shown = table.MARKED.search(text)
    assert shown and shown[2] == table.markdown(table.recorded()), "run `make test-matrix RECORD=1`"


def test_the_recorded_rows_are_complete_and_passed_everything():
    rows = table.recorded()
    assert table.merged(rows) == rows
    assert {(row["transformers"], row["written with"]) for row in rows} >= {
        (reads, writes) for reads in (OLDEST, NEWEST) for writes in (OLDEST, NEWEST)
    }
    for row in rows:
        for group in table.GROUPS:
            passed, of = re.fullmatch(r"(\d+) of (\d+)", row[group]).groups()
            assert int(passed) == int(of) > 0, row


def test_a_row_that_comes_out_differently_is_told():
    row = table.recorded()[0]
    assert table.stale([row]) == [] and table.stale([{**row, "agree": "0 of 42"}])
    assert table.stale([{**row, "python": "3.99"}]) == []  # not recorded


def test_the_ends_of_the_supported_range_are_run():
    declared = re.search(r'"transformers>=([\d.]+),<([\d.]+)"', Path("pyproject.toml").read_text(encoding="utf-8"))
    constraints = Path("constraints.txt").read_text(encoding="utf-8")
    assert declared and OLDEST.startswith(declared[1])
    assert f"transformers=={NEWEST};" in constraints and f"huggingface_hub=={HUB[NEWEST]}" in constraints
    assert [each.transformers for each in QUICK] == [OLDEST, NEWEST]
    assert len({each.folder for each in FULL}) == len(FULL)


def test_an_interpreter_that_is_not_here_is_skipped_by_name():
    assert Environment(NEWEST, python="python3.99").missing() == "python3.99 is not on the path"
