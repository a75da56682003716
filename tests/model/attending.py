"""Attention of one layer in float64, from the formula, and inputs that make its bounds bite."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from alibi_hf.model.bias_alibi import Distances

Pair = tuple[torch.Tensor, torch.Tensor]


def weights(query: torch.Tensor, key: torch.Tensor, slopes: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the attention weights `[batch, heads, queries, keys]`; the last query sits at the last key."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    delta = distance(query.shape[2], key.shape[2]).double()
    bias = -slopes.double()[:, None, None] * delta
    scores = torch.matmul(query.double(), key.transpose(2, 3)) * scaling + bias
    return scores.masked_fill(delta < 0, -torch.inf).softmax(-1)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return the attention output `[batch, heads, queries, dim]`, dense, in float64."""
    value = value.double().repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return torch.matmul(weights(query, key, slopes, scaling), value)


def distance(queries: int, keys: int) -> torch.Tensor:
    """Return query index minus key index, `[queries, keys]`."""
    return torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)


def dropped(all_weights: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Return the share of each row that windows `[heads]` leave out, `[batch, heads, queries]`."""
    far = distance(*all_weights.shape[2:]) > windows.double()[:, None, None]
    return all_weights.masked_fill(~far, 0).sum(-1)


def by_index(slopes: torch.Tensor, queries: int, keys: int, **more: object) -> Distances:
    """Return the distances of the last `queries` of `keys` tokens."""
    offset = keys - queries
    return Distances(slopes, torch.arange(queries) + offset, keys, offset, **more)


def normal(shape: Sequence[int], kv_heads: int) -> Pair:
    """Return random normal queries `shape` and keys."""
    batch, _, tokens, dim = shape
    return torch.randn(*shape), torch.randn(batch, kv_heads, tokens, dim)


def aligned(shape: Sequence[int], kv_heads: int) -> Pair:
    """The last query looks straight at one key of huge norm at the very beginning."""
    query, key = normal(shape, kv_heads)
    key[:, :, 0] *= 10
    query[:, :, -1] = key[:, :, 0].repeat_interleave(shape[1] // kv_heads, dim=1) / 2
    return query, key


def offset(shape: Sequence[int], kv_heads: int) -> Pair:
    """All keys share a large offset, which softmax does not see."""
    query, key = normal(shape, kv_heads)
    return query, key + 8 * torch.randn(key.shape[-1])


def equal(shape: Sequence[int], kv_heads: int) -> Pair:
    """All keys are one: the weights are those of the bias alone."""
    query, key = normal(shape, kv_heads)
    return query, key[:, :, :1].expand_as(key).clone()


def anti_aligned(shape: Sequence[int], kv_heads: int) -> Pair:
    """Every query looks away from its own key: the bound by the self score is as loose as can be."""
    _, key = normal(shape, kv_heads)
    return -key.repeat_interleave(shape[1] // kv_heads, dim=1), key


def low_rank(shape: Sequence[int], kv_heads: int) -> Pair:
    """Queries and keys all point one way or the other: the triangle inequality is tight."""
    query, key = normal([*shape[:-1], 1], kv_heads)
    line = torch.nn.functional.normalize(torch.randn(shape[-1]), dim=0) * 3
    return query * line, key * line


def heavy_tailed(shape: Sequence[int], kv_heads: int) -> Pair:
    """Student's t with 1.5 degrees of freedom: a few outliers decide the norms."""
    student = torch.distributions.StudentT(torch.tensor(1.5))
    return student.sample(torch.Size(shape)), student.sample(torch.Size((shape[0], kv_heads, *shape[2:])))


def tight(shape: Sequence[int], kv_heads: int) -> Pair:
    """All queries look at the first half of the keys and away from the second: the bound is almost reached."""
    query, key = (torch.zeros(shape[0], heads, *shape[2:]) for heads in (shape[1], kv_heads))
    query[..., 0] = 4.0
    key[..., 0] = torch.where(torch.arange(shape[2]) < shape[2] // 2, 2.0, -2.0)
    return query, key


def striped(shape: Sequence[int], kv_heads: int) -> Pair:
    """Queries look at every other eight keys: the eight before the last ones carry a row, or the row itself does."""
    query, key = tight(shape, kv_heads)
    key[..., 0] = torch.where(torch.arange(shape[2]) % 16 < 8, 2.0, -2.0)
    return query, key


DATA: dict[str, Callable[[Sequence[int], int], Pair]] = {
    made.__name__: made
    for made in (normal, aligned, offset, equal, anti_aligned, low_rank, heavy_tailed, tight, striped)
}
