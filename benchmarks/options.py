"""The options that the commands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every timed benchmark."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{module}", description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", type=dtype_name, help="fp32, bf16, fp16 (default: fp32 bf16)")
    parser.add_argument("--threads", nargs="+", type=int, help="threads on CPU: all cores, and one")
    parser.add_argument("--repeats", type=int, default=7, help="rounds a case (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="start no new round of a case after this, but run at least three"
    )
    parser.add_argument("--full", action="store_true", help="everything; hours on a small machine")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/, by machine)")
    parser.add_argument("--plot", type=Path, help="also draw the results to this picture; needs the extra `plots`")
    return parser


def settle(options: argparse.Namespace, default: dict[str, Any], full: dict[str, Any]) -> None:
    """Fill in what was not given: from `full` with `--full`, else from `default`."""
    chosen = {"dtypes": ["float32", "bfloat16"], "threads": default_threads(options.device), **default}
    for name, value in (chosen | full if options.full else chosen).items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the report says about the command: everything but where files are."""
    return {name: value for name, value in vars(options).items() if name not in ("output", "plot", "checkpoints")}


def default_threads(device: str) -> list[int]:
    """Return all cores, and one; on CUDA threads do not matter."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [1] if device.startswith("cuda") else sorted({cores, 1}, reverse=True)


def dtype_name(name: str) -> str:
    """Return the full name of a dtype of the command line."""
    name = SHORT.get(name, name)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join([*SHORT, *DTYPES])}")
    return name
