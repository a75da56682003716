"""Accounting for every tensor of a checkpoint: used, tied or dropped, or the load stops.

`make_plan` matches names with rules; `check_shapes` compares the shapes with those our model has.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from alibi_hf.checkpoints.rules import Rule
from alibi_hf.errors import TensorError
from alibi_hf.model.configuration_alibi import AlibiConfig

_SHOWN = 5
_WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Group:
    """One source tensor, by its name in the file, with the rule and the names of what it becomes."""

    source: str
    rule: Rule
    layer: int
    targets: tuple[str, ...]

    @property
    def fate(self) -> str:
        """ "used", "tied", "dropped" or "config"; see `Rule`."""
        return self.rule.fate


def make_plan(rules: Iterable[Rule], names: Iterable[str], layers: int) -> list[Group]:
    """One group a tensor, in the order of the model.

    Raises:
        TensorError: naming tensors that no rule knows, that are missing, or that are there twice.
    """
    groups: list[Group] = []
    by_rule: dict[tuple[int, int], list[str]] = defaultdict(list)
    listed, left = list(rules), []
    for name in names:
        for number, rule in enumerate(listed):
            layer = rule.match(name)
            if layer is not None and (layer < layers or not rule.per_layer):
                by_rule[number, layer].append(name)
                groups.append(Group(name, rule, layer, rule.target_names(layer)))
                break
        else:
            left.append(name)
    _refuse(left, f"are not understood; config.json says {layers} layers")
    _refuse([" and ".join(found) for found in by_rule.values() if len(found) > 1], "are one tensor under two names")
    _refuse(_missing(listed, by_rule, layers), "are missing from the checkpoint")
    order = {id(rule): number for number, rule in enumerate(listed)}
    return sorted(groups, key=lambda group: (group.rule.per_layer, group.layer, order[id(group.rule)]))


def _missing(rules: list[Rule], by_rule: Mapping[tuple[int, int], list[str]], layers: int) -> list[str]:
    return [
        rule.prefix + rule.source_name(layer)
        for number, rule in enumerate(rules)
        if rule.required
        for layer in range(layers if rule.per_layer else 1)
        if (number, layer) not in by_rule
    ]


def _refuse(names: list[str], what: str) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise TensorError(f"tensors that {what}: {', '.join(names[:_SHOWN])}{more}.")


# The class whose head a checkpoint holds, by the target that only this head has.
_HEADS = (
    ("score.bias", "AlibiForTokenClassification"),
    ("score.weight", "AlibiForSequenceClassification"),
    ("qa_outputs.weight", "AlibiForQuestionAnswering"),
)


def head_class(groups: Iterable[Group]) -> str:
    """The name of our class that has exactly the tensors of `groups`; else the language model."""
    targets = {target for group in groups for target in group.targets}
    return next((name for target, name in _HEADS if target in targets), "AlibiForCausalLM")


def meta_model(config: AlibiConfig, class_name: str = "AlibiForCausalLM") -> nn.Module:
    """Our model without memory: shapes and names only."""
    from alibi_hf.model import modeling_alibi

    with torch.device("meta"):
        return getattr(modeling_alibi, class_name)(config)


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def _sizes(config: AlibiConfig, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """The config fields, in our names, that the dimensions which differ come from; empty where none is known."""
    wrong = [b for a, b in zip(found, wanted, strict=True) if a != b] if len(found) == len(wanted) else []
    names = [f"{name}={getattr(config, name)}" for name in _SIZES if getattr(config, name) in wrong]
    return f" ({', '.join(names)})" if names else ""


def _advice(group: Group, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What to do about a shape; rows of the vocabulary may be padding, which upstream's classes refuse too."""
    if group.targets[0] in _VOCABULARY and found[1:] == wanted[1:]:
        rows = "more" if found[0] > wanted[0] else "fewer"
        return (
            f"There are {rows} rows than tokens. If the tokenizer gives no id from {min(found[0], wanted[0])} on, set "
            f"vocab_size to {found[0]}; otherwise weights and config belong to different checkpoints."
        )
    return "Weights and config belong to different checkpoints, or a size in config.json is wrong."


def check_shapes(
    groups: Iterable[Group], shapes: Mapping[str, tuple[int, ...]], config: AlibiConfig, need_head: bool = True
) -> None:
    """Compare the shapes in the files with those that the config gives.

    Args:
        groups: the plan.
        shapes: shape of each source tensor, by its name in the file.
        config: our config.
        need_head: whether a missing language-model head is an error.

    Raises:
        TensorError: naming the tensor, its shape and the expected one, or targets that nothing fills.
    """
    listed = list(groups)
    model = meta_model(config, head_class(listed))
    expected = dict(model.state_dict())
    filled: set[str] = set()
    for group in listed:
        if group.fate == "config":
            _check_per_head(group.source, shapes[group.source], config)
        if group.fate in ("dropped", "config"):
            continue
        named = {target: f"{group.source} (as {target})" for target in group.targets}
        _refuse([named[name] for name in named if name not in expected], "no part of the model reads")
        doubled = filled.intersection(named) if group.fate == "used" else set()
        _refuse([named[name] for name in sorted(doubled)], "fill what another tensor of the checkpoint fills")
        wanted = tuple(group.rule.inverse([expected[target] for target in group.targets]).shape)
        if shapes[group.source] != wanted:
            raise TensorError(
                f"{group.source} has shape {list(shapes[group.source])}, config.json gives {list(wanted)}"
                f"{_sizes(config, shapes[group.source], wanted)}. {_advice(group, shapes[group.source], wanted)}"
            )
        filled.update(group.targets)
    absent = {"lm_head.weight"} if config.tie_word_embeddings or not need_head else set()
    _refuse(sorted(expected.keys() - filled - absent), "the model needs and the checkpoint lacks")


def check_dtypes(groups: Iterable[Group], dtypes: Mapping[str, torch.dtype]) -> None:
    """`TensorError` for weights that are no floating-point numbers, such as those of a quantised checkpoint.

    Args:
        groups: the plan.
        dtypes: dtype of each source tensor, by its name in the file.
    """
    for group in groups:
        if group.fate != "dropped" and dtypes[group.source] not in _WEIGHTS:
            stored = str(dtypes[group.source]).removeprefix("torch.")
            raise TensorError(
                f"{group.source} is stored as {stored}; a weight is float64, float32, bfloat16 or float16. Use the "
                f"unquantised checkpoint."
            )


def _check_per_head(source: str, shape: tuple[int, ...], config: AlibiConfig) -> None:
    heads = config.num_attention_heads
    if shape not in ((heads,), (heads, 1)):
        raise TensorError(
            f"{source} has shape {list(shape)}, config.json gives {heads} heads, so [{heads}, 1] or [{heads}]; weights "
            f"and config belong to different checkpoints, or a size in config.json is wrong."
        )


__all__ = ["Group", "check_dtypes", "check_shapes", "head_class", "make_plan", "meta_model"]
