"""`Rule`: how one upstream tensor becomes tensors of this package's model, and back, bit for bit.

* One rule serves the streaming converter, its inverse, and direct loading through Transformers.
* Names are patterns: `{i}` stands for the layer; `prefix` may or may not be there in a file.
* An operation only moves rows about, so that it holds for weights and biases alike and its inverse is exact. The one
  exception is a fold, `Normalised`, which is checked by folding the source again.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from alibi_hf.errors import TensorError

Fate = Literal["used", "tied", "dropped", "config"]
_LAYER = "(0|[1-9][0-9]{0,5})"  # a layer has one name: neither 00 nor a digit of another script
_FOLDED_ROWS = 4096  # rows of a fold that are in float64 at a time
BASE_PREFIX = "model."  # base_model_prefix of the Alibi classes: heads have it, AlibiModel itself does not


class Operation(Protocol):
    """Turns one upstream tensor into one or more of ours along dimension 0; `inverse` undoes it exactly."""

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Upstream tensor [rows, ...] to ours."""
        ...

    def inverse(self, tensors: Sequence[Tensor]) -> Tensor:
        """Ours back to the upstream tensor [rows, ...]."""
        ...


@dataclass(frozen=True)
class Copy:
    """The tensor as it is, under another name."""

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[...] to [...], unchanged."""
        return (tensor,)

    def inverse(self, tensors: Sequence[Tensor]) -> Tensor:
        """[...] to [...], unchanged."""
        return tensors[0]


@dataclass(frozen=True)
class Split:
    """Contiguous blocks of rows, such as `[q; k; v]` of MPT's `Wqkv`; `sizes` are the rows of each."""

    sizes: tuple[int, ...]

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[sum(sizes), ...] to one tensor [size, ...] a block; `TensorError` if the rows are another number."""
        _need_rows(tensor, sum(self.sizes), f"blocks of {list(self.sizes)} rows")
        return tuple(part.contiguous() for part in torch.split(tensor, list(self.sizes)))

    def inverse(self, tensors: Sequence[Tensor]) -> Tensor:
        """Blocks [size, ...] to [sum(sizes), ...]."""
        return torch.cat(list(tensors))


@dataclass(frozen=True)
class Transposed:
    """Weights [in, out] of Transformers' `Conv1D`, turned to [out, in] for `then`; biases go to `then` as they are."""

    then: Operation = field(default_factory=Copy)

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[in, out] to what `then` makes of [out, in]."""
        return tuple(part.contiguous() for part in self.then.forward(tensor.t()))

    def inverse(self, tensors: Sequence[Tensor]) -> Tensor:
        """What `then` made of [out, in] to [in, out]."""
        return self.then.inverse(tensors).t().contiguous()


@dataclass(frozen=True)
class Interleaved:
    """Query, key and value rows head by head: `[heads, parts, rows / (heads * parts), ...]` (BLOOM, Falcon-RW)."""

    heads: int
    parts: int = 3

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[heads * parts * D, ...] to `parts` tensors [heads * D, ...]; `TensorError` if the rows do not divide."""
        rows = tensor.shape[0]
        _need_rows(tensor, rows - rows % (self.heads * self.parts), f"{self.heads} heads of {self.parts} parts")
        rest = tuple(tensor.shape[1:])
        by_head = tensor.reshape(self.heads, self.parts, rows // (self.heads * self.parts), *rest)
        return tuple(by_head[:, part].reshape(rows // self.parts, *rest).contiguous() for part in range(self.parts))

    def inverse(self, tensors: Sequence[Tensor]) -> Tensor:
        """`parts` tensors [heads * D, ...] to [heads * parts * D, ...]."""
        rest = tuple(tensors[0].shape[1:])
        by_head = [tensor.reshape(self.heads, 1, -1, *rest) for tensor in tensors]
        return torch.cat(by_head, dim=1).reshape(-1, *rest)


@dataclass(frozen=True)
class Normalised:
    """Rows of length one: what a normalised head (Baichuan2's `NormHead`) computes with, folded into its weight.

    A fold changes values, so there is no way back to the source. `inverse` gives the normalised rows as they are:
    upstream normalises them once more, which changes nothing beyond rounding.
    """

    eps: float = 1e-12

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[rows, width] to [rows, width], each row divided by its length (at least `eps`), in the tensor's dtype.

        Computed in float64, some rows at a time: the result is rounded once and is the same on every machine.
        """
        if tensor.is_meta:
            return (tensor,)
        folded = torch.empty_like(tensor)
        for rows, place in zip(tensor.split(_FOLDED_ROWS), folded.split(_FOLDED_ROWS), strict=True):
            wide = rows.to("cpu", torch.float64)  # some devices have no float64
            place.copy_(torch.nn.functional.normalize(wide, dim=1, eps=self.eps))
        return (folded,)

    def inverse(self, tensors: Sequence[Tensor]) -> Tensor:
        """[rows, width] to [rows, width], unchanged."""
        return tensors[0]


def _need_rows(tensor: Tensor, rows: int, layout: str) -> None:
    if tensor.shape[0] != rows or rows == 0:
        raise TensorError(f"a tensor of shape {list(tensor.shape)} cannot hold {layout}; {rows} rows would fit.")


@dataclass(frozen=True)
class Rule:
    """One upstream tensor (or one a layer) and what becomes of it.

    Args:
        source: upstream's name, `{i}` for the layer, without the optional `prefix`.
        targets: our names in `AlibiForCausalLM`, `{i}` for the layer, in the order the operation gives them; of a
            "config" tensor, the field of our config.
        operation: how the values move.
        fate: "used"; "tied" (a copy of the first target, not stored again); "dropped"; "config" (one number a query
            head, which our config.json holds instead of a tensor).
        reason: why, for "tied" and "dropped".
        prefix: a start of the name that some files have and others lack, such as "transformer.".
        wrapper: a further start before the prefix that some files have, such as the "model." of a training framework.
        required: whether its absence is an error.
    """

    source: str
    targets: tuple[str, ...] = ()
    operation: Operation = field(default_factory=Copy)
    fate: Fate = "used"
    reason: str = ""
    prefix: str = ""
    wrapper: str = ""
    required: bool = True

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(self.source_regex())

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor a layer."""
        return "{i}" in self.source

    @property
    def folded(self) -> bool:
        """Whether the operation changes values, so that `inverse` does not give the source back."""
        return isinstance(self.operation, Normalised)

    def source_regex(self) -> str:
        """The regular expression of the full source name; its one group, if any, is the layer."""
        optional = "".join(f"(?:{re.escape(start)})?" for start in (self.wrapper, self.prefix) if start)
        return f"^{optional}" + re.escape(self.source).replace(r"\{i\}", _LAYER) + "$"

    def match(self, name: str) -> int | None:
        """The layer of `name` (0 for a rule without layers), or None if `name` is not this rule's source."""
        found = self._regex.fullmatch(name)  # "$" alone would let a line break follow
        if found is None:
            return None
        return int(found.group(1)) if self.per_layer else 0

    def source_name(self, layer: int = 0) -> str:
        """The source's name without prefix."""
        return self.source.replace("{i}", str(layer))

    def target_names(self, layer: int = 0) -> tuple[str, ...]:
        """The targets' names."""
        return tuple(target.replace("{i}", str(layer)) for target in self.targets)

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The upstream tensor as ours, in the order of `targets`; `TensorError` where its rows do not fit."""
        return self.operation.forward(tensor)

    def widened(self, tensor: Tensor, target: torch.dtype | None) -> Tensor:
        """What a tensor that will be of dtype `target` is folded from: rounded after the fold, not before.

        The tensor itself where nothing is folded, or `target` (None: the tensor's own) is no wider.
        """
        if target is None or not self.folded:
            return tensor
        return tensor.to(torch.promote_types(tensor.dtype, target))

    def inverse(self, tensors: Sequence[Tensor]) -> Tensor:
        """Our tensors, in the order of `targets`, as the upstream tensor: bit for bit, unless `folded`."""
        if len(tensors) != len(self.targets):
            raise TensorError(f"{self.source} is made of {len(self.targets)} tensors, {len(tensors)} were given.")
        return self.operation.inverse(tensors)

    def describe(self) -> str:
        """The operation in words, for reports."""
        if self.fate not in ("used", "config"):
            return self.fate
        words = repr(self.operation).removesuffix("()").lower()
        return f"folded: {words}" if self.folded else words

    def to_transformers(self) -> Any:
        """The same rule as a `WeightRenaming` or `WeightConverter` of Transformers; None for dropped tensors.

        Source: `transformers.core_model_loading`.
        """
        from alibi_hf.checkpoints._transformers_rules import to_transformers

        return to_transformers(self)


__all__ = ["BASE_PREFIX", "Copy", "Fate", "Interleaved", "Normalised", "Operation", "Rule", "Split", "Transposed"]
