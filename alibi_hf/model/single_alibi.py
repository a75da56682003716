"""One query against a cache on CPU, as two products: the fused kernel reads long keys up to four times slower.

With the norms that the cache keeps, a steep head reads only the keys in its window.
"""

from __future__ import annotations

import torch

from .bias_alibi import Distances
from .tiles_alibi import Group, neighbours
from .window_alibi import JENSEN_KEYS, KeyNorms, decode_windows, default_eps

MIN_KEYS = 4096  # below, finding the windows costs what they save
CALL_KEYS = 3000  # what two products more cost, in keys of one head


def single_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: Distances,
    scaling: float,
    norms: KeyNorms | None = None,
) -> torch.Tensor:
    """Return attention output `[batch, heads, 1, dim]`.

    Args:
        query: `[batch, heads, 1, dim]`; key, value: `[batch, key/value heads, keys, dim]`.
        norms: of these keys; None reads every key.
    """
    bias, blind = distances.block(0, 1, key.shape[2])
    with torch.autocast(query.device.type, enabled=False):
        if norms is None:
            output = _products(query, key, value, bias, scaling)
        else:
            groups = _plan(query, key, norms, distances, scaling)
            repeats = query.shape[1] // key.shape[1]
            output = torch.cat([_windowed(query, key, value, bias, scaling, group, repeats) for group in groups], dim=1)
    return output if blind is None else output.masked_fill(blind, 0.0)


def _plan(query: torch.Tensor, key: torch.Tensor, norms: KeyNorms, distances: Distances, scaling: float) -> list[Group]:
    eps = distances.window_eps or default_eps(query.dtype, gradients=False)
    jensen = key.shape[2] >= JENSEN_KEYS
    slopes = distances.slopes if distances.query_slopes is None else distances.query_slopes[..., 0]
    windows = decode_windows(query, key, norms, slopes, scaling, eps, jensen)
    windows = windows.unflatten(0, (key.shape[1], -1)).amax(-1)

    def cost(group: Group) -> int:
        return CALL_KEYS + (group.stop - group.start) * min(group.window + 1, key.shape[2])

    return neighbours(windows.tolist(), key.shape[2], cost)


def _windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scaling: float,
    group: Group,
    repeats: int,
) -> torch.Tensor:
    heads, queries = slice(group.start, group.stop), slice(group.start * repeats, group.stop * repeats)
    first = max(0, key.shape[2] - 1 - group.window)
    bias = bias[:, queries, :, first:]
    return _products(query[:, queries], key[:, heads, first:], value[:, heads, first:], bias, scaling)


def _products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attend by two products; keys come first: else oneDNN copies keys that lie in a cache with room to grow."""
    grouped = (query.shape[0], key.shape[1], query.shape[1] // key.shape[1], query.shape[3])
    scores = torch.matmul(key, query.reshape(grouped).transpose(2, 3)).transpose(2, 3)
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)).reshape(*query.shape[:3], -1)
    weights = torch.softmax(torch.add(bias, scores, alpha=scaling), dim=-1).to(value.dtype)
    return torch.matmul(weights.view(*grouped[:3], -1), value).view(query.shape)
