"""Peak memory of one call over what was there before it.

On CPU it is the peak of the resident set, which the kernel can start anew (Linux); each measurement runs in a process
of its own, so that no allocator hands out what an earlier call has left. On CUDA it is PyTorch's own count.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from threading import Event, Thread
from typing import TypeVar
from unittest.mock import patch

import torch

from alibi_hf.evaluation.peak import measure_peak

STATUS = Path("/proc/self/status")
# glibc then gives every larger tensor back as soon as it is freed, and the resident set follows the allocations.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}

Result = TypeVar("Result")


class ChildDiedError(RuntimeError):
    """The process that measured was killed, as a rule for want of memory."""


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Return by how many bytes memory rises at most while `call` runs; None where the system does not count it."""
    with measure_peak(torch.device(device)) as peak:
        before = _held(device)
        call()
        _held(device)  # which waits for a GPU
    return None if peak.bytes is None else peak.bytes - before


def _held(device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") if STATUS.exists() else 0


def peak_private(call: Callable[[], Result]) -> tuple[Result, int | None]:
    """Return what `call` returns, and the largest private memory of the process meanwhile (RssAnon, in bytes).

    Mapped files and the page cache are no part of it. It is sampled every few milliseconds; None where the system does
    not tell.
    """
    if not STATUS.exists():
        return call(), None
    peak, done = [_status("RssAnon")], Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _status("RssAnon"))

    thread = Thread(target=sample)
    thread.start()
    try:
        result = call()
    finally:
        done.set()
        thread.join()
    return result, peak[0]


def in_fresh_process(function: Callable[..., Result], *args: object) -> Result:
    """Return `function(*args)`, computed in a new process.

    Args:
        function: importable by name; what it takes and returns can be pickled.

    Raises:
        ChildDiedError: where the process is killed.
    """
    spawn = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, ALLOCATOR), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool as error:
            raise ChildDiedError("the process was killed, probably for want of memory") from error


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
