"""How long the text of each query is: what `alibi_scaling` by length divides the slopes by.

* Upstream divides by the key length of the call, which is right for a text alone. Here each text has its own length, so
  that it is read alike alone, padded, packed, and in a batch: its unmasked tokens up to the last query of the call.
* The length grows with every call that reads on. Token by token gives what upstream's token by token gives; a prefill
  in several calls is, as upstream, another computation than one in a single call.

Source: `AlibiPositionEmbeddingLayer` of Cerebras' `modeling_btlm.py` and `modeling_jais.py`.
"""

from __future__ import annotations

import torch

from .bias_alibi import Distances


def text_lengths(distances: Distances) -> torch.Tensor | None:
    """Return how many tokens the text of each query has, up to the last query; None where each row is one text."""
    if distances.custom_mask is not None:
        return _visible_lengths(distances)
    if distances.query_document is not None:
        return _document_lengths(distances.query_document, distances.key_mask)[:, None]
    return None if distances.query_position is None else distances.query_position[:, None, -1:] + 1


def _document_lengths(documents: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the number of unmasked tokens in the document of each token, int64 `[batch, tokens]`."""
    counts = torch.ones_like(documents) if mask is None else mask.long()
    changed = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
    number = changed.long().cumsum(-1).expand_as(counts)
    return torch.zeros_like(counts).scatter_add(1, number, counts).gather(1, number)


def _visible_lengths(distances: Distances) -> torch.Tensor:
    """Return int32 `[batch or 1, heads or 1, queries]` under a custom mask, which says nothing of texts.

    The text of a query is what the farthest seeing of the queries that see it sees: under a mask of causal blocks, the
    document of the query.
    """
    visible = distances.visible(0, distances.query_index.numel(), distances.num_keys)
    seen = visible.sum(-1, dtype=torch.int32)
    return torch.where(visible[..., distances.query_index], seen[..., None], 0).amax(-2).maximum(seen)
