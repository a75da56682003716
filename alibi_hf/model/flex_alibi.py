"""FlexAttention with ALiBi as an analytic score_mod: nothing of the size of the scores is built on a GPU.

* On CUDA, causality, documents and padding are a block mask: what no query of a block sees is never read. Custom masks
  are read by the score_mod, all blocks of them.
* The blocks of steep heads past the provable window are not read either (`window_alibi`), forward and backward.
* The kernels are compiled once for each kind of call; lengths, windows, documents and padding are data to them.
* On CPU FlexAttention holds the scores, as eager does: it runs uncompiled there, has no backward, and cannot be lowered
  inside a compiled model, where eager attention takes its place; as it does on CUDA in float64, which the kernels lack,
  and for Jais' rounding, which they leave out.

Source of the interface: PyTorch, `torch.nn.attention.flex_attention`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from .bias_alibi import Distances
from .blocks_alibi import BLOCK, Blocks, make_block_mask, make_blocks, num_blocks
from .dense_alibi import eager_attention, soft_cap
from .positions_alibi import is_tracing
from .window_alibi import default_eps, head_windows

WINDOW_KEYS = 8192  # below, bounding the scores is predicted to cost about what the window saves
MIN_HEAD_DIM = 16  # of the kernels


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
    compiled = has_kernels(query)
    kept_in_float32 = compiled and distances.rounded is not None  # by the compiler, which leaves out the rounding
    if kept_in_float32 or (not compiled and (is_tracing() or query.device.type != "cpu")):
        return eager_attention(query, key, value, distances, scaling, 0.0, softcap)[0]
    with torch.autocast(query.device.type, enabled=False):  # it would round the bias to 16 bits
        if compiled and _fits_blocks(query, key, distances):
            eps = _window_eps(query, key, distances, softcap)
            output = _by_blocks(query, key, value, distances, scaling, softcap, eps)
        else:
            output = _by_scores(query, key, value, distances, scaling, softcap, compiled)
    blind = _blind_rows(distances)
    return output if blind is None else output.masked_fill(blind, 0.0)


def has_kernels(query: torch.Tensor) -> bool:
    """True where FlexAttention has kernels, forward and backward."""
    return query.device.type == "cuda" and query.dtype != torch.float64


def _fits_blocks(query: torch.Tensor, key: torch.Tensor, distances: Distances) -> bool:
    """True where there are blocks to leave out; an exported graph has to fit every length, in whole blocks or not."""
    if distances.custom_mask is not None or torch.compiler.is_exporting():
        return False
    return not _is_few(query, key) or isinstance(distances.offset, torch.Tensor)  # a growing cache has no empty places


def _is_few(query: torch.Tensor, key: torch.Tensor) -> bool:
    """True for less than a block of queries against a cache: copying the keys would cost more than computing."""
    return bool(query.shape[2] != key.shape[2] and query.shape[2] < BLOCK)


def _window_eps(query: torch.Tensor, key: torch.Tensor, distances: Distances, softcap: float | None) -> float | None:
    """Return the share of a row that may be left out; None where no window is provable, or the row is too short."""
    if not distances.window or is_tracing() or softcap is not None or distances.sqrt or not distances.by_index:
        return None
    if not query.shape[2] == key.shape[2] >= WINDOW_KEYS:
        return None
    return distances.window_eps or default_eps(query.dtype, gradients=torch.is_grad_enabled())


def _by_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: Distances,
    scaling: float,
    softcap: float | None,
    window_eps: float | None,
) -> torch.Tensor:
    """Attend with a block mask; queries and keys are filled up to whole blocks, and read as such by the compiler."""
    queries, keys, dim = query.shape[2], key.shape[2], query.shape[3]
    few = _is_few(query, key)
    if "blocks" not in distances.shared:  # the same for all layers
        distances.shared["blocks"] = make_blocks(distances, few)
    if "padded" not in distances._kept:
        lengths = num_blocks(queries) * BLOCK, num_blocks(keys) * BLOCK
        distances._kept["padded"] = distances if few else _padded(distances, *lengths)
    blocks, padded = distances.shared["blocks"], distances._kept["padded"]
    aligned = isinstance(distances.offset, int) and distances.offset == 0
    kernel = _few if few else _plain if distances.by_index else _masked
    if not is_tracing():
        kernel = _compiled(kernel)
    shaped = (_wide(states) if few else _in_blocks(states) for states in (query, key, value))
    output = kernel(*shaped, padded, blocks, aligned, scaling, softcap, window_eps)
    return output[:, :, :queries, :dim]


def _wide(states: torch.Tensor) -> torch.Tensor:
    """Return `[batch, heads, tokens, dim]` with zeros up to the least dim of the kernels."""
    missing = MIN_HEAD_DIM - states.shape[3]
    return F.pad(states, (0, missing)) if missing > 0 else states


def _in_blocks(states: torch.Tensor) -> torch.Tensor:
    """Return `[batch, heads, tokens, dim]` as `[batch, heads, blocks, BLOCK, dim]`, filled up with zeros.

    So the compiler knows, whatever the length, that it is a multiple of the block, and leaves out all bounds checks.
    """
    states = _wide(states)
    blocks = num_blocks(states.shape[2])
    missing = blocks * BLOCK - states.shape[2]
    if is_tracing() or missing > 0:
        states = F.pad(states, (0, 0, 0, missing))
    return states.unflatten(2, (blocks, BLOCK))


def _padded(distances: Distances, queries: int, keys: int) -> Distances:
    """Return the distances of queries and keys filled up to these numbers; 32 bits, since the kernels compute them."""

    def fill(tensor: torch.Tensor | None, length: int) -> torch.Tensor | None:
        return None if tensor is None else F.pad(tensor, (0, length - tensor.shape[-1]))

    def places(tensor: torch.Tensor | None, length: int) -> torch.Tensor | None:
        return None if tensor is None else F.pad(tensor.int(), (0, length - tensor.shape[-1]))

    index = distances.query_index
    return distances.replace(
        query_index=(index[:1] + torch.arange(queries, device=index.device)).int(),
        num_keys=keys,
        query_slopes=fill(distances.query_slopes, queries),
        query_position=places(distances.query_position, queries),
        key_position=places(distances.key_position, keys),
        query_document=fill(distances.query_document, queries),
        key_document=fill(distances.key_document, keys),
        key_mask=fill(distances.key_mask, keys),
        row=fill(distances.row, keys),
        shared={},
        _kept={},
    )


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: Distances,
    blocks: Blocks,
    aligned: bool,
    scaling: float,
    softcap: float | None,
    window_eps: float | None,
) -> torch.Tensor:
    if query.dim() == 5:
        query, key, value = (states.flatten(2, 3) for states in (query, key, value))
    windows = None
    if window_eps is not None:
        windows = head_windows(query.detach(), key.detach(), distances.slopes, scaling, window_eps)
    lengths = query.shape[2], key.shape[2]
    return flex_attention(
        query,
        key,
        value,
        score_mod=_score_mod(distances, softcap, aligned),
        block_mask=make_block_mask(blocks, lengths, _visible_mod(distances, aligned), windows),
        scale=scaling,
        enable_gqa=bool(query.shape[1] != key.shape[1]),
    )


# One function for each kind of call: the compiler keeps a few variants of each (dtype, gradients, fixed or changing
# length), and gives up on a function that has too many.


def _plain(*args: Any) -> torch.Tensor:
    """Attend where bias and visibility are functions of the index."""
    return _attend(*args)


def _masked(*args: Any) -> torch.Tensor:
    """Attend to padded or packed rows, or with upstream's rounded bias."""
    return _attend(*args)


