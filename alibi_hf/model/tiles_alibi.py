"""Attention tile by tile on CPU: a few heads, a chunk of queries, and only the keys in the window of those heads.

* A tile is one call of PyTorch's fused kernel. Bias, causality and the edge of the window are functions of the distance
  alone, so with the queries in reverse order they are a Hankel matrix: a strided view of one line of numbers a head.
* Grouped-query heads read their key/value head through a stride of zero: nothing is repeated.
* Where the processor has no arithmetic in 16 bits, a tile is computed in float32: several times faster backward.
* Backward calls the kernel's own backward a tile at a time and adds up the gradients of keys and values in float32, one
  group of heads after the other; through autograd, each slice of the keys would fill a gradient of the full length.
  Where PyTorch has no such kernel, autograd differentiates the public function.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from .bias_alibi import MASKED, Distances

CHUNK = 256  # queries of a tile
CALL_PAIRS = 20_000  # what starting a tile costs, in pairs of query and key of one head

_FORWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


@dataclasses.dataclass(frozen=True)
class Group:
    """Key/value heads `start` to `stop` and their window: no query of theirs looks back farther, in tokens."""

    start: int
    stop: int
    window: int

    def tiles(self, queries: int, keys: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield the tiles as (first query, last + 1, first key, last + 1); the last query sits at the last key."""
        offset = keys - queries
        for start in range(0, queries, CHUNK):
            stop = min(start + CHUNK, queries)
            yield start, stop, max(0, offset + start - self.window), offset + stop

    def pairs(self, queries: int, keys: int) -> int:
        """Return how many pairs of query and key its tiles compute, over all its key/value heads."""
        tiles = self.tiles(queries, keys)
        return (self.stop - self.start) * sum((stop - start) * (last - first) for start, stop, first, last in tiles)


def plan_groups(windows: Sequence[float], queries: int, keys: int) -> list[Group]:
    """Return the groups of key/value heads whose tiles cost least.

    Args:
        windows: the window of each key/value head in tokens, `inf` where it must see everything.
    """
    calls = CALL_PAIRS * -(-queries // CHUNK)
    return neighbours(windows, keys, lambda group: calls + group.pairs(queries, keys))


def neighbours(windows: Sequence[float], keys: int, cost: Callable[[Group], int]) -> list[Group]:
    """Return groups of neighbouring heads, each with its longest window, merged where together they cost less."""
    groups: list[Group] = []
    for head, window in enumerate(windows):
        new = Group(head, head + 1, int(min(window, keys)))
        if groups:
            last = groups[-1]
            merged = Group(last.start, new.stop, max(last.window, new.window))
            if cost(merged) <= cost(last) + cost(new):
                groups[-1] = merged
                continue
        groups.append(new)
    return groups


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: Distances,
    scaling: float,
    groups: Sequence[Group],
) -> torch.Tensor:
    """Return attention output `[batch, heads, queries, dim]`, computed tile by tile.

    Args:
        query: `[batch, heads, queries, dim]`; key, value: `[batch, key/value heads, keys, dim]`; on CPU.
        distances: functions of the index alone (`Distances.by_index`).
        groups: from `plan_groups`; together they are all key/value heads.
    """
    if query.dtype in (torch.bfloat16, torch.float16) and not has_16_bit_arithmetic():
        states = (query.float(), key.float(), value.float())
        return tiled_attention(*states, distances, scaling, groups).to(query.dtype)
    if query.shape[1] != key.shape[1] and query.shape[0] > 1:  # tiles have two dimensions before the tokens
        rows = zip(query.split(1), key.split(1), value.split(1), strict=True)
        return torch.cat([tiled_attention(*row, distances, scaling, groups) for row in rows])
    repeats = query.shape[1] // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    lines = [_line(distances, group, repeats, query.shape[2], key.shape[2]).to(dtype) for group in groups]
    wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if wants_gradients and _FORWARD is not None and _BACKWARD is not None:
        return _Tiles.apply(query, key, value, scaling, groups, *lines)  # type: ignore[no-any-return]
    output = torch.empty_like(query)
    _attend(query, key, value, scaling, groups, lines, output, _fused)
    return output


@functools.cache
def has_16_bit_arithmetic() -> bool:
    """False on x86 processors before AVX-512, where PyTorch's products in 16 bits are slower than in float32."""
    return (
        torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2") or platform.machine() != "x86_64"
    )


def _line(distances: Distances, group: Group, repeats: int, queries: int, keys: int) -> torch.Tensor:
    """Return the bias of a group by (reversed query + key), float32 `[key/value heads, repeats, numbers]`.

    It is as long as the largest tile needs, and ends with the last key at the first of its queries.
    """
    rows = min(CHUNK, queries)
    delta = torch.arange(min(keys, group.window + rows) - 1, -rows, -1)
    heads = distances.heads(group.start * repeats, (group.stop - group.start) * repeats)
    bias = heads.bias(delta[None, None])[0, :, 0]
    return bias.masked_fill((delta < 0) | (delta > group.window), MASKED).unflatten(0, (-1, repeats))


