"""`make test-matrix`: saved folders in every supported Transformers, each in an environment without this package.

    python -m tests.matrix [--full] [--record]

The wheel is installed in an environment of its own with the oldest Transformers. It and this environment write the
folders; every other one loads them by their own code. `--record` puts the rows into the README.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import transformers

from tests.matrix import table, wheel
from tests.matrix.environments import FULL, OLDEST, QUICK, Environment, run

HERE = Path(__file__).parent


def variables(modules: Path) -> dict[str, str]:
    """Return the variables of the processes: one thread, no Hub, no way to this source tree."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules)}


def check(environment: Environment, sources: Path, scratch: Path) -> dict[str, Any]:
    """Return what the worker finds in one environment."""
    name = environment.folder.name
    python, output = environment.make(), scratch / f"{name}.json"
    run([python, "-I", HERE / "worker.py", sources, output], env=variables(scratch / name), cwd=scratch)
    return json.loads(output.read_text())


def main() -> None:
    """Make the environments, write the folders, check them, and print the table."""
    parser = argparse.ArgumentParser(description="The version matrix.")
    parser.add_argument("--full", action="store_true", help="more of Transformers, torch and Python; gigabytes")
    parser.add_argument("--record", action="store_true", help="put the rows into the README")
    given = parser.parse_args()
    start, chosen = time.monotonic(), []
    for each in FULL if given.full else QUICK:
        if reason := each.missing():
            print(f"skipped: {each.folder.name}: {reason}")
        else:
            chosen.append(each)
    with tempfile.TemporaryDirectory(prefix="alibi-hf-matrix-") as made, ThreadPoolExecutor(2) as pool:
        scratch = Path(made)
        made_ahead = [pool.submit(each.make) for each in chosen]
        with_wheel = wheel.install(scratch)
        wheel.check(with_wheel, variables(scratch / "modules"), scratch)
        sources = scratch / "sources"
        for version, python in {OLDEST: with_wheel, transformers.__version__: sys.executable}.items():
            run([python, HERE / "write.py", sources, version], env=variables(scratch / "modules"), cwd=scratch)
        for future in made_ahead:
            future.result()
        found = list(pool.map(lambda each: check(each, sources, scratch), chosen))
    report(found, given.record)
    print(f"{time.monotonic() - start:.0f} s")


def report(found: list[dict[str, Any]], record: bool) -> None:
    """Print the table; stop with status 1 where a check failed, or the README says something else."""
    rows = [row for each in found for row in table.rows(each)]
    print(table.markdown(rows), end="")
    if failed := [line for each in found for line in table.failures(each)]:
        raise SystemExit("\n".join([*failed, f"{len(failed)} checks failed"]))
    if record:
        table.record(rows)
    elif stale := table.stale(rows):
        raise SystemExit(f"{table.markdown(stale)}is not what the README says: run `make test-matrix RECORD=1`")
    print(f"{sum(len(checks) for each in found for checks in each['sources'].values())} passed, 0 failed")


if __name__ == "__main__":
    main()