def _few(*args: Any) -> torch.Tensor:
    """Attend with less than a block of queries to a static cache."""
    return _attend(*args)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _by_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: Distances,
    scaling: float,
    softcap: float | None,
    compiled: bool,
) -> torch.Tensor:
    """Attend with nothing but a score_mod, which hides as well."""
    dim = query.shape[3]
    kernel: Any = _uncompiled
    if compiled:
        query, key, value = (_wide(states) for states in (query, key, value))
        kernel = flex_attention if is_tracing() else _compiled(flex_attention)
    output = kernel(
        query,
        key,
        value,
        score_mod=_hiding_score_mod(distances, softcap),
        scale=scaling,
        enable_gqa=bool(query.shape[1] != key.shape[1]),
    )
    return output[..., :dim]


def _uncompiled(*args: Any, **kwargs: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*without torch.compile.*")
        return flex_attention(*args, **kwargs)


def _score_mod(distances: Distances, softcap: float | None, aligned: bool = False) -> Callable[..., torch.Tensor]:
    """Return the score_mod that caps the score and adds the bias; `aligned`: the first query is at the first key."""
    bias = _bias_mod(distances, aligned)

    def score_mod(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        score = soft_cap(score.to(torch.promote_types(score.dtype, torch.float32)), softcap)
        return score + bias(b, h, q, k)

    return score_mod


def _hiding_score_mod(distances: Distances, softcap: float | None) -> Callable[..., torch.Tensor]:
    """Return the score_mod with a float mask added, and minus infinity for what the query does not see."""
    visible, biased = _visible_mod(distances), _score_mod(distances, softcap)
    mask = distances.custom_mask
    added = mask if mask is not None and mask.dtype != torch.bool else None

    def score_mod(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        score = biased(score, b, h, q, k)
        if added is not None:
            score = score + added[_at(added, 0, b), _at(added, 1, h), q, k]
        return torch.where(visible(b, h, q, k), score, -torch.inf)

    return score_mod


def _at(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor | int:
    """Return the index into a dimension that may be broadcast."""
    return index if tensor.shape[dim] > 1 else index * 0


def _bias_mod(distances: Distances, aligned: bool = False) -> Callable[..., torch.Tensor]:
    """Return the function of (batch, head, query, key) that gives the bias."""
    slopes, own = distances.slopes, distances.query_slopes
    query, key, row = distances.query_position, distances.key_position, distances.row
    if row is not None:
        return lambda b, h, q, k: row[_at(row, 0, b), h, k].float()

    def bias(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        if query is not None and key is not None:
            delta = query[_at(query, 0, b), q] - key[_at(key, 0, b), k]
        else:
            delta = (q if aligned else distances.query_index[q]) - k
        slope = slopes[h] if own is None else own[_at(own, 0, b), h, q]
        if distances.rounded is not None:
            return -(slope.to(distances.rounded) * delta.to(distances.rounded)).float()
        distance = delta.to(torch.float32)
        return -slope * (distance.clamp(min=0).sqrt() if distances.sqrt else distance)

    return bias


def _visible_mod(distances: Distances, aligned: bool = False) -> Callable[..., torch.Tensor]:
    """Return the function of (batch, head, query, key) that says whether the query sees the key."""
    if distances.custom_mask is not None:
        return _custom_mod(distances.custom_mask)
    key_mask, query_document, key_document = distances.key_mask, distances.query_document, distances.key_document

    def causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        visible = k <= (q if aligned else distances.query_index[q])
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
