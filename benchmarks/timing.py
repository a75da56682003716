"""Timing by interleaved rounds: every contender runs once a round, so that a busy machine slows all of them alike.

Ratios are formed within a round, against the first contender, and their median is reported: the load of a shared
machine changes from minute to minute, and cancels within a round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch

MIN_SECONDS = 0.02  # a sample is at least this long: faster calls are repeated within it
MIN_ROUNDS = 3
PATIENCE = 4  # times the time that was asked for; past it even those rounds are not run
SURE_SECONDS = 1.0  # a first call of this length on CPU is no matter of warming up


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        median_ms, min_ms, iqr_ms: over the rounds; the last is the distance between the quartiles.
        ratio: the time over that of the first contender in the same round, median over the rounds.
        rounds: samples taken; a sample is the mean of `calls` calls.
    """

    median_ms: float
    min_ms: float
    iqr_ms: float
    ratio: float
    rounds: int
    calls: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        return asdict(self)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` threads in PyTorch's operators on CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    contenders: Mapping[str, Callable[[], object]], repeats: int, seconds: float, device: str
) -> dict[str, Timing]:
    """Time the contenders in turn, once a round, after one call each to warm up.

    Args:
        contenders: what to call, by name; the first is what ratios are formed against.
        repeats: rounds; the order moves on by one each round, so that nobody always follows the same one.
        seconds: past it no round starts but the first `MIN_ROUNDS`, and past `PATIENCE` times it not even those.
    """
    names = list(contenders)
    calls = {name: _calls_per_sample(contenders[name], device) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for number in range(repeats):
        wanted = seconds * (1 if number >= MIN_ROUNDS else PATIENCE)
        if number and time.perf_counter() - started > wanted:
            break
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(_sample(contenders[name], calls[name], device))
    return {name: _timing(samples[name], samples[names[0]], calls[name]) for name in names}


def _calls_per_sample(call: Callable[[], object], device: str) -> int:
    """Warm up, and return how many calls make a sample of `MIN_SECONDS`."""
    took = _sample(call, 1, device)  # pays for kernels, thread pools and memory
    if took < SURE_SECONDS or device != "cpu":
        took = _sample(call, 1, device)
    return max(1, math.ceil(MIN_SECONDS / max(took, 1e-6)))


def _sample(call: Callable[[], object], calls: int, device: str) -> float:
    """Return the seconds that one call takes, on average over `calls`."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def synchronize(device: str) -> None:
    """Wait for everything that was queued on `device`."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _timing(samples: list[float], base: list[float], calls: int) -> Timing:
    low, _, high = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (0.0, 0.0, 0.0)
    ratio = median(own / other for own, other in zip(samples, base, strict=True))
    return Timing(1e3 * median(samples), 1e3 * min(samples), 1e3 * (high - low), ratio, len(samples), calls)
