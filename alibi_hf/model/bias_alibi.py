"""Slopes, positions and distances: everything that ALiBi adds to attention, in one place.

* Slopes come from the closed form in float64, or from the config, and are rounded to float32 once; they are never a
  buffer.
* A distance is the number of unmasked tokens between query and key of one document; the bias is minus slope times
  distance, in float32, whatever the dtype of the model.
* A masked token neither is read nor reads: its attention output is zero.
* `Distances` is made once a forward call and handed to every layer; the backends read nothing else.

ALiBi: Press, Smith and Lewis, "Train Short, Test Long", arXiv:2108.12409, section 3; for head counts that are no power
of two the authors' own interpolation (`attention_with_linear_biases`, `fairseq/models/transformer.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

# Added to a hidden score. Finite, so that a row with nothing to see stays finite (its output is set to zero after).
MASKED = torch.finfo(torch.float32).min / 2


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> list[float]:
    """Return the positive slope of each head, in float64.

    With c the largest power of two not above `num_heads`, the first c heads have `2 ** (-bias_max * i / c)`, i = 1..c;
    the others are taken between those: `2 ** (-bias_max * i / 2c)`, i = 1, 3, 5, ...
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-bias_max * i / power) for i in range(1, power + 1)]
    between = [2.0 ** (-bias_max * i / (2 * power)) for i in range(1, 2 * (num_heads - power), 2)]
    return slopes + between


