"""The provable window: how far back a head can look before keys no longer change what it computes.

Write a_ij = s_ij - m (i - j) for the score of query i and key j with its bias, m being the slope of the head. Softmax
of a row does not change when all keys move by one vector c, so s_ij may be taken as scale q_i.(k_j - c), and is at most
scale |q_i| rho with rho the largest |k_j - c|. For any lower bound b_i of the logarithm of the row's denominator, keys
farther than w take at most this share of row i:

    sum over t > w of exp(scale |q_i| rho - b_i - m t) <= exp(G - m (w + 1)) / (1 - exp(-m)),
    G = max over i of (scale |q_i| rho - b_i)

It is below eps once w >= (G + ln(1 / eps) - ln(1 - exp(-m))) / m. Then the output moves by at most 2 eps max|v|. With
M = max|dO| max|v|, and eps at most a half, the gradients of a head move by at most

    |dQ| 6 eps scale M rho,  |dV_j| max|dO| eps (1 + 2 sum_i P_ij),  |dK_j| 2 eps scale max|q| M (1 + 4 sum_i P_ij).

Two bounds b_i are used, whichever is larger:

* self score: the row contains its own key, so ln Z_i >= s_ii.
* block Jensen: over the n = 128 b keys of the b whole blocks before the query's own, b in {1, 2, 4, 8}, the logarithm
  of a mean is at least the mean of the logarithms: ln Z_i >= ln n + scale q_i.(mean of k - c) - m (mean distance). It
  is worth ln n on shallow heads. Rows of the first block have none, and need none: no window is shorter than a block,
  so they drop nothing.

So with eps a fraction of the dtype's own rounding, the window is exact in that dtype, whatever the data: large norms
give windows as long as the text, and dense attention.

Relatives: Adaptive Computation Pruning for the Forgetting Transformer (arXiv:2504.06949) prunes decayed pairs with a
bound of this kind, from norms, per block; skip-softmax (arXiv:2512.12087) with a threshold that is tuned.
"""

from __future__ import annotations

import math

import torch

from .positions_alibi import is_tracing

BLOCK = 128  # keys whose mean the Jensen bound takes; no window is shorter
JENSEN_BLOCKS = (1, 2, 4, 8)
JENSEN_KEYS = 8192  # below, the self score alone does as well, for less
CENTRE_KEYS = 256  # keys whose mean is the centre: any centre is right, this one is cheap and near the best
ROUNDING = 2.0**-13  # what float32 sums of at most 256 products of 16-bit or wider numbers can be off by, generously


def default_eps(dtype: torch.dtype, gradients: bool) -> float:
    """Return the share of a row that may be dropped: a quarter of the dtype's rounding, a sixteenth for gradients."""
    return torch.finfo(dtype).eps / (16 if gradients else 4)


def head_windows(
    query: torch.Tensor,
    key: torch.Tensor,
    slopes: torch.Tensor,
    scaling: float,
    eps: float,
    jensen: bool = True,
) -> torch.Tensor:
    """Return the window of each head, float32 `[heads]`, in tokens: keys farther away than that cannot matter.

    Infinite for a slope of zero and for numbers that are not finite. Nothing waits for the device.

    Args:
        query: `[batch, heads, queries, dim]`; key: `[batch, key/value heads, keys, dim]`; the last query sits at the
            last key. Both as attention takes them, with RoPE rotated: the bounds are of these very vectors.
        slopes: float32 `[heads]`.
        eps: the share of a row's weight that may be dropped, see `default_eps`.
        jensen: use both bounds, the second of which wants every query to see all keys before it; without it the windows
            are cheaper to find, and a little longer.
    """
    return windows_of_gap(head_gaps(query, key, slopes, scaling, jensen), slopes, eps)


def head_gaps(
    query: torch.Tensor, key: torch.Tensor, slopes: torch.Tensor, scaling: float, jensen: bool = True
) -> torch.Tensor:
    """Return the largest gap between the bounds of a row, G above, float32 `[heads]`, in nats; as `head_windows`."""
    groups, heads = query.shape[1] // key.shape[1], key.shape[1]
    if query.device.type == "cpu" and not is_tracing():  # a head a thread: what is read twice stays in the caches
        heads = min(heads, torch.get_num_threads())
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):  # the bound allows for no 16-bit scores
        own = heads * groups
        pieces = zip(query.split(own, 1), key.split(heads, 1), slopes.split(own), strict=True)
        return torch.cat([_gaps(*piece, groups, scaling, jensen) for piece in pieces])


def _gaps(
    query: torch.Tensor, key: torch.Tensor, slopes: torch.Tensor, groups: int, scaling: float, jensen: bool
) -> torch.Tensor:
    query, key = query.float().unflatten(1, (-1, groups)), _at_least_float32(key)
    centred = (key - centre(key)).float()
    spread = row_norms(centred).amax(-1)[:, :, None, None]
    largest = row_norms(query) * spread * abs(scaling)  # what no score of a row can pass
    own = centred[:, :, None, key.shape[2] - query.shape[3] :]
    lower = (query * own).sum(-1) * scaling
    if jensen:
        lower = torch.maximum(lower, _jensen(query, centred, slopes.unflatten(0, (-1, groups)), scaling))
    return (largest * (1 + ROUNDING) - lower).amax(-1).amax(0).flatten().clamp(min=0)


