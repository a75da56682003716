"""What `convert` and `export` do alike with their options: the dtype, and an output that must not be the source."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from alibi_hf.errors import CheckpointFileError, ConfigFieldError, TensorError

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all
SLACK = 64 * 10**6  # bytes for tokenizer, code and reports beside the weights
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def keep_apart(source: Path, out: Path) -> None:
    """`CheckpointFileError` where writing `out` would replace `source`, or `out` is a link to itself."""
    try:
        source, out = source.resolve(), out.resolve()
    except (OSError, RuntimeError) as error:  # which of them depends on Python's version
        raise CheckpointFileError(f"{out} cannot be written: {error}; choose another folder.") from error
    if source == out or out in source.parents:
        raise CheckpointFileError(f"writing to {out} would replace the source {source}; choose another folder.")


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of that name; None (also for "auto") keeps each tensor's own. `ConfigFieldError` for an unknown one."""
    if dtype is None or dtype == "auto":
        return None
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ConfigFieldError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}.")
    return found


def cast(name: str, tensor: Tensor, target: torch.dtype | None) -> Tensor:
    """The tensor in `target`, if one is given; `TensorError` where values of it become infinite there."""
    if target is None or tensor.dtype == target:
        return tensor
    narrowed = tensor.to(target)
    if (over := int((torch.isinf(narrowed) & ~torch.isinf(tensor)).sum())) > 0:
        largest = tensor[torch.isfinite(tensor)].abs().max().item()
        raise TensorError(
            f"{name} has {over} values that {target} cannot hold (largest {largest:.3g}, limit "
            f"{torch.finfo(target).max:.3g}); choose bfloat16 or float32."
        )
    return narrowed


__all__ = ["SLACK", "Progress", "cast", "keep_apart", "parse_dtype"]
