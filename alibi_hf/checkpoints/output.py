"""A folder in this package's layout, written tensor by tensor: what `convert` and `retrofit` share.

Every thread holds one source tensor at a time. The folder appears by one rename; an error leaves
nothing, a kill what `resume` can go on from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alibi_hf.checkpoints.carried import carried_bytes
from alibi_hf.checkpoints.companions import generation_config, write_companions, write_config
from alibi_hf.checkpoints.conversion import versions
from alibi_hf.checkpoints.options import SLACK, Progress, cast, keep_apart, parse_dtype
from alibi_hf.checkpoints.parallel import ShardJobs, default_workers
from alibi_hf.checkpoints.plan import Group
from alibi_hf.checkpoints.reading import FileState
from alibi_hf.checkpoints.resume import Journal
from alibi_hf.checkpoints.source import Checkpoint, require_finite
from alibi_hf.checkpoints.writer import (
    Entry,
    appearing,
    check_disk,
    parse_size,
    partial_of,
    split_shards,
    write_index,
)
from alibi_hf.errors import ConfigFieldError


@dataclass(frozen=True)
class WriteOptions:
    """How a folder is written; see `convert` for what each means.

    Raises:
        ConfigFieldError: for a dtype or a number of workers that is none.
        CheckpointFileError: for a shard size that is none.
    """

    dtype: str | torch.dtype | None = None
    max_shard_size: int | str = "5GB"
    overwrite: bool = False
    resume: bool = False
    workers: int | None = None
    allow_nonfinite: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigFieldError(f"workers={self.workers} is no number of threads; give 1 or more.")
        _ = self.target, self.max_bytes

    @property
    def target(self) -> torch.dtype | None:
        """The dtype of the written weights, None for each tensor's own."""
        return parse_dtype(self.dtype)

    @property
    def max_bytes(self) -> int:
        """The most bytes of one weight file."""
        return parse_size(self.max_shard_size)


@dataclass(frozen=True)
class Written:
    """The working folder with weights, code, tokenizer and configs in it.

    Attributes:
        folder: the working folder, which becomes the output.
        files: name, SHA-256 and bytes of every weight file.
        threads: how many wrote them.
    """

    folder: Path
    files: list[dict[str, Any]]
    threads: int


@contextmanager
def writing(checkpoint: Checkpoint, out: Path, options: WriteOptions) -> Iterator[Written]:
    """Write everything but the record and the card, which the block adds; the rename follows it.

    Raises:
        AlibiError: its subclasses, about the source, the target folder, or the disk; nothing is left behind then.
    """
    keep_apart(checkpoint.path, out)
    carried, _ = checkpoint.carried_files(), generation_config(checkpoint)  # refused before the weights are written
    target, entries, threads = options.target, _entries(checkpoint, options.target), _workers(checkpoint, options)
    journal = _journal(checkpoint, partial_of(out), options)
    if options.resume:
        journal.read()
    make = partial(_convert_group, checkpoint, target=target, allow_nonfinite=options.allow_nonfinite)
    with appearing(out, options.overwrite, options.resume) as folder:
        beside = carried_bytes(checkpoint.path, carried) + SLACK
        check_disk(folder, sum(entry.bytes for entry in entries) - journal.bytes + beside)
        journal.write()
        _check_tied(checkpoint, options.allow_nonfinite)
        used = [group for group in checkpoint.groups if group.fate == "used"]
        jobs = ShardJobs(folder, split_shards(entries, options.max_bytes), used, make, journal, options.progress)
        files = jobs.run(threads)
        write_index(folder, jobs.shards)
        write_companions(checkpoint, folder)
        write_config(checkpoint, folder, str(target or checkpoint.dtype).removeprefix("torch."))
        yield Written(folder, files, threads)
        journal.require_same_source(checkpoint.path)


def _entries(checkpoint: Checkpoint, target: torch.dtype | None) -> list[Entry]:
    """Names, shapes and dtypes of what will be written, by running the rules on tensors without memory."""
    entries = []
    for group in checkpoint.groups:
        if group.fate == "used":
            info = checkpoint.tensors[group.source]
            empty = torch.empty(info.shape, dtype=target or info.dtype, device="meta")
            for name, part in zip(group.targets, group.rule.forward(empty), strict=True):
                entries.append(Entry(name, tuple(part.shape), part.dtype))
    return entries


def _journal(checkpoint: Checkpoint, folder: Path, options: WriteOptions) -> Journal:
    """The journal of this run: everything that decides what is written."""
    states = [FileState.of(path, with_header=True) for path in [checkpoint.path / "config.json", *checkpoint.shards]]
    decisive = {
        "dtype": str(options.target or "as stored"),
        "max_shard_size": options.max_bytes,
        "alibi_rounding": checkpoint.config.alibi_rounding,
        "allow_nonfinite": options.allow_nonfinite,
        "alibi_hf": versions()["alibi-hf"],
    }
    return Journal(folder, states, decisive)


def _workers(checkpoint: Checkpoint, options: WriteOptions) -> int:
    from alibi_hf.verification.memory import available_memory  # verification reads checkpoints, so not at import

    if any(path.suffix != ".safetensors" for path in checkpoint.shards):
        return 1  # one pickle is open at a time
    return options.workers or default_workers([info.bytes for info in checkpoint.tensors.values()], available_memory())


def _check_tied(checkpoint: Checkpoint, allow_nonfinite: bool) -> None:
    for group in checkpoint.groups:
        if group.fate == "tied":
            checkpoint.check_values(group, allow_nonfinite)


def _convert_group(
    checkpoint: Checkpoint, group: Group, target: torch.dtype | None, allow_nonfinite: bool
) -> tuple[torch.Tensor, ...]:
    tensor = checkpoint.get(group.source)
    if not allow_nonfinite:
        require_finite(group.source, tensor)
    tensor = group.rule.widened(tensor, target)
    return tuple(cast(group.source, part, target) for part in group.rule.forward(tensor))


__all__ = ["WriteOptions", "Written", "writing"]
