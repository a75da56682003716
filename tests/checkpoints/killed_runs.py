"""Converts again and again, each run killed at another moment, then goes on; run as `killed_runs.py FOLDER`.

Every run is a forked process: the imports are paid once. Prints how many runs were killed, and how many of those left
finished shards to go on with; first into a new folder, then over an old one.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from alibi_hf.checkpoints.convert import convert

torch.set_num_threads(1)
FOLDER = Path(sys.argv[1])
SOURCE, OUT, PARTIAL = FOLDER / "source", FOLDER / "out", FOLDER / ".out.partial"
OLD = {"mine": b"old"}
OPERATIONS = ("open", "os.", "shutil.")
EVENLY, LAST, RANDOM = 12, 6, 3  # kills spread over the operations, at the last ones (the renames), and at any time


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(out: Path, overwrite: bool, kill_at: int = 0, after: float = 0, resume: bool = False) -> tuple[bool, int]:
    """Convert in a forked process that dies at operation `kill_at`, or `after` seconds; (finished, operations)."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        count = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if event.startswith(OPERATIONS) and any(str(argument).startswith(str(FOLDER)) for argument in args):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        options = {"overwrite": overwrite, "resume": resume, "max_shard_size": 3000, "command": "x", "workers": 2}
        try:
            convert(SOURCE, out, verify=False, **options)
            os.write(write, str(count).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    if after:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    said = os.read(read, 100).decode()
    os.close(read)
    assert status == 0 or os.WIFSIGNALED(status), "the run ended with an error"
    return status == 0, int(said or 0)


def prepare(overwrite: bool) -> None:
    for folder in (OUT, PARTIAL, FOLDER / ".out.replaced"):
        shutil.rmtree(folder, ignore_errors=True)
    if overwrite:
        OUT.mkdir()
        (OUT / "mine").write_bytes(OLD["mine"])


def check_left(expected: dict[str, bytes], overwrite: bool) -> None:
    """What a kill leaves is the output as it was, or the new one whole."""
    if OUT.exists():
        assert content(OUT) in (OLD, expected), sorted(content(OUT))
    elif overwrite:  # between two renames: the next run puts it back
        assert content(FOLDER / ".out.replaced") == OLD and PARTIAL.exists()


def kill_and_go_on(overwrite: bool, kill_at: int, after: float, expected: dict[str, bytes]) -> tuple[bool, bool]:
    """One killed run and, if need be, the one that goes on; (killed, there was something to go on with)."""
    prepare(overwrite)
    finished, _ = run(OUT, overwrite, kill_at, after)
    check_left(expected, overwrite)
    journal = PARTIAL / ".resume.json"
    something = journal.exists() and bool(json.loads(journal.read_text())["finished"])
    if content(OUT) != expected:
        assert run(OUT, overwrite, resume=True)[0]
    assert content(OUT) == expected
    left = {path.name for path in FOLDER.iterdir()} - {"source", "straight", "out"}
    assert left <= (set() if finished else {".out.replaced"}), left
    return not finished, something


def main() -> None:
    started = time.monotonic()
    finished, operations = run(FOLDER / "straight", overwrite=False)
    took = time.monotonic() - started
    assert finished and operations > 100, operations
    expected = content(FOLDER / "straight")
    evenly = {1 + operations * step // EVENLY for step in range(EVENLY)}
    moments: list[tuple[int, float]] = [(step, 0) for step in evenly | set(range(operations - LAST, operations + 1))]
    moments += [(0, random.random() * took + 1e-3) for _ in range(RANDOM)]
    for overwrite in (False, True):
        results = [kill_and_go_on(overwrite, *moment, expected) for moment in moments]
        print(sum(killed for killed, _ in results), sum(something for _, something in results))


main()
