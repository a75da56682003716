"""`python -m tests.fuzz --seconds N`: the loaders against bad files for a while, with a new seed every time.

Writes figures.json beside this file: inputs tried, what became of them, seconds, the slowest input and the peak of the
process's memory. Exits 1 where anything but a named error came out; the smallest such input is printed.
"""

import tests.conftest  # noqa: F401, I001  (no network, one thread)

import argparse
import json
import random
import resource
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from transformers.utils import logging

from tests.fuzz.loaders import STRATEGIES, Case, run

FIGURES = Path(__file__).with_name("figures.json")
ROUND = 100  # inputs a seed
ADDRESS_SPACE = 16 << 30  # bytes; PyTorch's own libraries map several, and whatever asks for more fails


def fuzz(name: str, seconds: float, rng: random.Random) -> dict[str, Any]:
    """One loader's figures after `seconds` of inputs."""
    outcomes: Counter[str] = Counter()
    crashes: list[str] = []
    slowest = 0.0

    def try_one(case: Case) -> None:
        nonlocal slowest
        start = time.monotonic()
        outcomes[run(case)] += 1
        slowest = max(slowest, time.monotonic() - start)

    quiet = settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        test = seed(rng.getrandbits(64))(quiet(given(STRATEGIES[name])(try_one)))
        try:
            test()
        except BaseException as error:  # groups of errors as well
            if isinstance(error, KeyboardInterrupt):
                raise
            crashes.append(f"{type(error).__name__}: {error}"[:300])
            traceback.print_exc()
    spent = time.monotonic() - start
    return {
        "inputs": outcomes.total(),
        "seconds": round(spent),
        "slowest_seconds": round(slowest, 2),
        "outcomes": dict(sorted(outcomes.items())),
        "crashes": sorted(set(crashes)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="in all; every loader gets the same share")
    parser.add_argument("--seed", type=int, default=None, help="a new one if not given")
    parser.add_argument("--only", default="", help="part of the name of a loader")
    parser.add_argument("--output", type=Path, default=FIGURES)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    first = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    rng, chosen = random.Random(first), [name for name in STRATEGIES if options.only in name]
    loaders = {}
    for name in chosen:
        loaders[name] = fuzz(name, options.seconds / len(chosen), rng)
        print(f"{name}: {json.dumps(loaders[name])}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    figures = {"seed": first, "seconds": options.seconds, "peak_bytes": peak, "loaders": loaders}
    options.output.write_text(json.dumps(figures, indent=2) + "\n")
    return int(any(found["crashes"] for found in loaders.values()))


if __name__ == "__main__":
    sys.exit(main())
