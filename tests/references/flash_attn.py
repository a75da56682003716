"""A stand-in for the package `flash_attn`, written from its documentation; no code of the project is in it.

Scores and softmax are float64; the bias is formed in float32 and rounded there, as the kernels form it. As documented:
causality is aligned at the last query and the last key, a window `(left, right)` is relative to that alignment, -1 or a
window of all keys is none, slopes are positive and float32, of all sequences or of each (also where they lie behind one
another), rows that see nothing give zeros, and grouped heads share keys in order. As in `csrc/flash_attn`: without a
window, causal attention adds slope times key index instead of minus slope times |i - j|, and the soft cap comes before
either.
"""

from __future__ import annotations

import math
from typing import Any

import torch

DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
__version__ = "2.8.3"


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """Return `[batch, queries, heads, dim]` for q of that shape and k, v `[batch, keys, key/value heads, dim]`."""
    assert q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] and k.shape == v.shape
    window = closed_window(window_size, k.shape[1])
    slopes = slopes_of(alibi_slopes, len(q))
    rows = [
        attend(*row, dropout_p, softmax_scale, causal, window, softcap, own)
        for *row, own in zip(q, k, v, slopes, strict=True)
    ]
    return torch.stack(rows)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> torch.Tensor:
    """Return `[tokens, heads, dim]` for sequences that lie behind one another; bounds are int32 `[sequences + 1]`."""
    assert q.dim() == k.dim() == v.dim() == 3 and k.shape == v.shape
    for bounds, states, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == states.shape[0]
        assert type(longest) is int and bounds.diff().max() == longest
    assert cu_seqlens_q.shape == cu_seqlens_k.shape
    window = closed_window(window_size, max_seqlen_k)
    outputs = [q[:0]]
    spans = (torch.stack([bounds[:-1], bounds[1:]], dim=1).tolist() for bounds in (cu_seqlens_q, cu_seqlens_k))
    slopes = slopes_of(alibi_slopes, len(cu_seqlens_q) - 1)
    for (q_start, q_end), (k_start, k_end), own in zip(*spans, slopes, strict=True):
        states = q[q_start:q_end], k[k_start:k_end], v[k_start:k_end]
        outputs.append(attend(*states, dropout_p, softmax_scale, causal, window, softcap, own))
    return torch.cat(outputs)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: torch.Tensor | None = None,
    cache_batch_idx: Any = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor:
    """Return attention over places `cache_leftpad..cache_seqlens` of each row of the cache; it has no backward."""
    assert k is None and v is None and block_table is None, "this stand-in only reads"
    assert not (torch.is_grad_enabled() and any(states.requires_grad for states in (q, k_cache, v_cache)))
    window = closed_window(window_size, k_cache.shape[1])
    rows, slopes = [], slopes_of(alibi_slopes, len(q))
    for row, states in enumerate(q):
        start = 0 if cache_leftpad is None else int(int32(cache_leftpad)[row])
        end = int(int32(cache_seqlens)[row])
        assert 0 <= start <= end <= k_cache.shape[1]
        filled = k_cache[row, start:end], v_cache[row, start:end]
        rows.append(attend(states, *filled, 0.0, softmax_scale, causal, window, softcap, slopes[row]))
    return torch.stack(rows)


def int32(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, which has to be int32 and contiguous."""
    assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    return tensor


def slopes_of(alibi_slopes: torch.Tensor | None, sequences: int) -> list[torch.Tensor | None]:
    """Return the slopes of each row of a batch or each sequence, from `[heads]` or `[sequences, heads]`."""
    if alibi_slopes is None or alibi_slopes.dim() == 1:
        return [alibi_slopes] * sequences
    assert len(alibi_slopes) == sequences
    return list(alibi_slopes)


def closed_window(window_size: tuple[int, int], longest_keys: int) -> tuple[int, int]:
    """Return the window, in which a side as long as the keys is none."""
    left, right = (-1 if side >= longest_keys else side for side in window_size)
    return left, right


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
) -> torch.Tensor:
    """Return `[queries, heads, dim]` of one sequence, from q of that shape and k, v `[keys, key/value heads, dim]`."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in DTYPES, q.dtype
    assert q.shape[-1] <= 256 and all(states.stride(-1) == 1 for states in (q, k, v))
    assert not (softcap > 0 and dropout_p > 0)
    left, right = (window[0], 0) if causal else window
    queries, heads, dim = q.shape
    keys, groups = k.shape[:2]
    shared = torch.arange(heads, device=q.device) // (heads // groups)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()[:, shared])
    scores = scores * (1 / math.sqrt(dim) if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(queries, device=q.device)[:, None] + keys - queries
    j = torch.arange(keys, device=q.device)[None, :]
    if alibi_slopes is not None:
        assert alibi_slopes.dtype == torch.float32 and alibi_slopes.shape == (heads,) and alibi_slopes.stride(-1) == 1
        by_key = causal and left < 0
        scores = scores + (alibi_slopes[:, None, None] * (j if by_key else -(i - j).abs()).float()).double()
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if left >= 0:
        seen = seen & (j >= i - left)
    if right >= 0:
        seen = seen & (j <= i + right)
    weights = scores.masked_fill(~seen, -1e300).softmax(-1).masked_fill(~seen, 0.0)
    weights = torch.nn.functional.dropout(weights, dropout_p)
    return torch.einsum("hqk,khd->qhd", weights, v.double()[:, shared]).to(q.dtype)