def _tiles(
    group: Group, line: torch.Tensor, queries: int, keys: int
) -> Iterator[tuple[tuple[slice, slice, slice], tuple[slice, slice, slice], torch.Tensor]]:
    """Yield where the queries and the keys of each tile lie in what `_by_head` gives, and its bias.

    The bias is `[key/value heads, 1 or repeats, queries in reverse, keys]`.
    """
    heads, everything = slice(group.start, group.stop), slice(None)
    most = line.shape[2] + 1 - min(CHUNK, queries)
    for start, stop, first, last in group.tiles(queries, keys):
        size, stride = (*line.shape[:2], stop - start, last - first), (line.stride(0), line.stride(1), 1, 1)
        bias = line.as_strided(size, stride, line.storage_offset() + most - (last - first))
        yield (heads, everything, slice(start, stop)), (heads, everything, slice(first, last)), bias


def _by_head(states: torch.Tensor, kv_heads: int, repeats: int) -> torch.Tensor:
    """Return `[batch, heads, tokens, dim]` as `[key/value heads, batch or repeats, tokens, dim]`, without a copy."""
    if repeats == 1:
        return states.transpose(0, 1)
    return states[0].unflatten(0, (kv_heads, -1)).expand(-1, repeats, -1, -1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    groups: Sequence[Group],
    lines: Sequence[torch.Tensor],
    output: torch.Tensor,
    kernel: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
) -> list[Any]:
    """Write the output of every tile; return what else the kernel gives for each."""
    kv_heads, repeats = key.shape[1], query.shape[1] // key.shape[1]
    queries, keys, values, outputs = (_by_head(each, kv_heads, repeats) for each in (query, key, value, output))
    extras = []
    for group, line in zip(groups, lines, strict=True):
        for rows, columns, bias in _tiles(group, line, query.shape[2], key.shape[2]):
            result, extra = kernel(queries[rows].flip(2), keys[columns], values[columns], attn_mask=bias, scale=scaling)
            outputs[rows] = result.flip(2)
            extras.append(extra)
    return extras


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
    with torch.autocast("cpu", enabled=False):  # it would round the bias to 16 bits
        return F.scaled_dot_product_attention(query, key, value, **kwargs), None


class _Tiles(torch.autograd.Function):
    """All tiles of a call, with a backward that adds up tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        groups: Sequence[Group],
        *lines: torch.Tensor,
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        sums = _attend(query, key, value, scaling, groups, lines, output, _FORWARD)
        ctx.scaling, ctx.groups, ctx.count = scaling, groups, len(lines)
        ctx.save_for_backward(query, key, value, output, *lines, *sums)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, *rest = ctx.saved_tensors
        lines, sums = rest[: ctx.count], iter(rest[ctx.count :])
        kv_heads, repeats = key.shape[1], query.shape[1] // key.shape[1]
        grads = [torch.empty_like(each) for each in (query, key, value)]
        states = [_by_head(each, kv_heads, repeats) for each in (grad_output, query, key, value, output, grads[0])]
        for group, line in zip(ctx.groups, lines, strict=True):
            sums_of_group = _group_backward(states, group, line, sums, ctx.scaling)
            for grad, total in zip(grads[1:], sums_of_group, strict=True):
                grad.transpose(0, 1)[group.start : group.stop] = total
        return (*grads, None, None, *(None for _ in lines))


def _group_backward(
    states: Sequence[torch.Tensor], group: Group, line: torch.Tensor, sums: Iterator[torch.Tensor], scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the gradient of the group's queries; return those of its keys and values, added up in float32.

    They are `[key/value heads, batch (1 with repeats), keys, dim]`.
    """
    grad_output, query, key, value, output, grad_query = states
    dtype = torch.promote_types(key.dtype, torch.float32)
    repeats = line.shape[1]
    shape = (group.stop - group.start, key.shape[1] // repeats, *key.shape[2:])
    totals = key.new_zeros(shape, dtype=dtype), value.new_zeros(shape, dtype=dtype)
    for rows, columns, bias in _tiles(group, line, query.shape[2], key.shape[2]):
        turned = [each[rows].flip(2) for each in (grad_output, query)]
        grads = _BACKWARD(
            *turned,
            key[columns],
            value[columns],
            output[rows].flip(2),
            next(sums),
            0.0,
            False,
            attn_mask=bias,
            scale=scaling,
        )
        grad_query[rows] = grads[0].flip(2)
        for total, grad in zip(totals, grads[1:], strict=True):
            total[:, :, columns[2]] += grad if repeats == 1 else grad.sum(1, keepdim=True, dtype=dtype)
    return totals
