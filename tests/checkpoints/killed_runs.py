"""Converts again and again, each run killed at another moment, then goes on; run as `killed_runs.py FOLDER new|overwrite`.

Every run is a forked process: the imports are paid once. Prints how many runs were killed, and how many of those left
finished shards to go on with.
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
FOLDER, OVERWRITE = Path(sys.argv[1]), sys.argv[2] == "overwrite"
SOURCE, OUT, PARTIAL = FOLDER / "source", FOLDER / "out", FOLDER / ".out.partial"
OLD = {"mine": b"old"}
OPERATIONS = ("open", "os.", "shutil.")
STRIDE = 4  # a kill at every fourth operation
RANDOM = 6


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(out: Path, kill_at: int | None = None, resume: bool = False, after: float | None = None) -> tuple[bool, int]:
    """Convert in a forked process that dies at operation `kill_at`, or `after` seconds; (finished, operations)."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        count, below = 0, str(FOLDER)

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            if event.startswith(OPERATIONS) and any(
                isinstance(a, (str, Path)) and str(a).startswith(below) for a in args
            ):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            convert(
                SOURCE,
                out,
                verify=False,
                max_shard_size=3000,
                command="x",
                overwrite=OVERWRITE,
                resume=resume,
                workers=2,
            )
            os.write(write, str(count).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    said = os.read(read, 100).decode()
    os.close(read)
    assert status == 0 or os.WIFSIGNALED(status), "the run ended with an error"
    return status == 0, int(said or 0)


def prepare() -> None:
    for folder in (OUT, PARTIAL, FOLDER / ".out.replaced"):
        shutil.rmtree(folder, ignore_errors=True)
    if OVERWRITE:
        OUT.mkdir()
        (OUT / "mine").write_bytes(OLD["mine"])


def check_left(expected: dict[str, bytes]) -> None:
    """What a kill leaves is the output as it was, or the new one whole."""
    replaced = FOLDER / ".out.replaced"
    if OUT.exists():
        assert content(OUT) in (OLD, expected), sorted(content(OUT))
    elif OVERWRITE:
        assert content(replaced) == OLD and PARTIAL.exists()  # between two renames: the next run puts it back


def main() -> None:
    started = time.monotonic()
    prepare()
    finished, operations = run(FOLDER / "straight")
    took = time.monotonic() - started
    assert finished and operations > 100
    expected, kills, resumed = content(FOLDER / "straight"), 0, 0
    moments = [(step, None) for step in range(1, operations + 40, STRIDE)]
    moments += [(None, random.random() * took) for _ in range(RANDOM)]
    for step, after in moments:
        prepare()
        finished, _ = run(OUT, kill_at=step, after=after)
        kills += not finished
        check_left(expected)
        journal = PARTIAL / ".resume.json"
        resumed += journal.exists() and bool(json.loads(journal.read_text())["finished"])
        if not finished and content(OUT) != expected:
            assert run(OUT, resume=True)[0]
        assert content(OUT) == expected
        left = {path.name for path in FOLDER.iterdir()} - {"source", "straight", "out"}
        assert left <= ({".out.replaced"} if not finished else set()), left
    print(kills, resumed)


main()
