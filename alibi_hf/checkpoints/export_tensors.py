"""The tensors of a target, one by one, from those of a folder in this package's layout: the rules, run backwards."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from alibi_hf.checkpoints.export_source import EMBEDDING, HEAD, Converted
from alibi_hf.checkpoints.rules import Rule
from alibi_hf.checkpoints.source import require_finite
from alibi_hf.errors import TensorError


@dataclass(frozen=True)
class Item:
    """One tensor of the target.

    Attributes:
        name: its name there.
        sources: our names, in the order of the rule's targets.
        rule: the rule whose inverse makes it.
        shape: its shape there.
        padded: it is zeros: a bias that the target has and the source lacks.
    """

    name: str
    sources: tuple[str, ...]
    rule: Rule
    shape: tuple[int, ...]
    padded: bool

    @property
    def values(self) -> int:
        """Number of values."""
        return prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Source names, target name, rule and fate, for `export.json`."""
        return {
            "source": [] if self.padded else list(self.sources),
            "target": self.name,
            "rule": "zeros" if self.padded else f"inverse of {self.rule.describe()}",
            "fate": "padded" if self.padded else "used",
        }


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder as the target needs them.

    Attributes:
        source: the folder.
        factors: our names, `{i}` for the layer, and what their values are multiplied by, in float32.
        allow_nonfinite: take NaN and Inf as they are.
    """

    source: Converted
    factors: Mapping[str, float] = field(default_factory=dict)
    allow_nonfinite: bool = False

    def make(self, item: Item, dtype: torch.dtype) -> Tensor:
        """The tensor of `item`: `dtype` for zeros, else as stored.

        Raises:
            TensorError: for NaN and Inf values, and for parts of one tensor that differ in dtype.
        """
        if item.padded:
            return torch.zeros(item.shape, dtype=dtype)
        parts = [self._get(name) for name in item.sources]
        if len(kinds := {part.dtype for part in parts}) > 1:
            raise TensorError(
                f"{', '.join(item.sources)} become one tensor and have the dtypes {sorted(map(str, kinds))}; give the "
                f"folder one dtype first."
            )
        return item.rule.inverse(parts)

    def _get(self, name: str) -> Tensor:
        tensor = self.source.get(EMBEDDING if name == HEAD and self.source.tied else name)
        if not self.allow_nonfinite:
            require_finite(name, tensor)
        factor = self.factors.get(_pattern(name), 1.0)
        return tensor if factor == 1.0 else tensor.float() * factor


def _pattern(name: str) -> str:
    """`model.layers.3.mlp.up_proj.bias` as `model.layers.{i}.mlp.up_proj.bias`."""
    return ".".join("{i}" if part.isdecimal() else part for part in name.split("."))


def make_items(rules: Iterable[Rule], source: Converted, expected: Mapping[str, Tensor], layers: int) -> list[Item]:
    """The target's tensors, in the order of the model.

    Args:
        rules: what becomes of the target's tensors when they are converted; of several that give one tensor the first
            counts, required ones before others.
        source: the folder.
        expected: our state dict of the target's config, for the shapes (on any device).
        layers: number of layers.

    Raises:
        TensorError: where a tensor of the folder finds no place in the target.
    """
    items: list[tuple[int, Item]] = []
    covered: set[str] = set()
    for rule in sorted((rule for rule in rules if rule.fate == "used"), key=lambda rule: not rule.required):
        for layer in range(layers if rule.per_layer else 1):
            names = rule.target_names(layer)
            if covered.isdisjoint(names) and all(name in expected for name in names):
                shape = tuple(rule.inverse([expected[name] for name in names]).shape)
                padded = all(name not in source.tensors for name in names) and names != (HEAD,)
                item = Item(rule.prefix + rule.source_name(layer), names, rule, shape, padded)
                items.append((layer if rule.per_layer else -1, item))
                covered.update(names)
    if left := sorted(source.tensors.keys() - covered - ({HEAD} if source.tied else set())):
        raise TensorError(f"the target has no place for {', '.join(left[:5])} ({len(left)} such tensors).")
    return [item for _, item in sorted(items, key=lambda entry: entry[0])]


__all__ = ["Item", "Weights", "make_items"]
