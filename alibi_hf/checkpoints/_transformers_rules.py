"""A `Rule` in the words of Transformers' loader: `WeightRenaming`, or `WeightConverter` with a `ConversionOps`."""

import re
from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from alibi_hf.checkpoints.rules import BASE_PREFIX, Copy, Rule


class RuleOps(ConversionOps):
    """Runs a rule (or its inverse) inside Transformers' loader."""

    def __init__(self, rule: Rule, inverted: bool = False) -> None:
        self.rule = rule
        self.inverted = inverted

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """The tensors of one group under their full names; `full_layer_name` is the first target's name."""
        if self.inverted:
            tensors = [_single(input_dict[pattern]) for pattern in source_patterns]
            return {target_patterns[0]: self.rule.inverse(tensors)}
        parts = self.rule.forward(_single(next(iter(input_dict.values()))))
        return dict(zip(_full_targets(self.rule, kwargs["full_layer_name"]), parts, strict=True))

    @property
    def reverse_op(self) -> "RuleOps":
        """The same rule in the other direction."""
        return RuleOps(self.rule, not self.inverted)


def to_transformers(rule: Rule) -> WeightRenaming | WeightConverter | None:
    """The rule as Transformers' loader takes it; None for tensors that no tensor of ours is made of.

    A tied copy goes to its own name, where Transformers ties it.
    """
    if rule.fate in ("dropped", "config"):
        return None
    layer = r"\1" if rule.per_layer else ""
    targets = [target.replace("{i}", layer) for target in rule.targets]
    if rule.fate == "tied":
        return WeightRenaming([rule.source_regex()], [rule.source])
    if isinstance(rule.operation, Copy):
        return WeightRenaming([rule.source_regex()], targets)
    return WeightConverter([rule.source_regex()], targets, [RuleOps(rule)])


def _single(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _full_targets(rule: Rule, first: str) -> list[str]:
    """The names of all targets beside `first`, the first one's name with or without the base model's prefix."""
    stems = [target.removeprefix(BASE_PREFIX) for target in rule.targets]
    pattern = re.escape(stems[0]).replace(r"\{i\}", r"(?P<layer>\d+)") + "$"
    found = re.search(pattern, first)
    if found is None:
        raise ValueError(f"{first} is not the first target of the rule for {rule.source}.")
    layer = found.groupdict().get("layer") or ""
    return [first[: found.start()] + stem.replace("{i}", layer) for stem in stems]


__all__ = ["RuleOps", "to_transformers"]
