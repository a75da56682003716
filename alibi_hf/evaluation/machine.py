"""What a computation ran on, for reports."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Return processor, cores, threads of PyTorch and system; of a CUDA device its name and memory too."""
    found: dict[str, Any] = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.device(device).type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"gpu": card.name, "gpu_bytes": card.total_memory}
    return found


def processor_name() -> str:
    """Return what the processor calls itself, or its architecture."""
    text = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named.group(1).strip() if named else platform.processor() or platform.machine()


__all__ = ["describe_machine", "processor_name"]
