"""Processes on CPU that talk through gloo, forked from one that has imported everything: imports take seconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing

ROOT = Path(__file__).parents[2]

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")), reason="needs gloo and fork"
)


def run(*command: str | Path) -> str:
    """Run Python with `command`, one thread a process; assert that it ends well and return what it printed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-9000:]
    return done.stdout


def fork(processes: int, work: Callable[[Path], None], folder: Path) -> None:
    """Call `work(folder)` in `processes` processes, named and connected as torchrun would."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = (processes, port, work, folder)
    torch.multiprocessing.start_processes(_enter, arguments, nprocs=processes, start_method="fork")


def _enter(rank: int, processes: int, port: int, work: Callable[[Path], None], folder: Path) -> None:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ.update(address, **place, LOCAL_WORLD_SIZE=str(processes))
    dist.init_process_group("gloo")
    work(folder)
    dist.barrier()
    dist.destroy_process_group()
