"""`convert`: an upstream checkpoint to a folder that anyone loads with `trust_remote_code=True`.

One source tensor is held at a time. The folder appears by one rename, index and config last; an error leaves nothing.
"""

from pathlib import Path
from typing import Any

import torch

from alibi_hf.checkpoints.companions import write_card, write_companions, write_config
from alibi_hf.checkpoints.conversion import Conversion, record
from alibi_hf.checkpoints.options import SLACK, Progress, cast, keep_apart, parse_dtype
from alibi_hf.checkpoints.plan import Group
from alibi_hf.checkpoints.source import Checkpoint, require_finite
from alibi_hf.checkpoints.writer import Entry, ShardWriter, appearing, check_disk, parse_size


def convert(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
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
        verify: run `alibi_hf.verify` afterwards; the folder stays either way, marked.
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
    max_bytes = parse_size(max_shard_size)
    if verify:
        _check_device(device)  # before anything is written
    with appearing(out, overwrite) as folder:
        check_disk(folder, sum(entry.bytes for entry in entries) + SLACK)
        files = _write_weights(checkpoint, ShardWriter(folder, entries, max_bytes), target, allow_nonfinite, progress)
        conversion = record(checkpoint, out, files, command)
        write_companions(checkpoint, folder)
        write_card(checkpoint, conversion, folder)
        conversion.save(folder)
        write_config(checkpoint, folder, str(target or checkpoint.dtype).removeprefix("torch."))
    if verify:
        options = {"revision": revision, "allow_pickle": allow_pickle, "device": device, "progress": progress}
        _verify(checkpoint, conversion, source, options)
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


def _write_weights(
    checkpoint: Checkpoint,
    writer: ShardWriter,
    target: torch.dtype | None,
    allow_nonfinite: bool,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    total, done = sum(info.bytes for info in checkpoint.tensors.values()), 0
    try:
        for group in checkpoint.groups:
            _write_group(checkpoint, group, writer, target, allow_nonfinite)
            done += checkpoint.tensors[group.source].bytes
            if progress is not None:
                progress("converting", done, total)
        return writer.finish()
    finally:
        writer.close()


def _write_group(
    checkpoint: Checkpoint, group: Group, writer: ShardWriter, target: torch.dtype | None, allow_nonfinite: bool
) -> None:
    if group.fate == "tied":
        checkpoint.check_values(group, allow_nonfinite)
    if group.fate != "used":
        return
    tensor = checkpoint.get(group.source)
    if not allow_nonfinite:
        require_finite(group.source, tensor)
    for name, part in zip(group.targets, group.rule.forward(cast(group.source, tensor, target)), strict=True):
        writer.add(name, part)


def _verify(checkpoint: Checkpoint, conversion: Conversion, source: str | Path, options: dict[str, Any]) -> None:
    from alibi_hf.verification import verify

    out = conversion.output_path
    result = verify(source, out, **options)
    result.save(out)
    conversion.verification = result
    conversion.verified = bool(result.proved)
    conversion.save(out)
    write_card(checkpoint, conversion, out)


__all__ = ["convert"]
