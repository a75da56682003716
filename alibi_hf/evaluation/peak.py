"""The most memory that was in use while something ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what the kernel wants to read to set VmHWM back to VmRSS; proc(5)


@dataclass
class Peak:
    """Bytes at the peak: of the GPU's tensors, else of the process (Linux); None where the system does not count."""

    bytes: int | None = None


@contextmanager
def measure_peak(device: torch.device) -> Iterator[Peak]:
    """Fill in a `Peak` when the block ends, weights and all that was there before included."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield peak
        finally:
            peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:  # another system, or one that does not let a process do that
        yield peak
        return
    try:
        yield peak
    finally:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        peak.bytes = int(line.split()[1]) * 1024


__all__ = ["Peak", "measure_peak"]
