"""A tiny checkpoint from a list of shapes: random weights that keep activations of order one, norms near one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.builders import write


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """One tensor a shape: biases near zero, other vectors near one, matrices scaled by their columns."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[name] = 0.1 * values + (0.0 if name.endswith("bias") else 1.0)
        else:
            tensors[name] = values * (1.5 / shape[1] ** 0.5)
    return tensors


def write_random(
    folder: Path,
    raw: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int = 0,
    start: str = "",
    **how: Any,
) -> Path:
    """config.json and safetensors with `start` before every name; `how` goes on to `tests.builders.write`."""
    tensors = {start + name: tensor for name, tensor in random_tensors(shapes, seed).items()}
    return write(folder, raw, tensors, **how)
