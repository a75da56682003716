"""Which blocks of 128 keys a block of 128 queries reads: FlexAttention's `BlockMask`, from the distances of a call.

* Causality, documents, padding and a static cache's empty places are seen here by the smallest and the largest index
  and document of a block; so a list may hold a block too many, never one too few. The mask_mod decides inside blocks
  that are seen in part; blocks that are seen whole do without it.
* The lists are made once a call and shared by layers and heads. They start with the nearest block, so a window of any
  length is a prefix: only how many blocks of a list are read depends on head and data, and nothing reaches the host.

Source of the interface: PyTorch, `torch.nn.attention.flex_attention.BlockMask`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from .bias_alibi import Distances

BLOCK = 128  # FlexAttention's own block size; the blocks of its kernels divide it
HIDDEN = -(2**62)  # the document of a masked key: no query's; `pad` takes floats, which hold a power of two


def num_blocks(tokens: int) -> int:
    """Return how many blocks hold `tokens` tokens."""
    return (tokens + BLOCK - 1) // BLOCK


@dataclasses.dataclass
class Blocks:
    """The pairs of query and key blocks that are read, and in which order.

    Attributes:
        partial: bool `[batch or 1, query blocks, key blocks]`, read, but not every query sees every key.
        full: same, every query sees every key; None in decoding, where all are in `partial`: FlexAttention's decoding
            kernel shares out evenly among processors only a list without full blocks.
        gap: int64 `[query blocks, key blocks]`, the smallest `query - key` in the pair, by index.
        kv_indices, full_kv_indices: int32 `[batch or 1, 1, query blocks, key blocks]`, key blocks, the nearest first.
        q_indices, full_q_indices: int32 `[batch or 1, 1, key blocks, query blocks]`, query blocks, the nearest first.
    """

    partial: torch.Tensor
    full: torch.Tensor | None
    gap: torch.Tensor
    kv_indices: torch.Tensor
    full_kv_indices: torch.Tensor | None
    q_indices: torch.Tensor
    full_q_indices: torch.Tensor | None


def make_blocks(distances: Distances, decoding: bool = False) -> Blocks:
    """Return the blocks that causality, documents and padding of a call leave; not for a custom mask.

    Args:
        decoding: list no block as full.
    """
    index = distances.query_index
    queries, device = index.numel(), index.device
    first = index[:1] + BLOCK * torch.arange(num_blocks(queries), device=device)
    last = torch.minimum(first + BLOCK - 1, index[-1:])
    key_first = BLOCK * torch.arange(num_blocks(distances.num_keys), device=device)
    key_last = key_first + BLOCK - 1
    read = (key_first <= last[:, None])[None]
    full = (key_last <= first[:, None])[None]
    if distances.key_mask is not None or distances.key_document is not None:
        met, same = _documents_met(distances, first.numel(), key_first.numel())
        read, full = read & met, full & same
    gap = first[:, None] - key_last
    if decoding:
        return Blocks(read, None, gap, _nearest_keys(read), None, _nearest_queries(read), None)
    partial = read & ~full
    return Blocks(
        partial,
        full,
        gap,
        _nearest_keys(partial),
        _nearest_keys(full),
        _nearest_queries(partial),
        _nearest_queries(full),
    )


def _documents_met(distances: Distances, query_blocks: int, key_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which pairs may share a document, and which hold one document only: bool `[batch or 1, q, k]`."""
    query, key, mask = distances.query_document, distances.key_document, distances.key_mask
    if query is None or key is None:
        query = distances.query_index.new_zeros(1, distances.query_index.numel())
        key = query.new_zeros(1, distances.num_keys)
    if mask is not None:
        key = key.masked_fill(~mask, HIDDEN)
    low_q, high_q = _lowest_and_highest(query, query_blocks)
    low_k, high_k = _lowest_and_highest(key, key_blocks)
    low_q, high_q, low_k, high_k = low_q[:, :, None], high_q[:, :, None], low_k[:, None], high_k[:, None]
    met = (low_k <= high_q) & (high_k >= low_q)
    return met, (low_k == high_q) & (high_k == low_q)


def _lowest_and_highest(documents: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest and the highest document of each block, int64 `[batch or 1, blocks]`."""
    missing = blocks * BLOCK - documents.shape[1]
    low = F.pad(documents, (0, missing), value=-HIDDEN).unflatten(1, (blocks, BLOCK)).amin(-1)
    high = F.pad(documents, (0, missing), value=HIDDEN).unflatten(1, (blocks, BLOCK)).amax(-1)
    return low, high


def _nearest_keys(read: torch.Tensor) -> torch.Tensor:
    """Return for each query block the key blocks that `read` `[batch or 1, q, k]` marks, the last one first."""
    keys = read.shape[2]
    return _listed(torch.where(read, torch.arange(keys - 1, -1, -1, device=read.device), keys))


def _nearest_queries(read: torch.Tensor) -> torch.Tensor:
    """Return for each key block the query blocks that `read` `[batch or 1, q, k]` marks, the first one first."""
    queries = read.shape[1]
    return _listed(torch.where(read.transpose(1, 2), torch.arange(queries, device=read.device), queries))


def _listed(rank: torch.Tensor) -> torch.Tensor:
    """Return the order of `rank` `[batch or 1, rows, columns]` in each row, contiguous as the kernels want it."""
    return rank.argsort(dim=-1)[:, None].to(torch.int32, memory_format=torch.contiguous_format)


def make_block_mask(
    blocks: Blocks, lengths: tuple[int, int], mask_mod: Callable[..., torch.Tensor], windows: torch.Tensor | None = None
) -> BlockMask:
    """Return the `BlockMask` of one layer.

    Args:
        lengths: number of queries and of keys that the kernel gets.
        windows: float32 `[heads]`; a head reads every key whose distance is at most its window, and the rest of those
            keys' blocks; None where all heads read everything.

    All counts have one shape and are contiguous, and the lists of heads are one list with stride 0: the kernels take
    the strides of counts and lists from their layouts, but the number of heads from the partial counts alone.
    """
    heads = 1 if windows is None else windows.shape[0]
    partial = blocks.partial[:, None].expand(-1, heads, -1, -1)
    full = blocks.full
    if full is not None:
        full = full[:, None]
        if windows is not None:
            full = full & ~(blocks.gap > windows[:, None, None])  # so written, not-a-number keeps all
    return BlockMask(
        seq_lengths=lengths,
        kv_num_blocks=_count(partial, -1),
        kv_indices=blocks.kv_indices.expand(-1, heads, -1, -1),
        full_kv_num_blocks=None if full is None else _count(full, -1),
        full_kv_indices=_expanded(blocks.full_kv_indices, heads),
        q_num_blocks=_count(partial, -2),
        q_indices=blocks.q_indices.expand(-1, heads, -1, -1),
        full_q_num_blocks=None if full is None else _count(full, -2),
        full_q_indices=_expanded(blocks.full_q_indices, heads),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=mask_mod,
    )


def _count(read: torch.Tensor, dim: int) -> torch.Tensor:
    return read.sum(dim, dtype=torch.int32).contiguous()


def _expanded(indices: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    return None if indices is None else indices.expand(-1, heads, -1, -1)
