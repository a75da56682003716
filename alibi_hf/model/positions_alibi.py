"""From what a caller passes (masks, position_ids, caches, packed or paged batches) to the `Distances` of the call.

* Without a mask, a position is the index in the cache: position_ids with an offset, or shifted by padding, change
  nothing.
* With a 2-D mask, positions count unmasked tokens, those in the cache included.
* position_ids only mark where documents start: wherever they step by something other than +1.
* While tracing, nothing here depends on data: documents are then always read from position_ids where they are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from .bias_alibi import Distances, bias_dtype, rounded_row, scaled_slopes
from .scaling_alibi import text_lengths


def is_tracing() -> bool:
    """True while torch compiles, exports, traces or transforms (`torch.func`): no tensor's value may be read."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    return torch._C._are_functorch_transforms_active()


def find_documents(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    batch: int,
    queries: int,
    past_key_values: Any | None,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """Return the document of each query, int64 `[batch or 1, queries]`, or None where a row is one document.

    Read from `seq_idx`, else `cu_seq_lens_q` (both from `DataCollatorWithFlattening`), else `position_ids`. A 4-D mask
    separates documents by itself. While tracing, position_ids beside a cache are taken for one document a row.

    Raises:
        ValueError: several documents in a row together with a cache; position_ids or seq_idx of another length than the
            queries; cu_seq_lens_q that do not rise from 0 to the number of queries (a document without tokens is none).
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return None
    documents = _named_documents(batch, queries, kwargs)
    if documents is None and (past_key_values is None or not is_tracing()):
        mask = attention_mask
        if mask is not None and past_key_values is not None and queries > 1:  # asking a static cache waits for the GPU
            mask = mask[:, int(past_key_values.get_seq_length()) :]
        documents = _counted_documents(position_ids, mask, batch, queries)
    if documents is not None and past_key_values is not None:
        raise ValueError(
            "position_ids mark several documents in one row, but a cache was passed, and a cache holds no document "
            "ids; pass past_key_values=None, or one document a row."
        )
    return documents


def _named_documents(batch: int, queries: int, kwargs: dict[str, Any]) -> torch.Tensor | None:
    if kwargs.get("cu_seq_lens_q") is not None:
        _check_bounds(kwargs["cu_seq_lens_q"], queries)
    if kwargs.get("seq_idx") is not None:
        if kwargs["seq_idx"].shape[-1] != queries:
            raise ValueError(
                f"seq_idx covers {kwargs['seq_idx'].shape[-1]} tokens, the input has {queries}; give one a token."
            )
        index = kwargs["seq_idx"].expand(batch, queries)
        return torch.nn.functional.pad(index[:, 1:] != index[:, :-1], (1, 0)).long().cumsum(-1)  # ids may come back
    if kwargs.get("cu_seq_lens_q") is not None:
        bounds = kwargs["cu_seq_lens_q"].long()
        return torch.searchsorted(bounds, torch.arange(queries, device=bounds.device), right=True)[None]
    return None


def _check_bounds(cu_seq_lens: torch.Tensor, queries: int) -> None:
    if is_tracing():
        return
    bounds = cu_seq_lens.tolist()
    fallen = [(one, other) for one, other in itertools.pairwise(bounds) if other < one]
    if fallen:
        raise ValueError(f"cu_seq_lens_q must not decrease, found {fallen[0][0]} before {fallen[0][1]}.")
    if not bounds or (bounds[0], bounds[-1]) != (0, queries):
        raise ValueError(
            f"cu_seq_lens_q go from {bounds[0] if bounds else None} to {bounds[-1] if bounds else None}, the input has "
            f"{queries} tokens; they start at 0 and end at the number of tokens."
        )


def _counted_documents(
    position_ids: torch.Tensor | None, mask: torch.Tensor | None, batch: int, queries: int
) -> torch.Tensor | None:
    """Return the documents that `position_ids` mark, `mask` starting with the queries; None if there is one a row."""
    if position_ids is not None and position_ids.shape[-1] != queries:
        raise ValueError(
            f"position_ids cover {position_ids.shape[-1]} tokens, the input has {queries}; give one a token."
        )
    if position_ids is None or queries == 1:
        return None
    if mask is not None and mask.shape[1] < queries:
        return None  # too short: refused where the distances are made
    starts = document_starts(position_ids.expand(batch, queries), None if mask is None else mask[:, :queries])
    if not is_tracing() and not starts.any():
        return None
    return starts.long().cumsum(-1)


def document_starts(position_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return where a document starts after the first token, bool `[batch, queries]`.

    With a mask, a step counts only between unmasked tokens, and only if it is +1 neither over the index nor over the
    unmasked tokens: both `arange` and `cumsum(mask) - 1` say that a padded row is one document.
    """
    first = torch.zeros_like(position_ids[:, :1], dtype=torch.bool)
    starts = torch.cat([first, position_ids[:, 1:] - position_ids[:, :-1] != 1], dim=-1)
    if mask is None:
        return starts
    kept = mask.to(torch.bool)
    index = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    latest = torch.where(kept, index, -1).cummax(-1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], dim=-1)  # the unmasked token before
    step = position_ids - position_ids.gather(-1, before.clamp(min=0))
    return starts & kept & (before >= 0) & (step != 1)


