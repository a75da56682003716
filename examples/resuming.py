"""Which checkpoint to go on from, where the last save may have been cut short; and Ctrl-C that saves before it stops.

Trainer writes `checkpoint-N` file by file, `trainer_state.json` last: a run that is killed while it saves leaves a
folder without it. Trainer itself takes the folder with the largest N, whatever is in it, and where the optimizer is
missing it goes on with a new one and says nothing.
"""

from __future__ import annotations

import json
import signal
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import sort_checkpoints

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model*")


def checkpoint_to_resume(given: str | None, output: str) -> str | None:
    """Return the folder to resume from, or None for a new run.

    Args:
        given: `--resume_from_checkpoint`: None or "false", "true" or "last" (the last whole one of `output`), a folder.
        output: the folder of the run.

    Raises:
        ValueError: no whole checkpoint to go on from; a new run where an earlier one left checkpoints.
    """
    found = sort_checkpoints(output) if Path(output).is_dir() else []
    if given is None or given.lower() == "false":
        if found:
            raise ValueError(
                f"{output} holds {Path(found[-1]).name} of an earlier run; go on with --resume_from_checkpoint true, "
                "or choose another --output_dir."
            )
        return None
    if given.lower() not in ("true", "last"):
        if problem := defect(Path(given)):
            raise ValueError(f"{given} cannot be resumed: {problem}; name another, or `last` for the last whole one.")
        return given
    for folder in reversed(found):
        if (problem := defect(Path(folder))) is None:
            return folder
        print(f"Passing over {folder}: {problem}.", file=sys.stderr)
    raise ValueError(f"{output} holds no whole checkpoint to resume from; leave --resume_from_checkpoint out.")


def defect(folder: Path) -> str | None:
    """Return what keeps a checkpoint from being resumed exactly, in words, or None if it is whole."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no trainer_state.json, which is written last: the save was interrupted"
    except ValueError:
        return "its trainer_state.json is cut short: the save was interrupted"
    if any(folder.glob("global_step*")):  # DeepSpeed keeps weights and optimizer there
        return None
    if not any(folder.glob("optimizer*")):
        return "it holds no optimizer state"
    if not any(path for name in WEIGHTS for path in folder.glob(name)):
        return "it holds no weights"
    return _cut_short(folder)


def _cut_short(folder: Path) -> str | None:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} is not whole ({error})"
    for path in sorted([*folder.glob("*.pt"), *folder.glob("rng_state*.pth")]):
        if not zipfile.is_zipfile(path):  # what torch.save writes; the directory is at the end
            return f"{path.name} is not whole"
    return None


@contextmanager
def saving_on_interrupt() -> Iterator[None]:
    """Make the first Ctrl-C do what Trainer does on SIGTERM with `enable_jit_checkpoint`: save, then stop.

    Enter it once the Trainer is made, which is when it takes over SIGTERM.
    """
    save, before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def handler(_number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nSaving a checkpoint in a few seconds, then stopping; Ctrl-C again stops at once.", file=sys.stderr)
        if callable(save):
            save(signal.SIGTERM, frame)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
