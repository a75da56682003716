"""Logits of whole rows and of a left-padded batch."""

from __future__ import annotations

import inspect

import torch
from torch import nn

KEPT_LOGITS = 2**27  # more float64 logits than this (1 GiB) are thinned out
KEPT_POSITIONS = 256


def kept_positions(shape: tuple[int, ...], vocab_size: int) -> torch.Tensor:
    """Return the positions of ids `[rows, length]` whose logits are compared: all, or an even choice of too many."""
    rows, length = shape
    if rows * length * vocab_size <= KEPT_LOGITS or length <= KEPT_POSITIONS:
        return torch.arange(length)
    return torch.linspace(0, length - 1, KEPT_POSITIONS, dtype=torch.float64).round().long()


@torch.no_grad()
def run_row(model: nn.Module, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits `[batch, positions, vocabulary]` of `ids` [batch, length], without mask and cache."""
    if positions is None or len(positions) == ids.shape[1]:
        return model(input_ids=ids, use_cache=False).logits
    positions = positions.to(ids.device)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits
    return model(input_ids=ids, use_cache=False).logits[:, positions]


def pad_left(rows: list[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask `[rows, longest]` of rows `[1, n_i]`, padded on the left with token `pad`."""
    longest = max(row.shape[1] for row in rows)
    ids = [nn.functional.pad(row, (longest - row.shape[1], 0), value=pad) for row in rows]
    mask = [nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows]
    return torch.cat(ids), torch.cat(mask)


@torch.no_grad()
def run_padded(model: nn.Module, rows: list[torch.Tensor], pad: int) -> torch.Tensor:
    """Return the logits `[tokens, vocabulary]` of the rows' own tokens, computed as one left-padded batch."""
    ids, mask = pad_left(rows, pad)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[mask.bool()]


def run_unpadded(model: nn.Module, rows: list[torch.Tensor]) -> torch.Tensor:
    """Return the same logits as `run_padded`, each row alone: what padding must not change."""
    return torch.cat([run_row(model, row)[0] for row in rows])
