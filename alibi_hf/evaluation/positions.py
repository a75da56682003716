"""How a model tells positions apart, and how long it was trained, as far as its config and its modules say."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from alibi_hf.model.configuration_alibi import AlibiConfig


def find_position_table(model: Any) -> tuple[str, int] | None:
    """Return name and rows of a model's table of learned positions, or None where none is seen.

    It is an embedding, besides that of the tokens, with a name that says so.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and any(word in name.rpartition(".")[2] for word in ("wpe", "position")):
            return name, module.num_embeddings - getattr(module, "offset", 0)  # OPT leaves its first rows unused
    return None


def describe_positions(config: PreTrainedConfig, table: tuple[str, int] | None) -> str:
    """Return in words how a model tells positions apart, as far as its config and its modules say."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = next(iter(rope.values())) if rope and all(isinstance(value, dict) for value in rope.values()) else rope
    attention = getattr(config, "attn_config", None)
    alibi = config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False)
    found = ["ALiBi"] if alibi or getattr(attention, "alibi", False) else []
    if rope.get("rope_theta") and not (alibi and config.model_type != AlibiConfig.model_type):
        kind = rope.get("rope_type", "default")
        scaled = "" if kind == "default" else f", {kind} x {rope.get('factor', 1):g}"
        found.append(f"RoPE (theta {rope['rope_theta']:g}{scaled})")
    if getattr(config, "sinusoidal_positions", False):
        found.append("sinusoidal")
    if table is not None:
        found.append(f"learned ({table[1]} rows)")
    if config.model_type == AlibiConfig.model_type and not found:
        found.append("none")
    return " + ".join(found) or "not told by its config"


def trained_length(config: PreTrainedConfig) -> int | None:
    """Return the length that a config names as that of training, in tokens."""
    rope = getattr(config, "rope_parameters", None) or {}
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = [rope.get("original_max_position_embeddings"), *(getattr(config, name, None) for name in names)]
    return next((int(value) for value in found if isinstance(value, (int, float)) and value > 0), None)


__all__ = ["describe_positions", "find_position_table", "trained_length"]
