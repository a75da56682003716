"""Attention that is summed up while it is computed: what `reach` knows of a head comes from here.

Queries are taken `ROWS` at a time against all keys before them, a few heads at once, so that the weights of a whole
text never exist: memory grows with the length, not with its square. Scores, bias and softmax are those of eager
attention, formed in float32 (float64 for a float64 model); sums over queries are kept in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from alibi_hf.model.attention_alibi import ALL_ATTENTION_FUNCTIONS, eager_attention_forward
from alibi_hf.model.bias_alibi import Distances
from alibi_hf.model.dense_alibi import soft_cap
from alibi_hf.model.layers_alibi import AlibiAttention
from alibi_hf.model.modeling_alibi import AlibiPreTrainedModel

ROWS = 256  # queries whose weights are in memory at a time
BLOCK_BYTES = 16 * 2**20  # memory of one block of weights, where that leaves room for a head at least


@dataclass
class AttentionSums:
    """Sums over the queries of one layer, each query's weights adding up to one; float64, on the CPU.

    Attributes:
        mass: by head and distance in tokens, `[heads, tokens]`.
        first: on the first token, `[heads]`; `late_first` likewise, of the queries in the second half of the text.
        entropy: in nats, `[heads]`.
        tokens: how many queries there were; `late_tokens`: in the second half.
    """

    mass: torch.Tensor
    first: torch.Tensor
    late_first: torch.Tensor
    entropy: torch.Tensor
    tokens: int

    @property
    def late_tokens(self) -> int:
        """Queries from `tokens // 2` on."""
        return self.tokens - self.tokens // 2

    @property
    def mean_distance(self) -> torch.Tensor:
        """Mean over queries of the distance that each attends to on average, in tokens, `[heads]`."""
        return (self.mass @ torch.arange(self.mass.shape[1], dtype=torch.float64)) / self.tokens

    def distance_of(self, share: float) -> torch.Tensor:
        """Return the smallest distance within which `share` of the mass of all queries lies, int64 `[heads]`."""
        within = self.mass.cumsum(1) / self.mass.sum(1, keepdim=True)
        return (within < share).sum(1)


def attend_and_sum(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: Distances,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, AttentionSums]:
    """Return the attention output `[1, heads, tokens, dim]` of one text, and the sums of its weights.

    Args:
        query: `[1, heads, tokens, dim]`; key, value: `[1, key/value heads, tokens, dim]`.
    """
    heads, tokens = query.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    repeats = heads // key.shape[1]
    output = torch.empty_like(query)
    mass = torch.zeros(heads, tokens, dtype=torch.float64, device=query.device)
    first, late, entropy = (mass.new_zeros(heads) for _ in range(3))
    together = max(1, BLOCK_BYTES // (dtype.itemsize * min(ROWS, tokens) * tokens))
    for group in torch.arange(heads).split(together):
        low, high = int(group[0]), int(group[-1]) + 1
        shared = (group // repeats).to(query.device)
        keys, values = (states[0, shared].to(dtype) for states in (key, value))
        own = distances.heads(low, high - low)
        for start in range(0, tokens, ROWS):
            stop = min(start + ROWS, tokens)
            scores = query[0, low:high, start:stop].to(dtype) @ keys[:, :stop].transpose(1, 2) * scaling
            scores = soft_cap(scores, softcap).add_(own.block(start, stop, stop)[0][0])
            weights, found = _softmax(scores)
            output[0, low:high, start:stop] = (weights @ values[:, :stop]).to(output.dtype)
            mass[low:high, :stop] += _by_distance(weights)
            first[low:high] += weights[..., 0].double().sum(1)
            late[low:high] += weights[:, max(0, tokens // 2 - start) :, 0].double().sum(1)
            entropy[low:high] += found.double().sum(1)
    return output, AttentionSums(mass.cpu(), first.cpu(), late.cpu(), entropy.cpu(), tokens)


def _softmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights `[heads, rows, keys]` and the entropy of each row in nats `[heads, rows]`; takes `scores`."""
    scores -= scores.amax(-1, keepdim=True)
    scores.clamp_(min=torch.finfo(scores.dtype).min)  # a bias past that is minus infinity, and has no weight
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    weights /= total
    return weights, total[..., 0].log() - torch.linalg.vecdot(weights, scores)


def _by_distance(weights: torch.Tensor) -> torch.Tensor:
    """Return the sums of `weights` `[heads, rows, keys]` by distance, float64 `[heads, keys]`.

    The last query sits at the last key. With `rows - 1` zeros before each row, the weights of one distance are one step
    to the right and one down from each other: a column of a view whose rows are one number longer.
    """
    heads, rows, keys = weights.shape
    padded = F.pad(weights, (rows - 1, 0))
    width = padded.shape[2]
    columns = padded.as_strided((heads, rows, keys), (rows * width, width + 1, 1))
    return columns.sum(1).double().flip(1)  # the first column is the farthest


Observe = Callable[[int, torch.Tensor, torch.Tensor, Distances, float, AttentionSums], None]


@contextmanager
def observed_attention(model: AlibiPreTrainedModel, observe: Observe) -> Iterator[None]:
    """Inside the block, compute this model's attention by `attend_and_sum`, and hand each layer's sums to `observe`.

    It is called with the layer, the queries and keys as attention gets them, the distances, the factor on the scores,
    and the sums. Other models in the process are left alone. One text a call, without a mask and a cache.
    """
    name = model.config._attn_implementation
    modules = {id(module) for module in model.modules() if isinstance(module, AlibiAttention)}
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)

    def attend_observed(
        module: AlibiAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if id(module) not in modules:
            return attend(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
        distances, scaling = kwargs["distances"], kwargs["scaling"]
        output, sums = attend_and_sum(query, key, value, distances, scaling, kwargs["softcap"])
        observe(module.layer_idx, query, key, distances, scaling, sums)
        return output.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS[name] = attend_observed
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = attend


__all__ = ["ROWS", "AttentionSums", "attend_and_sum", "observed_attention"]
