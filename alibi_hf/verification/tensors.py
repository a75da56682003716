"""Every tensor of the source, made again from the output by inverting the rules, compared bit for bit.

A fold has no inverse: there the source is folded again and compared with what the output holds.
"""

from __future__ import annotations

from pathlib import Path

import torch

from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.checkpoints.plan import Group
from alibi_hf.checkpoints.reading import read_tensor
from alibi_hf.checkpoints.shards import list_tensors
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.verification.report import Check


def stored_dtype(output: str | Path) -> torch.dtype:
    """Return the dtype of the output's largest tensor."""
    return max(list_tensors(Path(output)).values(), key=lambda info: info.bytes).dtype


def check_tensors(checkpoint: Checkpoint, output: str | Path) -> Check:
    """Count the tensors that differ from the source's, that are missing, and that belong to nothing; one at a time.

    Where the output has another dtype, the source's values are cast to it first.
    """
    held = list_tensors(Path(output))
    used = [group for group in checkpoint.groups if group.fate == "used"]
    in_config = [group for group in checkpoint.groups if group.fate == "config"]
    wrong, cast = [], False
    for group in used:
        if any(name not in held for name in group.targets):
            wrong.append(f"{group.source} (missing)")
            continue
        ours = group.rule.inverse([read_tensor(held[name]) for name in group.targets])
        source = checkpoint.get(group.source)
        cast = cast or source.dtype != ours.dtype
        if group.rule.folded:
            (source,) = group.rule.forward(group.rule.widened(source, ours.dtype))
        if not same_bits(source.to(ours.dtype), ours):
            wrong.append(group.source)
    extra = sorted(held.keys() - {name for group in used for name in group.targets})
    wrong += [f"{name} (nothing in the source)" for name in extra]
    tied = [group for group in checkpoint.groups if group.fate == "tied"]
    wrong += [f"{group.source} (not tied)" for group in tied if not _is_tied(checkpoint, group.source, group.targets)]
    wrong += [f"{group.source} (in config.json)" for group in in_config if not _is_in_config(checkpoint, group, output)]
    kept = len(used) + len(in_config)
    count = f"{kept} tensors used, {len(tied)} tied, {len(checkpoint.groups) - kept - len(tied)} dropped"
    if folded := sum(group.rule.folded for group in used):
        count += f", {folded} of the used folded (the source was folded again to compare)"
    note = f"{count}; {'equal after the cast' if cast else 'bit for bit'}" if not wrong else f"differ: {wrong[:5]}"
    dtype = str(next(iter(held.values())).dtype).removeprefix("torch.")
    return Check("tensors", dtype, 0, float(len(wrong)), None, 0.0, not wrong, metric="differ", note=note)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if shape, dtype and every bit agree; unlike `==`, NaN equals the same NaN and 0 is not -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _is_in_config(checkpoint: Checkpoint, group: Group, output: str | Path) -> bool:
    """True if the field of the output's config holds the tensor's very numbers; a cast of the output spares it."""
    values = getattr(read_own_config(output), group.targets[0])
    return values is not None and same_bits(
        checkpoint.get(group.source).double().flatten(), torch.tensor(values, dtype=torch.float64)
    )


def _is_tied(checkpoint: Checkpoint, name: str, targets: tuple[str, ...]) -> bool:
    original = next(group for group in checkpoint.groups if group.fate == "used" and group.targets == targets)
    return same_bits(checkpoint.get(name), checkpoint.get(original.source))
