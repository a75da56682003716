"""What FlexAttention's GPU kernels compute from a `BlockMask`, in plain torch and any dtype, and what they read.

The library's own uncompiled path applies the mask_mod everywhere and never looks at the lists; the kernels read only
the blocks that the lists name, and apply the mask_mod only in those of the partial list. Here every list counts:
forward from the key lists, backward by autograd, and the query lists, which the kernels use in backward, have to be
the transpose of the key lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def listed(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return which blocks the lists name, bool `[batch, heads, rows, columns]`.

    Args:
        counts: int32 `[batch, heads, rows]`; indices: int32 `[batch, heads, rows, columns]`, read up to the count.
    """
    assert counts.is_contiguous() and counts.dtype == indices.dtype == torch.int32
    assert indices.stride(-1) == 1 and counts.shape == indices.shape[:3]
    assert (counts >= 0).all() and (counts <= indices.shape[3]).all()
    assert (indices >= 0).all() and (indices < indices.shape[3]).all()
    read = torch.arange(indices.shape[3]) < counts[..., None]
    named = torch.zeros(indices.shape, dtype=torch.int32)
    named.scatter_add_(3, indices.long(), read.int())
    assert (named <= 1).all(), "a block is listed twice"
    return named.bool()


def blocks_read(mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which pairs of blocks are read in part and in full, bool `[batch, heads, query blocks, key blocks]`."""
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    assert torch.equal(partial, listed(mask.q_num_blocks, mask.q_indices).transpose(2, 3))
    if mask.full_kv_num_blocks is None:
        return partial, torch.zeros_like(partial)
    # The kernels take the number of heads, and of rows, from the partial counts for both lists.
    assert mask.full_kv_num_blocks.shape == mask.kv_num_blocks.shape == (*mask.q_num_blocks.shape[:2], partial.shape[2])
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(full, listed(mask.full_q_num_blocks, mask.full_q_indices).transpose(2, 3))
    assert not (partial & full).any(), "a block is in both lists"
    return partial, full


def flex_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    scale: float,
    enable_gqa: bool,
    block_mask: Any = None,
) -> torch.Tensor:
    """Return what `flex_attention` with the same arguments computes when compiled."""
    batch, heads, queries, _ = query.shape
    keys, groups = key.shape[2], heads // key.shape[1]
    assert enable_gqa == (groups > 1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
    q, k = torch.arange(queries)[:, None], torch.arange(keys)
    scores = score_mod(query @ key.transpose(2, 3) * scale, b, h, q, k)
    if block_mask is not None:
        assert block_mask.seq_lengths == (queries, keys)
        partial, full = (
            blocks.repeat_interleave(128, 2).repeat_interleave(128, 3)[:, :, :queries, :keys]
            for blocks in blocks_read(block_mask)
        )
        scores = scores.masked_fill(~(full | (partial & block_mask.mask_mod(b, h, q, k))), -torch.inf)
    weights = scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
    return weights.to(value.dtype) @ value
