"""`python -m tests.fuzz --seconds N`: the loaders against bad files for a while, with a new seed every time.

Writes figures.json beside this file (inputs tried, what became of them, seconds of processor time, those of the slowest
input, and the peak of memory) and from it the table of SECURITY.md. Exits 1 where anything but a named error came out;
the smallest such input is printed.
"""

import tests.conftest  # noqa: F401, I001  (no network, one thread)

import argparse
import json
import multiprocessing
import random
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any


from alibi_hf.checkpoints.conversion import versions
from tests.fuzz.loaders import STRATEGIES
from tests.fuzz.trying import fuzz

FIGURES = Path(__file__).with_name("figures.json")
SECURITY = Path(__file__).parents[2] / "SECURITY.md"
_ROWS = re.compile(r"(^\| reader \|.*\n\|[-|]+\|\n)(?:\|.*\n)*", re.M)  # head and rows of its table


def table(loaders: dict[str, dict[str, Any]]) -> str:
    """The rows of SECURITY.md: inputs, those refused by name, seconds, the slowest input's, and MB at the most."""
    rows = []
    for name, found in loaders.items():
        refused, peak = found["inputs"] - found["outcomes"].get("loaded", 0), found["peak_bytes"] / 1e6
        figures = f"{found['inputs']:,} | {refused:,} | {found['seconds']} | {found['slowest_seconds']} | {peak:.0f}"
        rows.append(f"| {name} | {figures} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="on the clock; every loader gets the same share")
    parser.add_argument("--jobs", type=int, default=1, help="loaders at once, each in a process of its own")
    parser.add_argument("--seed", type=int, default=None, help="a new one if not given")
    parser.add_argument("--only", default="", help="part of the name of a loader")
    parser.add_argument("--output", type=Path, default=FIGURES)
    options = parser.parse_args()
    first = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    chosen = [name for name in STRATEGIES if options.only in name]
    share, loaders = options.seconds * options.jobs / len(chosen), {}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for name, found in zip(chosen, pool.map(fuzz, chosen, repeat(share), repeat(first)), strict=True):
            print(f"{name}: {json.dumps(found)}", flush=True)
            loaders[name] = found
    figures = {"seed": first, "versions": versions(), "loaders": loaders}
    options.output.write_text(json.dumps(figures, indent=2) + "\n")
    if chosen == list(STRATEGIES):
        policy = SECURITY.read_text(encoding="utf-8")
        SECURITY.write_text(_ROWS.sub(lambda head: head[1] + table(loaders), policy), encoding="utf-8")
    return int(any(found["crashes"] for found in loaders.values()))


if __name__ == "__main__":
    sys.exit(main())