def restart(positions: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Return `positions` (never falling, int64 `[batch, n]`) counted from the first token of each document."""
    documents = documents.expand(positions.shape[0], -1)
    changed = torch.ones_like(documents, dtype=torch.bool)
    changed[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return positions - torch.where(changed, positions, 0).cummax(-1).values


def make_distances(
    config: Any,
    embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    documents: torch.Tensor | None,
    past_key_values: Any | None,
    first_layer: int,
) -> Distances:
    """Return the `Distances` of one call.

    Args:
        config: an `AlibiConfig`.
        embeds: `[batch, queries, hidden]`, for shapes, dtype and device.
        attention_mask: None, `[batch, keys]` (nonzero: counts), or `[batch or 1, heads or 1, queries, keys]`.
        position_ids: only read with a 4-D mask, and only where they cover all keys.
        documents: from `find_documents`.
        past_key_values: a Transformers cache or None.
        first_layer: index of the first layer present on this rank.

    Raises:
        ValueError: a mask that does not fit cache and queries (both lengths are named).
    """
    queries, device = embeds.shape[1], embeds.device
    offset: int | torch.Tensor = 0
    keys = queries
    if past_key_values is not None:
        offset = past_key_values.get_query_offset(first_layer)
        keys = past_key_values.get_mask_sizes(queries, first_layer)[0]
        if isinstance(offset, torch.Tensor):  # a static cache hands out its live counter
            offset = offset.to(device, copy=True)
    query_index = torch.arange(queries, device=device) + offset
    rounded = bias_dtype(config, embeds.dtype)
    distances = Distances(
        slopes=scaled_slopes(config, offset + queries, device, rounded),
        query_index=query_index,
        num_keys=keys,
        offset=offset,
        rounded=rounded,
        sqrt=config.alibi_distance == "sqrt",
        biased=config.alibi,
        window=config.alibi and config.attention_window and rounded is None,  # windows are proved for the exact bias
        window_eps=config.attention_window_eps,
    )
    if attention_mask is not None and attention_mask.dim() == 4:
        _use_custom_mask(distances, attention_mask, position_ids)
    elif attention_mask is not None:
        _use_padding_mask(distances, attention_mask)
    if documents is not None:
        _use_documents(distances, documents)
    _use_text_lengths(distances, config, text_lengths)
    _use_rounding(distances, config, embeds.dtype)
    return distances


def make_paged_distances(config: Any, embeds: torch.Tensor, kwargs: dict, attention_mask: Any) -> Distances:
    """Return the `Distances` of one step of continuous batching (`generate_batch`).

    The queries of all requests lie in one row, `cu_seq_lens_q` says where each starts; their keys, cached ones first,
    lie in the row that `cu_seq_lens_k` divides. Transformers' 4-D mask keeps requests apart.
    """
    device = embeds.device
    mask = next(iter(attention_mask.values())) if isinstance(attention_mask, dict) else attention_mask
    bounds_k = kwargs["cu_seq_lens_k"]
    bounds_k = (next(iter(bounds_k.values())) if isinstance(bounds_k, dict) else bounds_k).long()
    bounds_q = kwargs["cu_seq_lens_q"].long()

    def request_of(index: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        return (torch.searchsorted(bounds, index, right=True) - 1).clamp(0, bounds.numel() - 2)

    query_index = torch.arange(embeds.shape[1], device=device)
    key_index = torch.arange(mask.shape[-1], device=device)
    request_q, request_k = request_of(query_index, bounds_q), request_of(key_index, bounds_k)
    # The last query of a request sits at the request's last key.
    query_position = query_index - bounds_q[request_q + 1] + (bounds_k[request_q + 1] - bounds_k[request_q])
    rounded = bias_dtype(config, embeds.dtype)
    distances = Distances(
        slopes=scaled_slopes(config, mask.shape[-1], device, rounded),
        query_index=query_index,
        num_keys=mask.shape[-1],
        query_position=query_position[None],
        key_position=(key_index - bounds_k[request_k])[None],
        custom_mask=mask,
        rounded=rounded,
        sqrt=config.alibi_distance == "sqrt",
        biased=config.alibi,
    )
    _use_text_lengths(distances, config, lambda _: bounds_k.diff()[request_q][None, None])
    _use_rounding(distances, config, embeds.dtype)
    return distances


def _use_custom_mask(distances: Distances, mask: torch.Tensor, position_ids: torch.Tensor | None) -> None:
    queries, keys = distances.query_index.numel(), distances.num_keys
    if tuple(mask.shape[-2:]) != (queries, keys):
        raise ValueError(
            f"A 4-D attention_mask must end in (queries, keys) = {(queries, keys)}, cached keys included; "
            f"found {tuple(mask.shape)}."
        )
    if mask.dtype in (torch.bfloat16, torch.float16):  # the minimum of the narrow dtype hides too
        mask = mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)
    elif not mask.is_floating_point():
        mask = mask.bool()
    distances.custom_mask = mask
    if position_ids is not None and position_ids.shape[-1] == keys:
        distances.key_position = position_ids
        distances.query_position = position_ids[:, distances.query_index]


def _use_padding_mask(distances: Distances, mask: torch.Tensor) -> None:
    keys, queries, offset = distances.num_keys, distances.query_index.numel(), distances.offset
    if mask.dim() != 2:
        raise ValueError(f"attention_mask must have 2 or 4 dimensions, found shape {tuple(mask.shape)}.")
    short = keys - mask.shape[1]
    known = isinstance(offset, int) or not is_tracing()
    if short < 0 or (short > 0 and known and mask.shape[1] < int(offset) + queries):
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens, but cache and queries are {int(offset)} + {queries} = "
            f"{int(offset) + queries}; pass a mask over all of them, and no more."
        )
    mask = mask.to(device=distances.slopes.device, dtype=torch.bool)
    mask = torch.nn.functional.pad(mask, (0, short)) if short > 0 else mask[:, :keys]
    if not is_tracing() and isinstance(offset, int) and bool(mask.all()):
        return
    distances.key_mask = mask
    distances.key_position = (mask.long().cumsum(-1) - 1).clamp(min=0)
    distances.query_position = distances.key_position[:, distances.query_index]


def _use_documents(distances: Distances, documents: torch.Tensor) -> None:
    positions = distances.key_position if distances.key_position is not None else distances.query_index[None]
    positions = restart(positions.expand(documents.shape[0], -1), documents)
    distances.query_document = distances.key_document = documents
    distances.query_position = distances.key_position = positions


def _use_text_lengths(
    distances: Distances, config: Any, find_lengths: Callable[[Distances], torch.Tensor | None]
) -> None:
    """Scale by the length of each text, as if it were alone: neither padding nor neighbours change how it is read.

    Args:
        find_lengths: gives int `[batch or 1, heads or 1, queries or 1]`, as `text_lengths` does.
    """
    trained = (config.alibi_scaling or {}).get("train_seq_len")
    if trained is None or (not is_tracing() and distances.num_keys <= trained):  # no text of the call is longer
        return
    lengths = find_lengths(distances)
    if lengths is not None:
        slopes = scaled_slopes(config, lengths, distances.slopes.device, distances.rounded)
        distances.query_slopes = slopes.expand(-1, -1, distances.query_index.numel())


def _use_rounding(distances: Distances, config: Any, dtype: torch.dtype) -> None:
    if config.alibi_rounding not in ("bloom", "falcon", "baichuan") or not config.alibi:
        return
    positions = distances.key_position
    if positions is None:
        positions = torch.arange(distances.num_keys, device=distances.slopes.device)[None]
    if distances.key_mask is not None:
        if config.alibi_rounding == "baichuan":  # upstream counts the padding on the left
            positions = positions + distances.key_mask.long().argmax(-1, keepdim=True)
        positions = positions * distances.key_mask
    distances.row = rounded_row(config, distances.slopes, positions, dtype)
