"""Rules that several families share."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from alibi_hf.checkpoints.rules import Copy, Operation, Rule
from alibi_hf.model.configuration_alibi import AlibiConfig

PARTS = ("weight", "bias")


def parameter_rules(
    source: str, targets: str | Sequence[str], *, bias: bool, operation: Operation | None = None, prefix: str = ""
) -> list[Rule]:
    """The rules of one module's weight and, with `bias`, its bias; `source` and `targets` are module names."""
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    return [
        Rule(f"{source}.{part}", tuple(f"{name}.{part}" for name in names), operation or Copy(), prefix=prefix)
        for part in PARTS[: 1 + bias]
    ]


def head_rules(config: AlibiConfig, embedding: str) -> list[Rule]:
    """The language-model head, tied or not, and the heads that fine-tuned checkpoints of the family may hold."""
    if config.tie_word_embeddings:
        head = Rule(
            "lm_head.weight",
            ("model.embed_tokens.weight",),
            fate="tied",
            reason=f"equal to {embedding}, as tie_word_embeddings says",
            required=False,
        )
    else:
        head = Rule("lm_head.weight", ("lm_head.weight",), required=False)
    return [head, *(Rule(source, (target,), required=False) for source, target in HEAD_TARGETS.items())]


# Heads of fine-tuned checkpoints: upstream calls the token classifier `classifier`, this package's model `score`.
HEAD_TARGETS = {
    "score.weight": "score.weight",
    "classifier.weight": "score.weight",
    "classifier.bias": "score.bias",
    "qa_outputs.weight": "qa_outputs.weight",
    "qa_outputs.bias": "qa_outputs.bias",
}


def head_sizes(config: AlibiConfig) -> tuple[int, int, int]:
    """Query heads, key/value heads and the width of one head."""
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    assert kv_heads is not None and head_dim is not None  # the config fills them in
    return config.num_attention_heads, kv_heads, head_dim


def layer_modules(model: nn.Module, layers: str, attention: str) -> list[nn.Module]:
    """The attention module of every layer of an upstream model, `layers` and `attention` by name."""
    return [layer.get_submodule(attention) for layer in model.get_submodule(layers).children()]


def dropped_rules(sources: Iterable[str], reason: str, prefix: str = "") -> list[Rule]:
    """Tensors that files may hold and nothing reads."""
    return [Rule(name, fate="dropped", reason=reason, prefix=prefix, required=False) for name in sources]


def named(raw: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether the config's model_type or one of its architectures is in `names`."""
    architectures = raw.get("architectures") or []
    return raw.get("model_type") in names or any(name in names for name in architectures)


def has_tensor(tensor_names: Iterable[str], *endings: str) -> bool:
    """Whether every ending is the end of at least one tensor's name."""
    listed = list(tensor_names)
    return all(any(name.endswith(ending) for name in listed) for ending in endings)


__all__ = ["dropped_rules", "has_tensor", "head_rules", "head_sizes", "layer_modules", "named", "parameter_rules"]