def windows_of_gap(gap: torch.Tensor, slopes: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the window of each head, float32 as `gap`: `[heads]`, from `head_gaps`, or `[batch, heads]`."""
    tail = -torch.log(-torch.expm1(-slopes))
    windows = (gap + math.log(1 / eps) + tail) / slopes
    return torch.nan_to_num(windows, nan=torch.inf, posinf=torch.inf).clamp(min=BLOCK)


def _at_least_float32(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def centre(key: torch.Tensor) -> torch.Tensor:
    """Return the mean of some keys spread over the text, `[batch, key/value heads, 1, dim]`."""
    return key[:, :, :: max(1, key.shape[2] // CENTRE_KEYS)].mean(2, keepdim=True)


def row_norms(states: torch.Tensor) -> torch.Tensor:
    """Return the length of each row of `[..., dim]` (float32 or narrower), float32 `[...]`."""
    return torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)


def _jensen(query: torch.Tensor, centred: torch.Tensor, slopes: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return the block Jensen bound of each row, float32 `[batch, key/value heads, group, queries]`.

    It is infinite in the first block, whose rows drop nothing, and minus infinite where there are no blocks before.
    """
    queries, keys = query.shape[3], centred.shape[2]
    first = (keys - queries) // BLOCK  # block of the first query
    ahead = keys - queries - first * BLOCK
    blocks = -(-keys // BLOCK) - first
    padded = torch.nn.functional.pad(query, (0, 0, ahead, blocks * BLOCK - ahead - queries))
    rows = padded.unflatten(3, (blocks, BLOCK))  # [batch, key/value heads, group, blocks, BLOCK, dim]
    means = _means_before(centred, first + blocks)[:, :, None, first:]
    scores = torch.matmul(rows, means.transpose(-1, -2)) * scaling  # [..., blocks, BLOCK, candidates]
    sizes = BLOCK * torch.tensor(JENSEN_BLOCKS, device=query.device, dtype=torch.float32)
    inside = torch.arange(BLOCK, device=query.device)[:, None]
    distance = inside + (sizes + 1) / 2  # mean distance to the keys of the blocks before, [BLOCK, candidates]
    bound = scores + torch.log(sizes) - slopes[..., None, None, None] * distance
    index = torch.arange(first, first + blocks, device=query.device)[:, None, None]
    missing = torch.tensor(JENSEN_BLOCKS, device=query.device) > index
    bound = bound.masked_fill(missing, -torch.inf).amax(-1)
    bound = bound.masked_fill(index[..., 0] == 0, torch.inf)
    return bound.flatten(3)[..., ahead : ahead + queries]


def _means_before(centred: torch.Tensor, blocks: int) -> torch.Tensor:
    """Return for each block the mean key of the 1, 2, 4 and 8 blocks before it, `[batch, heads, blocks, 4, dim]`.

    Differences of running sums would cancel; these are sums of whole blocks. Zero where there are not so many.
    """
    whole = centred.shape[2] // BLOCK
    means = centred[:, :, : whole * BLOCK].unflatten(2, (whole, BLOCK)).mean(3)
    pad = torch.nn.functional.pad
    level = pad(means, (0, 0, 1, 0))[:, :, :blocks]  # one block before
    levels = [level]
    for size in JENSEN_BLOCKS[:-1]:
        level = (level + pad(level, (0, 0, size, 0))[:, :, : level.shape[2]]) / 2
        levels.append(level)
    return torch.stack(levels, dim=3)


class KeyNorms:
    """What the windows of one query need to know of the keys in a cache, kept up as keys are appended.

    Attributes:
        tokens: how many keys were seen.
        centre: float32 or wider `[batch, key/value heads, 1, dim]`, from the keys seen first.
        spread: float32 `[batch, key/value heads]`, the largest distance of a key from the centre.
    """

    def __init__(self, key: torch.Tensor) -> None:
        self.tokens = 0
        self.centre = centre(_at_least_float32(key))
        self.spread = key.new_zeros(key.shape[:2], dtype=torch.float32)
        self.extend(key)

    def extend(self, key: torch.Tensor) -> None:
        """Take in all keys so far, `[batch, key/value heads, keys, dim]`; only the new ones are read."""
        new = key[:, :, self.tokens :]
        if new.shape[2]:
            self.spread = torch.maximum(self.spread, row_norms((new - self.centre).float()).amax(-1))
        self.tokens = key.shape[2]


def decode_windows(
    query: torch.Tensor,
    key: torch.Tensor,
    norms: KeyNorms,
    slopes: torch.Tensor,
    scaling: float,
    eps: float,
    jensen: bool = True,
) -> torch.Tensor:
    """Return the window of each head for one query at the last key, float32 `[heads]`; as `head_windows`.

    Args:
        query: `[batch, heads, 1, dim]`; key: `[batch, key/value heads, keys, dim]`, the last `BLOCK` of which it sees.
        norms: of these keys.
        slopes: float32 `[heads]`, or `[batch or 1, heads]` where rows have their own.
    """
    heads = query[:, :, 0].float().unflatten(1, (key.shape[1], -1))  # [batch, key/value heads, group, dim]
    recent = (key[:, :, -BLOCK if jensen else -1 :] - norms.centre).float()
    largest = row_norms(heads) * norms.spread[:, :, None]
    lower = torch.linalg.vecdot(heads, recent[:, :, -1:]) * scaling
    if jensen:
        count = recent.shape[2]
        distance = slopes.unflatten(-1, (key.shape[1], -1)) * ((count - 1) / 2)
        mean = torch.linalg.vecdot(heads, recent.mean(2, keepdim=True)) * scaling
        lower = torch.maximum(lower, mean + (math.log(count) - distance))
    gap = largest * (abs(scaling) * (1 + ROUNDING)) - lower
    return windows_of_gap(gap.flatten(1), slopes, eps).amax(0)
