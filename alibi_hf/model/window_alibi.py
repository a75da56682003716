"""Stub until the real module lands: the 2R bound."""

from __future__ import annotations

import math

import torch


def head_windows(
    query: torch.Tensor, key: torch.Tensor, slopes: torch.Tensor, scaling: float, eps: float
) -> torch.Tensor:
    """Return the window of each head, float32 `[heads]`."""
    groups = query.shape[1] // key.shape[1]
    longest = [states.float().norm(dim=-1).amax(dim=(0, 2)) for states in (query, key)]
    bound = 2 * scaling * longest[0] * longest[1].repeat_interleave(groups)
    return (bound - math.log(eps) - torch.log(-torch.expm1(-slopes))) / slopes
