"""Attention with an explicit bias: eager, and four forms over PyTorch's fused attention, on any device.

* eager holds all scores `[batch, heads, queries, keys]`; it runs in float64 too and is the oracle of the others.
* causal: as many queries as keys of one document, without a bias.
* row: few tokens of one document in bfloat16; the bias is one row of keys.
* ramp: bias and causality are functions of query - key alone. With the queries of a chunk in reverse order, the bias of
  the chunk is a Hankel matrix: a strided view of one line of `keys + chunk` numbers a head. Distances stay exact.
* block: anything else (custom masks, rounded biases), chunk by chunk, so that memory stays bounded: in training too,
  where each chunk is computed again in backward. A compiled or exported graph attends at once.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .bias_alibi import MASKED, Distances
from .positions_alibi import is_tracing

CHUNK = 256  # queries whose bias is in memory at a time
BLOCK_BYTES = 64 * 2**20  # memory that the bias of a chunk may take in the block form
ROW_TOKENS = 512  # past this length tiles are as fast, and exact


def soft_cap(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return `cap * tanh(scores / cap)`, or the scores where there is no cap."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


def eager_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: Distances,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention output `[batch, heads, queries, dim]` and weights `[batch, heads, queries, keys]`.

    Scores are formed in the model's dtype, bias and softmax in float32 (float64 for a float64 model).

    Args:
        query: `[batch, heads, queries, dim]`; key, value: `[batch, key/value heads, keys, dim]`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    scores = soft_cap(scores.to(torch.promote_types(scores.dtype, torch.float32)), softcap)
    bias, blind = distances.block(0, query.shape[2], key.shape[2])
    weights = torch.softmax(scores + bias, dim=-1).to(query.dtype)
    if blind is not None:
        weights = weights.masked_fill(blind, 0.0)
    output = torch.matmul(F.dropout(weights, p=dropout), value)
    return output, weights


@functools.cache
def fused_row_is_causal() -> bool:
    """True if fused attention takes a mask together with `is_causal`: undocumented, so checked once, gradients too."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.autocast("cpu", enabled=False)  # the answer is kept: it must not depend on who asks first
    with plain, torch.enable_grad(), torch.inference_mode(False), torch.device("cpu"):
        query, key, value = (torch.randn(1, 2, 9, 16, generator=generator).requires_grad_() for _ in range(3))
        row = torch.randn(1, 2, 1, 9, generator=generator)
        hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
        weights = (query @ key.transpose(2, 3) / 4 + row).masked_fill(hidden, -torch.inf).softmax(-1)
        truth = torch.autograd.grad((weights @ value).square().sum(), (query, key, value))
        try:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=row, is_causal=True)
            found = torch.autograd.grad(output.square().sum(), (query, key, value))
        except RuntimeError:
            return False
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(truth, found, strict=True))


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool = False,
) -> torch.Tensor:
    bias = bias.to(torch.promote_types(query.dtype, torch.float32))
    dtype = query.dtype
    if query.device.type != "cpu":  # elsewhere the fused kernels want one dtype, and the bias stays in float32
        query, key, value = query.to(bias.dtype), key.to(bias.dtype), value.to(bias.dtype)
    with torch.autocast(query.device.type, enabled=False):  # it would round the bias to 16 bits
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias,
            dropout_p=dropout,
            is_causal=is_causal,
            scale=scaling,
            enable_gqa=bool(query.shape[1] != key.shape[1]),
        )
    return output.to(dtype)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, dropout: float
) -> torch.Tensor:
    """Attend without a bias to as many keys as queries, by the kernel's own causality, in the dtype of the inputs."""
    gqa = bool(query.shape[1] != key.shape[1])
    return F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=gqa
    )


def row_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, distances: Distances, scaling: float
) -> torch.Tensor:
    """Attend by index, to as many keys as queries, with absolute positions in the bias and the kernel's causality.

    Positions of float32 lose nothing in 16 bits, up to `ROW_TOKENS`.
    """
    last = distances.num_keys - 1  # seen from the last query, the row differs from the others' only by a constant
    bias, _ = distances.block(last, last + 1, distances.num_keys)
    return _attend(query, key, value, bias, scaling, is_causal=True)


def ramp_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, distances: Distances, scaling: float, dropout: float
) -> torch.Tensor:
    """Attend chunk by chunk with a bias by distance (`Distances.by_index`); in one chunk while tracing."""
    queries, keys = query.shape[2], key.shape[2]
    if is_tracing():  # a loop over chunks would be unrolled, and the offset may be a tensor
        ramp = _ramp_line(distances, queries, keys, distances.offset)
        return _ramp_chunk(query, key, value, ramp, scaling, dropout)
    offset = int(distances.offset)
    line = _ramp_line(distances, CHUNK, keys, keys - CHUNK)  # covers every chunk: its last query at the last key
    outputs = []
    for start in range(0, queries, CHUNK):
        stop = min(start + CHUNK, queries)
        seen = offset + stop  # causality: no later key matters
        ramp = line[:, keys - seen : keys - seen + (stop - start) + seen - 1]
        outputs.append(
            _ramp_chunk(query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], ramp, scaling, dropout)
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _ramp_line(distances: Distances, queries: int, keys: int, offset: int | torch.Tensor) -> torch.Tensor:
    """Return the bias by (reversed query + key), float32 `[heads, queries + keys - 1]`; key after query is masked.

    Entry s belongs to the distance `offset + queries - 1 - s`.
    """
    places = torch.arange(queries + keys - 1, device=distances.slopes.device)
    delta = offset + queries - 1 - places
    bias = distances.bias(delta[None, None])[0, :, 0]
    return bias.masked_fill(delta < 0, MASKED)


def _ramp_chunk(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ramp: torch.Tensor, scaling: float, dropout: float
) -> torch.Tensor:
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    if query.dtype == torch.float64:
        ramp = ramp.double()
    bias = ramp.as_strided((1, heads, queries, keys), (0, ramp.stride(0), 1, 1))
    return _attend(query.flip(2), key, value, bias, scaling, dropout).flip(2)


def block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, distances: Distances, scaling: float, dropout: float
) -> torch.Tensor:
    """Attend with any bias, chunk by chunk, so that memory stays bounded; at once while tracing."""
    queries, keys = query.shape[2], key.shape[2]

    def attend(start: int, stop: int) -> torch.Tensor:
        bias, blind = distances.block(start, stop, keys)
        output = _attend(query[:, :, start:stop], key, value, bias, scaling, dropout)
        return output if blind is None else output.masked_fill(blind, 0.0)

    if is_tracing():  # a loop over a traced length would fix it to one number
        return attend(0, queries)
    chunk = max(1, min(CHUNK, BLOCK_BYTES // (4 * query.shape[0] * query.shape[1] * keys)))
    pieces = [(start, min(start + chunk, queries)) for start in range(0, queries, chunk)]
    if torch.is_grad_enabled() and len(pieces) > 1:  # backward would keep the bias of every chunk: make it again there
        outputs = [checkpoint(attend, *piece, use_reentrant=False) for piece in pieces]
    else:
        outputs = [attend(*piece) for piece in pieces]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
