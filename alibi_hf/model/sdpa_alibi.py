"""The chooser behind `attn_implementation="sdpa"`: which form computes a call, and why, in one line of the debug log.

* segments: padding and packing; each document by one of the forms below, as if it were alone.
* causal: no bias (a model without ALiBi), and nothing cached: the kernel's own causality.
* single: one query against a cache.
* row: few tokens in bfloat16, without gradients.
* window, tiles: on CPU, anything by distance; with the provable windows of the heads, or without.
* ramp: anything by distance elsewhere, with dropout, or in a graph.
* block: anything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from transformers.utils import logging

from .bias_alibi import Distances
from .dense_alibi import (
    ROW_TOKENS,
    block_attention,
    causal_attention,
    fused_row_is_causal,
    ramp_attention,
    row_attention,
)
from .positions_alibi import is_tracing
from .segments_alibi import attend_segments, find_segments
from .single_alibi import MIN_KEYS as MIN_SINGLE_KEYS
from .single_alibi import single_attention
from .tiles_alibi import Group, plan_groups, tiled_attention
from .window_alibi import BLOCK, JENSEN_KEYS, KeyNorms, default_eps, head_windows

logger = logging.get_logger(__name__)

MIN_QUERIES = 256  # with fewer, finding the windows costs what they save
MIN_KEYS = 1024
MAX_SHARE = 0.8  # of the pairs of query and key that dense tiles compute


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: Distances,
    scaling: float,
    dropout: float = 0.0,
    key_norms: Callable[[], KeyNorms | None] | None = None,
) -> torch.Tensor:
    """Return attention output `[batch, heads, queries, dim]` by the form that fits.

    Args:
        query: `[batch, heads, queries, dim]`; key, value: `[batch, key/value heads, keys, dim]`.
        key_norms: gives the norms that the cache keeps of these keys, if it does.
    """
    rows = find_segments(distances, query.shape[0])
    if rows is not None:
        _explain(distances, "segments", "padding or documents", query, key)
        attend = functools.partial(sdpa_attention, scaling=scaling, dropout=dropout)
        return attend_segments(query, key, value, distances, rows, attend)
    form, reason = choose_form(query, distances, dropout)
    if form == "tiles":
        key, value = (states[:, :, : int(distances.offset) + query.shape[2]] for states in (key, value))
        groups, form, reason = choose_groups(query, key, distances, scaling)
        _explain(distances, form, reason, query, key)
        return tiled_attention(query, key, value, distances, scaling, groups)
    _explain(distances, form, reason, query, key)
    if form == "causal":
        return causal_attention(query, key, value, scaling, dropout)
    if form == "single":
        norms = key_norms() if key_norms is not None and _decode_window_fits(key, distances) else None
        return single_attention(query, key, value, distances, scaling, norms)
    if form == "row":
        return row_attention(query, key, value, distances, scaling)
    function = ramp_attention if form == "ramp" else block_attention
    return function(query, key, value, distances, scaling, dropout)


def choose_form(query: torch.Tensor, distances: Distances, dropout: float) -> tuple[str, str]:
    """Return "single", "causal", "row", "tiles", "ramp" or "block", and the reason."""
    eager_on_cpu = query.device.type == "cpu" and not is_tracing() and dropout == 0.0
    if query.shape[2] == 1:
        return ("single", "one query on CPU") if eager_on_cpu else ("block", "one query")
    if not distances.by_index:
        return "block", "masks or rounded biases"
    if not distances.biased and query.shape[2] == distances.num_keys:
        return "causal", "no bias"
    if not eager_on_cpu:
        return "ramp", "by distance, with dropout, in a graph, or not on CPU"
    if _row_fits(query, distances):
        return "row", f"bfloat16, at most {ROW_TOKENS} tokens, no gradients"
    return "tiles", ""


def _row_fits(query: torch.Tensor, distances: Distances) -> bool:
    """True where a row of absolute positions, with the kernel's own causality, loses nothing."""
    return (
        query.dtype == torch.bfloat16
        and not distances.sqrt
        and distances.rounded is None
        and not torch.is_grad_enabled()
        and query.shape[2] == distances.num_keys <= ROW_TOKENS
        and fused_row_is_causal()
    )


def choose_groups(
    query: torch.Tensor, key: torch.Tensor, distances: Distances, scaling: float
) -> tuple[list[Group], str, str]:
    """Return the groups of heads to compute together, "window" or "tiles", and the reason.

    Args:
        query: `[batch, heads, queries, dim]`; key: `[batch, key/value heads, keys, dim]`, ending with the last query.
    """
    queries, keys = query.shape[2], key.shape[2]
    dense = Group(0, key.shape[1], keys)
    if not distances.window or distances.sqrt:
        return [dense], "tiles", "attention_window is off, or distances are not linear"
    if queries < MIN_QUERIES or keys < MIN_KEYS or not isinstance(distances.offset, int):
        return [dense], "tiles", f"fewer than {MIN_QUERIES} queries or {MIN_KEYS} keys, or a static cache"
    eps = distances.window_eps or default_eps(query.dtype, gradients=torch.is_grad_enabled())
    windows = head_windows(query, key, distances.slopes, scaling, eps, jensen=keys >= JENSEN_KEYS)
    groups = plan_groups(windows.unflatten(0, (key.shape[1], -1)).amax(-1).tolist(), queries, keys)
    share = sum(group.pairs(queries, keys) for group in groups) / dense.pairs(queries, keys)
    if share > MAX_SHARE:
        return [dense], "tiles", f"norms so large that windows would leave {share:.0%} of the work"
    return groups, "window", f"{share:.0%} of the work left, {len(groups)} groups of heads"


def _decode_window_fits(key: torch.Tensor, distances: Distances) -> bool:
    """True where one query may leave out keys: they are many, and distance is at least the difference of indices."""
    if not distances.window or distances.sqrt or key.shape[2] < MIN_SINGLE_KEYS or distances.row is not None:
        return False
    if distances.custom_mask is not None or not isinstance(distances.offset, int):
        return False
    return distances.key_mask is None or distances.once("left_padded", lambda: _is_left_padded(distances, BLOCK))


def _is_left_padded(distances: Distances, tokens: int) -> bool:
    """True where each row ends with at least `tokens` keys that count, and masks none but those before them."""
    mask = distances.key_mask
    assert mask is not None
    kept = mask.sum(-1)
    return bool(((kept == distances.num_keys - mask.int().argmax(-1)) & (kept >= tokens)).all())


def _explain(distances: Distances, form: str, reason: str, query: torch.Tensor, key: torch.Tensor) -> None:
    """Say once a call, in the first layer, which form computes it."""
    if is_tracing() or "explained" in distances.shared:
        return
    distances.shared["explained"] = True
    logger.debug(
        f"sdpa: {form} form ({reason}) for {query.shape[2]} queries and {key.shape[2]} keys, {query.shape[1]} heads, "
        f"{query.dtype}, {query.device.type}."
    )
