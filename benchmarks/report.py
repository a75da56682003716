"""Results as a JSON file: what was measured, on which machine, with which versions."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import alibi_hf
from alibi_hf.compact import finite
from alibi_hf.evaluation.machine import CPUINFO, processor_name

SCHEMA_VERSION = 1
RESULTS = Path(__file__).parent / "results"
WIDTH = 150  # of tables that go to a file
WIDE = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")  # instructions that decide speed


@dataclass
class Report:
    """One run of a benchmark.

    Attributes:
        benchmark: "attention", "model", "training", "conversion" or "evaluation".
        settings: the options of the command.
        machine, versions: where it ran.
        results: one dictionary a measurement.
        left_out: what was not measured, with the reason.
    """

    benchmark: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    results: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.time)

    @classmethod
    def start(cls, benchmark: str, settings: dict[str, Any], device: str) -> Report:
        """Return an empty report of this machine."""
        return cls(benchmark, settings, describe_machine(device), describe_versions())

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file; numbers that are not finite become null."""
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started))
        return finite(
            {
                "schema_version": SCHEMA_VERSION,
                "benchmark": self.benchmark,
                "started": date,
                "seconds": round(time.time() - self.started, 1),
                "machine": self.machine,
                "versions": self.versions,
                "settings": self.settings,
                "results": self.results,
                "left_out": self.left_out,
            }
        )

    def save(self, path: Path) -> None:
        """Write the file; called after every group of measurements, so that a run that is stopped leaves its share."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")

    def print_end(self, path: Path, console: Console) -> None:
        """Tell what was left out, and where the results are."""
        for row in self.left_out:
            console.print("Left out: " + ", ".join(str(value) for value in row.values()), style="dim")
        console.print(f"Results: {path}")


def make_console() -> Console:
    """Return a console as wide as the terminal, or `WIDTH` where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def result_path(benchmark: str, device: str, *words: str) -> Path:
    """Return where a result goes if nothing else is said: `results/<benchmark>-<machine>[-<words>].json`."""
    machine = describe_machine(device)
    name = "-".join([benchmark, machine["name"], *words])
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def describe_machine(device: str) -> dict[str, Any]:
    """Return the name of the processor or card, and what else decides its speed."""
    described = {
        "name": f"{processor_name()} {os.cpu_count()} cores",
        "cores": os.cpu_count(),
        "instructions": [name for name in WIDE if name in _cpu_flags()],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "device": "cpu",
    }
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        described |= {"name": card.name, "device": "cuda", "device_memory_bytes": card.total_memory}
    return described


def describe_versions() -> dict[str, str]:
    """Return the versions of everything that takes part."""
    versions = {
        "alibi_hf": alibi_hf.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return versions | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _cpu_flags() -> set[str]:
    text = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return set(match.group(1).split()) if match else set()
