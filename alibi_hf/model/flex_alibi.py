"""FlexAttention with ALiBi as an analytic score_mod: nothing of the size of the scores is built on a GPU.

On CUDA the kernel is compiled once. On CPU it holds the scores, as eager does: FlexAttention runs uncompiled there, has
no backward, and cannot be lowered inside a compiled model, where eager attention takes its place.

Source of the interface: PyTorch, `torch.nn.attention.flex_attention`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention

from .bias_alibi import Distances
from .dense_alibi import eager_attention, soft_cap
from .positions_alibi import is_tracing


def flex_alibi(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: Distances,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return attention output `[batch, heads, queries, dim]`; shapes as for `dense_alibi.eager_attention`.

    Raises:
        ValueError: with dropout, which FlexAttention does not have.
    """
    if dropout > 0:
        raise ValueError(f"flex_attention has no dropout, attention_dropout is {dropout}; use 'sdpa' or 'eager'.")
    if is_tracing() and query.device.type == "cpu":  # Inductor cannot lower flex_attention inside a model on CPU
        return eager_attention(query, key, value, distances, scaling, 0.0, softcap)[0]
    with torch.autocast(query.device.type, enabled=False):  # it would round the bias to 16 bits
        output = _kernel(query.device.type)(
            query,
            key,
            value,
            score_mod=_score_mod(distances, softcap),
            scale=scaling,
            enable_gqa=bool(query.shape[1] != key.shape[1]),
        )
    blind = _blind_rows(distances)
    return output if blind is None else output.masked_fill(blind, 0.0)


def _kernel(device: str) -> Callable[..., torch.Tensor]:
    if is_tracing():
        return flex_attention
    return _compiled() if device == "cuda" else _uncompiled


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _uncompiled(*args: Any, **kwargs: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*without torch.compile.*")
        return flex_attention(*args, **kwargs)


def _score_mod(distances: Distances, softcap: float | None) -> Callable[..., torch.Tensor]:
    """Return the score_mod: soft cap, bias, and minus infinity for what the query does not see."""
    visible, bias = _visible_mod(distances), _bias_mod(distances)
    mask = distances.custom_mask
    added = mask if mask is not None and mask.dtype != torch.bool else None

    def score_mod(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        score = soft_cap(score, softcap) + bias(b, h, q, k)
        if added is not None:
            score = score + added[_at(added, 0, b), _at(added, 1, h), q, k]
        return torch.where(visible(b, h, q, k), score, -torch.inf)

    return score_mod


def _at(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor | int:
    """Return the index into a dimension that may be broadcast."""
    return index if tensor.shape[dim] > 1 else index * 0


def _bias_mod(distances: Distances) -> Callable[..., torch.Tensor]:
    """Return the function of (batch, head, query, key) that gives the bias."""
    slopes, query, key, row = distances.slopes, distances.query_position, distances.key_position, distances.row
    if row is not None:
        return lambda b, h, q, k: row[_at(row, 0, b), h, k].float()

    def of_distance(h: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        distance = delta.to(torch.float32)
        return -slopes[h] * (distance.clamp(min=0).sqrt() if distances.sqrt else distance)

    if query is None or key is None:
        return lambda b, h, q, k: of_distance(h, distances.query_index[q] - k)
    return lambda b, h, q, k: of_distance(h, query[_at(query, 0, b), q] - key[_at(key, 0, b), k])


def _visible_mod(distances: Distances) -> Callable[..., torch.Tensor]:
    """Return the function of (batch, head, query, key) that says whether the query sees the key."""
    if distances.custom_mask is not None:
        return _custom_mod(distances.custom_mask)
    key_mask, query_document, key_document = distances.key_mask, distances.query_document, distances.key_document

    def causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        visible = k <= distances.query_index[q]
        if key_mask is not None:
            visible = visible & key_mask[b, k]
        if query_document is not None and key_document is not None:
            same = query_document[_at(query_document, 0, b), q] == key_document[_at(key_document, 0, b), k]
            visible = visible & same
        return visible

    return causal


def _custom_mod(mask: torch.Tensor) -> Callable[..., torch.Tensor]:
    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        entry = mask[_at(mask, 0, b), _at(mask, 1, h), q, k]
        return entry if mask.dtype == torch.bool else entry > torch.finfo(mask.dtype).min

    return visible


def _blind_rows(distances: Distances) -> torch.Tensor | None:
    """Return which queries see no key, bool `[batch or 1, heads or 1, queries, 1]`; None where there cannot be any."""
    mask = distances.custom_mask
    if mask is not None:
        visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        return ~visible.any(-1, keepdim=True)
    return None if distances.query_mask is None else ~distances.query_mask[:, None, :, None]
