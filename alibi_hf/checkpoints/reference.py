"""The upstream model of a checkpoint, filled from its own files: what verification compares with."""

from typing import Any, cast

import torch
from torch import nn

from alibi_hf.checkpoints.plan import Group
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import TensorError
from alibi_hf.families._reference import Reference


def load_reference(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    stored: torch.dtype | None = None,
    **raw_fields: Any,
) -> tuple[Reference, nn.Module]:
    """The family's reference for this checkpoint and its model, with the checkpoint's weights in `dtype`.

    Args:
        checkpoint: an opened language-model checkpoint.
        dtype: of every parameter; the weights are cast from the file's dtype once.
        device: where the model goes.
        stored: the dtype that the tensors are converted to; None for the file's.
        raw_fields: fields of upstream's config.json to set first, such as `max_seq_len=4096`.

    Raises:
        TensorError: if a parameter of the reference stays without a value, or a tensor finds no place.
    """
    reference = checkpoint.family.reference(checkpoint.config)
    model = reference.build({**checkpoint.raw, **raw_fields}, dtype)
    expected = set(model.state_dict())
    values: dict[str, torch.Tensor] = {}
    for group in checkpoint.groups:
        if group.fate == "dropped":
            continue
        name = reference_name(group, expected)
        if name not in expected:
            raise TensorError(f"{group.source} has no place in {reference.class_name}.")
        tensor = checkpoint.get(group.source)
        if reference.prepare is not None:
            tensor = reference.prepare(name, group.rule.widened(tensor, stored))
        values[name] = tensor.to(device=device, dtype=dtype, copy=True)
    model.load_state_dict(values, strict=False, assign=True)
    cast(Any, model).tie_weights()
    if left := [name for name, value in model.named_parameters() if value.is_meta]:
        raise TensorError(f"{reference.class_name} has parameters the checkpoint lacks: {', '.join(left[:5])}.")
    return reference, model.to(device)


def reference_name(group: Group, names: set[str]) -> str:
    """Return the reference's own name of a source tensor."""
    bare = group.rule.source_name(group.layer)
    return bare if bare in names else group.rule.prefix + bare


__all__ = ["load_reference", "reference_name"]
