"""`convert`: an upstream checkpoint to a folder that anyone loads with `trust_remote_code=True`.

Every thread holds one source tensor at a time. The folder appears by one rename, index and config last; an error leaves
nothing, a kill what `resume` can go on from.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from alibi_hf.checkpoints.companions import write_card, write_companions, write_config
from alibi_hf.checkpoints.conversion import Conversion, record, versions
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


def convert(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    workers: int | None = None,
    verify: bool = True,
    layerwise: bool = False,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    alibi_rounding: str = "exact",
    device: str = "cpu",
    progress: Progress | None = None,
    command: str | None = None,
) -> Conversion:
    """Convert a checkpoint and, unless told otherwise, prove the result.

    Args:
        source: a folder, or a Hub id.
        output: the folder to write; must be absent or empty unless `overwrite`.
        dtype: of the written weights, "float32", "bfloat16", ...; None keeps each tensor's own.
        max_shard_size: the most bytes of one weight file, a number or "5GB".
        revision: branch, tag or commit of a Hub id.
        overwrite: replace what is in `output`.
        resume: go on where a run that was killed stopped, if there was one; the shards that it finished are checked by
            their SHA-256, and what is damaged is written again.
        workers: shards that are written at once; each thread holds one tensor, up to three times. The default depends
            on processors and free memory; pickles are read by one.
        verify: run `alibi_hf.verify` afterwards; the folder stays either way, marked.
        layerwise: verify layer by layer, which holds one layer in memory.
        allow_pickle: read `pytorch_model*.bin` where there are no safetensors.
        allow_nonfinite: take NaN and Inf weights as they are.
        alibi_rounding: "exact", or the family's own rounding where it has one.
        device: where the verification computes.
        progress: called with what is being done, bytes done and bytes in all.
        command: what to write down as the command; the process's own if not given.

    Raises:
        AlibiError: its subclasses, about the source, the target folder, or the disk; nothing is left behind then.
    """
    out = Path(output).expanduser()
    checkpoint = Checkpoint.open(source, revision, allow_pickle, alibi_rounding=alibi_rounding)
    keep_apart(checkpoint.path, out)
    target = parse_dtype(dtype)
    entries = _entries(checkpoint, target)
    max_bytes, threads = parse_size(max_shard_size), _workers(checkpoint, workers)
    if verify:
        _check_device(device)  # before anything is written
    journal = _journal(checkpoint, partial_of(out), target, max_bytes, allow_nonfinite)
    if resume:
        journal.read()
    make = partial(_convert_group, checkpoint, target=target, allow_nonfinite=allow_nonfinite)
    with appearing(out, overwrite, resume) as folder:
        check_disk(folder, sum(entry.bytes for entry in entries) - journal.bytes + SLACK)
        journal.write()
        _check_tied(checkpoint, allow_nonfinite)
        used = [group for group in checkpoint.groups if group.fate == "used"]
        jobs = ShardJobs(folder, split_shards(entries, max_bytes), used, make, journal, progress)
        files = jobs.run(threads)
        write_index(folder, jobs.shards)
        conversion = record(checkpoint, out, files, command, threads)
        journal.require_same_source(checkpoint.path)
        write_companions(checkpoint, folder)
        write_card(checkpoint, conversion, folder)
        conversion.save(folder)
        write_config(checkpoint, folder, str(target or checkpoint.dtype).removeprefix("torch."))
    if verify:
        options = {"revision": revision, "allow_pickle": allow_pickle, "device": device, "progress": progress}
        _verify(checkpoint, conversion, source, layerwise, options)
    return conversion


def _check_device(device: str) -> None:
    from alibi_hf.verification.memory import check_device  # verification reads checkpoints, so not at import

    check_device(device)


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


def _journal(
    checkpoint: Checkpoint, folder: Path, target: torch.dtype | None, max_bytes: int, allow_nonfinite: bool
) -> Journal:
    """The journal of this run: everything that decides what is written."""
    states = [FileState.of(path, with_header=True) for path in [checkpoint.path / "config.json", *checkpoint.shards]]
    options = {
        "dtype": str(target or "as stored"),
        "max_shard_size": max_bytes,
        "alibi_rounding": checkpoint.config.alibi_rounding,
        "allow_nonfinite": allow_nonfinite,
        "alibi_hf": versions()["alibi-hf"],
    }
    return Journal(folder, states, options)


def _workers(checkpoint: Checkpoint, asked: int | None) -> int:
    from alibi_hf.verification.memory import available_memory  # verification reads checkpoints, so not at import

    if asked is not None and asked < 1:
        raise ConfigFieldError(f"workers={asked} is no number of threads; give 1 or more.")
    if any(path.suffix != ".safetensors" for path in checkpoint.shards):
        return 1  # one pickle is open at a time
    return asked or default_workers([info.bytes for info in checkpoint.tensors.values()], available_memory())


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


def _verify(
    checkpoint: Checkpoint, conversion: Conversion, source: str | Path, layerwise: bool, options: dict[str, Any]
) -> None:
    from alibi_hf.verification import LAYERWISE, PARTS, verify

    out = conversion.output_path
    result = verify(source, out, only=LAYERWISE if layerwise else PARTS, **options)
    result.save(out)
    conversion.verification = result
    conversion.verified = bool(result.proved)
    conversion.save(out)
    write_card(checkpoint, conversion, out)


__all__ = ["convert"]
