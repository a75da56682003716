"""One loader against bad files for a while, and what came of it."""

import tests.conftest  # noqa: F401, I001  (no network, one thread)

import random
import resource
import time
import traceback
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from transformers.utils import logging

from tests.fuzz.loaders import STRATEGIES, Case, run

ADDRESS_SPACE = 16 << 30  # bytes; PyTorch's own libraries map several, and whatever asks for more fails
QUIET = settings(
    max_examples=100,  # a seed
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)


def fuzz(name: str, seconds: float, first: int) -> dict[str, Any]:
    """One loader's figures after `seconds` of inputs."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    outcomes: Counter[str] = Counter()
    crashes: set[str] = set()
    slowest, rng = 0.0, random.Random(f"{first} {name}")

    def try_one(case: Case) -> None:
        nonlocal slowest
        start = time.process_time()
        outcomes[run(case)] += 1
        slowest = max(slowest, time.process_time() - start)

    end, started = time.monotonic() + seconds, time.process_time()
    while time.monotonic() < end:
        try:
            seed(rng.getrandbits(64))(QUIET(given(STRATEGIES[name])(try_one)))()
        except Exception as error:  # an ExceptionGroup of several, too
            crashes.add(f"{type(error).__name__}: {error}"[:300])
            traceback.print_exc()
    return {
        "inputs": outcomes.total(),
        "seconds": round(time.process_time() - started),
        "slowest_seconds": round(slowest, 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        "outcomes": dict(sorted(outcomes.items())),
        "crashes": sorted(crashes),
    }
