"""What the references of several families share: a checkpoint's files, norms and attention in float64.

Written from the formulas, one head at a time; no code of the package is in it.

The package forms slope, distance and their product in float32 on purpose. With `single=True` each of those three is
rounded to float32 here too, so that everything else can be compared at float64's own precision.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

State = dict[str, torch.Tensor]
Bias = Callable[[int, torch.Tensor], torch.Tensor]  # head, distances [queries, keys] -> bias [queries, keys]


def read(folder: Path) -> tuple[dict[str, Any], State]:
    """The config and every tensor, in float64, by its name in the files."""
    state: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= {name: tensor.double() for name, tensor in load_file(path).items()}
    return json.loads((folder / "config.json").read_text()), state


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x over the root of its mean square, times the weight."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x without its mean, over its standard deviation, times the weight."""
    return rms(x - x.mean(-1, keepdim=True), weight, eps)


def silu(x: torch.Tensor) -> torch.Tensor:
    """x times its sigmoid."""
    return x / (1 + torch.exp(-x))


def slope(head: int, heads: int) -> float:
    """The paper's slope of one head: 2^(-8i/c) for the first c, a power of two; 2^(-4i/c), i odd, for the others."""
    power = 2 ** math.floor(math.log2(heads))
    return 2 ** (-8 * (head + 1) / power) if head < power else 2 ** (-4 * (2 * (head - power) + 1) / power)


def alibi(heads: int, single: bool, root: bool = False) -> Bias:
    """The bias of one head, minus slope times distance, or times its square root."""

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.float().double() if single else value

    def bias(head: int, distance: torch.Tensor) -> torch.Tensor:
        steepness = rounded(torch.tensor(slope(head, heads), dtype=torch.float64))
        return -rounded(steepness * rounded(distance.sqrt() if root else distance))

    return bias


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Bias) -> torch.Tensor:
    """Causal attention of one text, [tokens, heads * dim]: q [tokens, heads, dim], k and v [tokens, groups, dim]."""
    tokens, heads, dim = q.shape
    distance = torch.arange(tokens).double()[:, None] - torch.arange(tokens).double()
    outputs = []
    for head in range(heads):
        group = head // (heads // k.shape[1])
        scores = q[:, head] @ k[:, group].T / math.sqrt(dim) + bias(head, distance.clamp(min=0))
        outputs.append(scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v[:, group])
    return torch.cat(outputs, dim=-1)


def by_row(
    logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Logits [batch, tokens, vocab] of ids [batch, tokens], each row as if its masked tokens were not there: zeros."""
    rows = []
    for row, kept in zip(ids, torch.ones_like(ids) if mask is None else mask, strict=True):
        found = logits(row[kept.bool()])
        rows.append(torch.zeros(len(row), found.shape[-1], dtype=found.dtype))
        rows[-1][kept.bool()] = found
    return torch.stack(rows)
