"""What provable windows save: the pairs of query and key that one layer leaves out, ideally and as sdpa plans it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alibi_hf.model.bias_alibi import Distances
from alibi_hf.model.sdpa_alibi import choose_groups
from alibi_hf.model.tiles_alibi import Group
from alibi_hf.model.window_alibi import default_eps, head_gaps, windows_of_gap


@dataclass(frozen=True)
class LayerWindows:
    """The windows of one layer, a list entry a head.

    Attributes:
        gaps: G of `window_alibi.py`, in nats; None where nothing is proved (see `plan`).
        windows: keys farther away, in tokens, cannot matter; the length of the text where every key may.
        saved: share of the causal pairs that are farther away than that.
        planned: share of the pairs that sdpa's tiles on CPU leave out, windows being shared by groups of heads and
            rounded up to tiles.
        plan: why, in words.
    """

    gaps: list[float | None]
    windows: list[int]
    saved: list[float]
    planned: list[float]
    plan: str


def find_windows(
    query: torch.Tensor, key: torch.Tensor, distances: Distances, scaling: float, softcap: float | None = None
) -> LayerWindows:
    """Return the windows of one layer for the rounding of `query`'s dtype.

    Args:
        query: `[1, heads, tokens, dim]`; key: `[1, key/value heads, tokens, dim]`.
    """
    heads, tokens = query.shape[1:3]
    if not distances.by_index or distances.sqrt or distances.rounded is not None or softcap is not None:
        plan = "dense: windows are proved for the exact bias on linear distances, and scores without a soft cap"
        return LayerWindows([None] * heads, [tokens] * heads, [0.0] * heads, [0.0] * heads, plan)
    eps = distances.window_eps or default_eps(query.dtype, gradients=False)
    gaps = head_gaps(query, key, distances.slopes, scaling)
    windows = [int(window) for window in windows_of_gap(gaps, distances.slopes, eps).clamp(max=tokens).tolist()]
    groups, form, reason = choose_groups(query, key, distances, scaling)
    return LayerWindows(
        gaps=gaps.tolist(),
        windows=windows,
        saved=[1 - share_kept(window, tokens) for window in windows],
        planned=_planned(groups, heads // key.shape[1], tokens),
        plan=f"{form}: {reason}",
    )


def share_kept(window: int, tokens: int) -> float:
    """Return the share of causal pairs whose distance is at most `window`."""
    distances = min(window, tokens - 1) + 1
    return distances * (2 * tokens - distances + 1) / (tokens * (tokens + 1))


def _planned(groups: list[Group], repeats: int, tokens: int) -> list[float]:
    """Return the share that tiles of these groups of key/value heads leave out, one a query head."""
    dense = Group(0, 1, tokens).pairs(tokens, tokens)
    saved = []
    for group in groups:
        kv_heads = group.stop - group.start
        saved += [1 - group.pairs(tokens, tokens) / kv_heads / dense] * (kv_heads * repeats)
    return saved


__all__ = ["LayerWindows", "find_windows", "share_kept"]