def rounded_slopes(num_heads: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Return the slopes as Transformers' BLOOM and Falcon compute them: powers of a float32 base, float32 `[heads]`.

    Source: `transformers/models/bloom/modeling_bloom.py`, `_get_alibi_slopes`.
    """
    power = 1 << (num_heads.bit_length() - 1)

    def powers_of_base(count: int, stop: int, step: int) -> torch.Tensor:
        base = torch.full((), 2 ** (-(2 ** -(math.log2(count) - 3))), dtype=torch.float32, device=device)
        return torch.pow(base, torch.arange(1, stop, step, dtype=torch.int32, device=device))

    slopes = powers_of_base(power, 1 + power, 1)
    if power == num_heads:
        return slopes
    return torch.cat([slopes, powers_of_base(2 * power, 1 + 2 * (num_heads - power), 2)])


def config_slopes(config: Any, device: torch.device | str | None = None) -> torch.Tensor:
    """Return the slopes that `config` (an `AlibiConfig`) asks for, float32 `[num_attention_heads]`."""
    heads = config.num_attention_heads
    if not config.alibi:
        return torch.zeros(heads, dtype=torch.float32, device=device)
    if config.alibi_rounding in ("bloom", "falcon"):
        slopes = rounded_slopes(heads, device)
        return slopes.bfloat16().float() if config.alibi_rounding == "falcon" else slopes
    exact = config.alibi_slopes if config.alibi_slopes is not None else alibi_slopes(heads, config.alibi_bias_max)
    return torch.tensor(exact, dtype=torch.float64).to(device=device, dtype=torch.float32)


def bias_dtype(config: Any, dtype: torch.dtype) -> torch.dtype | None:
    """Return the 16-bit dtype in which a model of `dtype` rounds slopes and bias as Jais does; None for float32."""
    return dtype if config.alibi_rounding == "jais" and dtype.itemsize < 4 else None


def scaled_slopes(
    config: Any,
    length: int | torch.Tensor,
    device: torch.device | str | None,
    rounded: torch.dtype | None = None,
) -> torch.Tensor:
    """Return `config_slopes` divided by `alibi_scaling`.

    The divisor is a fixed factor, or `length / train_seq_len` where that is above one. Slopes and quotient are rounded
    to `rounded`, if given. Source: Cerebras' BTLM and Jais, which take the total key length of the call.

    Args:
        length: of the text in tokens, up to the last query of the call; or int64 `[batch or 1, heads or 1, queries or
            1]`, of the text that each query belongs to.

    Returns:
        float32 `[num_attention_heads]`, or `[batch or 1, num_attention_heads, queries or 1]`.
    """
    slopes = config_slopes(config, device)
    slopes = slopes if rounded is None else slopes.to(rounded).float()
    scaling = config.alibi_scaling
    if scaling is None:
        return slopes
    if "factor" in scaling:
        slopes = slopes / scaling["factor"]
    else:
        if not isinstance(length, torch.Tensor):
            length = torch.full((), length, device=device)  # `as_tensor` would fix a traced length to one number
        divisor = length.to(device=device, dtype=torch.float32) / scaling["train_seq_len"]
        slopes = (slopes[:, None] if divisor.dim() else slopes) / divisor.clamp(min=1.0)
    return slopes if rounded is None else slopes.to(rounded).float()


def rounded_row(config: Any, slopes: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the bias that upstream adds for each key, rounded as upstream rounds it, `[batch, heads, keys]`.

    Args:
        slopes: float32 `[heads]`, from `config_slopes`.
        positions: int64 `[batch, keys]`, the position of each key, 0 where masked.
        dtype: the model's dtype, in which upstream stores the bias.

    Source: `build_alibi_tensor` of `modeling_bloom.py` and of `modeling_falcon.py`; Falcon multiplies in bfloat16 and
    then divides by the square root of the head dimension. `_gen_alibi_mask` of Baichuan's `modeling_baichuan.py`.
    """
    if config.alibi_rounding in ("bloom", "baichuan"):
        return (slopes[:, None] * positions[:, None]).to(dtype)
    return (slopes[:, None].bfloat16() * positions[:, None]).to(dtype) / math.sqrt(config.head_dim)


@dataclasses.dataclass
class Distances:
    """What separates the queries of one call from its keys; made once a call, read by every backend.

    Attributes:
        slopes: float32 `[heads]`, positive.
        query_slopes: float32 `[batch or 1, heads, queries]`, in place of `slopes` where `alibi_scaling` divides those
            of one text by another number than those of its neighbours; None where `slopes` serve every query.
        query_index: int64 `[queries]`, the index of each query among the keys; causality is `key <= query_index`.
        num_keys: number of keys, a static cache's empty places included.
        offset: index of the first query: an int, or a tensor with a static cache.
        query_position, key_position: int64 `[batch or 1, queries or keys]`; None where they are the indices.
        query_document, key_document: int64, same shapes; None where there is one document a row.
        key_mask: bool `[batch, keys]`, True for a key that counts; None where all do.
        custom_mask: the caller's own mask `[batch or 1, heads or 1, queries, keys]`, bool (True: visible) or float
            (added); it then decides alone what is visible.
        row: `[batch or 1, heads, keys]`, the bias of BLOOM and Falcon, rounded by position; None elsewhere.
        rounded: the 16-bit dtype of Jais' bias, rounded by distance; None elsewhere.
        sqrt: the bias takes the square root of the distance.
        biased: False without ALiBi, where all slopes are zero.
        rotation: how queries and keys are rotated, with RoPE: read by the layers, not by the backends.
        window: keys that provably cannot matter may be left out.
        window_eps: the share of a row's weight that may be left out; None: from the dtype.
        shared: what a backend works out once a call, whatever the heads, by name.
    """

    slopes: torch.Tensor
    query_index: torch.Tensor
    num_keys: int
    offset: int | torch.Tensor = 0
    query_slopes: torch.Tensor | None = None
    query_position: torch.Tensor | None = None
    key_position: torch.Tensor | None = None
    query_document: torch.Tensor | None = None
    key_document: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    custom_mask: torch.Tensor | None = None
    row: torch.Tensor | None = None
    rounded: torch.dtype | None = None
    sqrt: bool = False
    biased: bool = True
    rotation: Any = None
    window: bool = False
    window_eps: float | None = None
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)
    _kept: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)  # likewise, but for these heads

    @property
    def by_index(self) -> bool:
        """True where bias and visibility are functions of `query_index - key_index` alone."""
        special = (self.query_slopes, self.key_position, self.key_document, self.key_mask, self.custom_mask, self.row)
        return all(value is None for value in special)

    @property
    def query_mask(self) -> torch.Tensor | None:
        """Bool `[batch, queries]`, True for a query that counts; None where all do. The others read nothing."""
        return None if self.key_mask is None else self.key_mask[:, self.query_index]

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """Return `make()`, worked out once a call for all layers, whatever their heads."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    def heads(self, start: int, count: int) -> Distances:
        """Return the distances of `count` heads from head `start` on: what one tensor-parallel rank needs."""
        own = slice(start, start + count)
        mask, row, query_slopes = self.custom_mask, self.row, self.query_slopes
        if mask is not None and mask.shape[1] != 1:
            mask = mask[:, own]
        return self.replace(
            slopes=self.slopes[own],
            query_slopes=None if query_slopes is None else query_slopes[:, own],
            custom_mask=mask,
            row=None if row is None else row[:, own],
            _kept={},
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Distances:
        """Return the same distances with every tensor on `device`; accelerate's device hooks call this."""
        if self.slopes.device == torch.device(device):
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        if self.rotation is not None:
            moved["rotation"] = self.rotation.to(device, non_blocking)
        return self.replace(**moved, shared={}, _kept={})

    def replace(self, **changes: Any) -> Distances:
        """Return a copy with some attributes changed; not `dataclasses.replace`, see below the class."""
        return Distances(**{**vars(self), **changes})

    def slopes_at(self, row: int | torch.Tensor, query: int | torch.Tensor) -> torch.Tensor:
        """Return the slopes of a query in a row, float32 `[heads]`; where they differ, `[n, heads]` of int64 `[n]`."""
        if self.query_slopes is None:
            return self.slopes
        return self.query_slopes[row if self.query_slopes.shape[0] > 1 else row * 0, :, query]

    def bias(self, delta: torch.Tensor, slopes: torch.Tensor | None = None) -> torch.Tensor:
        """Return minus slope times distance, float32 `[batch or 1, heads, q, k]`.

        Args:
            delta: query position minus key position, int `[batch or 1, q, k]`.
            slopes: of these queries, float32 `[batch or 1, heads, q]`; None: `self.slopes`.
        """
        slopes = self.slopes[:, None, None] if slopes is None else slopes[..., None]
        if self.rounded is not None:
            return -(slopes.to(self.rounded) * delta[:, None].to(self.rounded)).float()
        distance = delta[:, None].to(torch.float32)
        if self.sqrt:
            distance = distance.clamp(min=0).sqrt()
        return -slopes * distance

    def block(self, start: int, stop: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what is added to the scores of queries `start..stop` against the first `num_keys` keys.

        Returns:
            bias: float32 (float64 where the caller's mask is) `[batch or 1, heads, stop - start, num_keys]`, `MASKED`
                where hidden.
            blind: bool `[batch or 1, heads or 1, stop - start, 1]`, True for queries that see no key at all; None where
                there cannot be any.
        """
        whole = self.query_index.numel() == 1 and num_keys == self.num_keys
        if whole and (start, stop) in self._kept:
            return self._kept[start, stop]
        bias = self._block_bias(start, stop, num_keys)
        visible = self.visible(start, stop, num_keys)
        if self.custom_mask is not None and self.custom_mask.dtype != torch.bool:
            bias = bias + self.custom_mask[:, :, start:stop, :num_keys]
        bias = bias.masked_fill(~visible, MASKED)
        sure = self.key_mask is None and self.custom_mask is None  # a query always sees itself
        result = bias, None if sure else ~visible.any(-1, keepdim=True)
        if whole:  # one query: small, and the same for all layers
            self._kept[start, stop] = result
        return result

    def _block_bias(self, start: int, stop: int, num_keys: int) -> torch.Tensor:
        if self.row is not None:
            return self.row[:, :, None, :num_keys].float()
        query, key = self.query_position, self.key_position
        if query is None or key is None:
            query, key = self.query_index[None], torch.arange(num_keys, device=self.slopes.device)[None]
        delta = query[:, start:stop, None] - key[:, None, :num_keys]
        return self.bias(delta) if self.query_slopes is None else self.bias(delta, self.query_slopes[:, :, start:stop])

    def visible(self, start: int, stop: int, num_keys: int) -> torch.Tensor:
        """Return which keys the queries see, bool `[batch or 1, heads or 1, stop - start, num_keys]`."""
        if self.custom_mask is not None:
            mask = self.custom_mask[:, :, start:stop, :num_keys]
            return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        key_index = torch.arange(num_keys, device=self.slopes.device)
        visible = (key_index <= self.query_index[start:stop, None])[None, None]
        query_mask = self.query_mask
        if self.key_mask is not None and query_mask is not None:
            visible = visible & self.key_mask[:, None, None, :num_keys] & query_mask[:, None, start:stop, None]
        if self.query_document is not None and self.key_document is not None:
            same = self.query_document[:, start:stop, None] == self.key_document[:, None, :num_keys]
            visible = visible & same[:, None]
        return visible


# FSDP's mixed precision casts the tensors inside every dataclass that a layer is given, and slopes are float32.
del Distances.__dataclass_fields__
