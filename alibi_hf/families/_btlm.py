"""What BTLM and Jais share: tensor rules and the reference."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from alibi_hf.checkpoints.rules import Copy, Rule, Split, Transposed
from alibi_hf.families._about import OLD_CODE, PACKED, About
from alibi_hf.families._btlm_config import btlm_config
from alibi_hf.families._btlm_plain import PlainBtlmForCausalLM
from alibi_hf.families._layout import (
    dropped_rules,
    has_tensor,
    head_rules,
    head_sizes,
    layer_modules,
    named,
    parameter_rules,
)
from alibi_hf.families._plain import plain_reference
from alibi_hf.families._reference import Reference
from alibi_hf.families._truth import true_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig

ABOUT_CEREBRAS = About(
    switches=(
        "alibi_slopes (stored in the checkpoint)",
        "alibi_scaling",
        "attention_scale",
        "embedding_scale",
        "logit_scale",
        "mlp_type",
        'alibi_rounding="jais"',
    ),
    exports=("gguf",),
    defects=(
        "slopes and bias are rounded to the model's dtype",
        "rows longer than n_positions fail",
        OLD_CODE,
        PACKED,
    ),
)
ROUNDINGS = ("exact", "jais")
REFERENCE = f"{PlainBtlmForCausalLM.__module__}.{PlainBtlmForCausalLM.__name__}"
PREFIX = "transformer."
SLOPES = "relative_pe.slopes"


def btlm_recognise(names: Sequence[str], raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether the config is of one of `names` and the tensor names, if there are any, are this layout's."""
    return named(raw, names) and (not tensor_names or has_tensor(tensor_names, "wte.weight", "attn.c_attn.weight"))


def btlm_rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a checkpoint and what becomes of it; all weights of layers are transposed (`Conv1D`)."""
    layer, ours = "h.{i}.", "model.layers.{i}."
    width = head_sizes(config)[0] * head_sizes(config)[2]
    projections = [f"{ours}self_attn.{name}_proj" for name in "qkv"]
    modules: list[tuple[str, Any, Any]] = [
        ("ln_f", "model.norm", Copy()),
        (f"{layer}ln_1", f"{ours}input_layernorm", Copy()),
        (f"{layer}ln_2", f"{ours}post_attention_layernorm", Copy()),
        (f"{layer}attn.c_attn", projections, Transposed(Split((width, width, width)))),
        (f"{layer}attn.c_proj", f"{ours}self_attn.o_proj", Transposed()),
        (f"{layer}mlp.c_fc", f"{ours}mlp.up_proj", Transposed()),
        (f"{layer}mlp.c_proj", f"{ours}mlp.down_proj", Transposed()),
    ]
    if config.mlp_type == "gated":
        modules.append((f"{layer}mlp.c_fc2", f"{ours}mlp.gate_proj", Transposed()))
    found = parameter_rules("wte", "model.embed_tokens", bias=False, prefix=PREFIX)
    found.append(Rule(SLOPES, ("alibi_slopes",), fate="config", prefix=PREFIX, required=False))
    for source, targets, operation in modules:
        found += parameter_rules(source, targets, bias=True, operation=operation, prefix=PREFIX)
    buffers = [f"{layer}attn.bias", f"{layer}attn.masked_bias"]
    found += dropped_rules(buffers, "a buffer that holds the causal mask, not a bias", PREFIX)
    return found + head_rules(config, "wte.weight")


def btlm_reference(family: str) -> Reference:
    """The plain module after upstream's formulas."""
    reason = f"Transformers has no class for {family}; the reference is a plain module after upstream's remote code"
    reference = plain_reference(
        PlainBtlmForCausalLM, lambda raw, dtype: _build(family, raw, dtype), _attention_modules, reason
    )
    return replace(reference, has_cache=True)


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    return layer_modules(model, "transformer.h", "attn")


def _build(family: str, raw: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    config = btlm_config(family, raw)
    heads, _, head_dim = head_sizes(config)
    scale = config.attention_scale
    spec = {
        "vocab": config.vocab_size,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "inner": config.intermediate_size,
        "gated": config.mlp_type == "gated",
        "act": ACT2FN[config.hidden_act],
        "norm_eps": config.norm_eps,
        "softmax_scale": scale if scale is not None else head_dim**-0.5,
        "embeddings_scale": 1.0 if config.embedding_scale is None else config.embedding_scale,
        "logit_scale": 1.0 if config.logit_scale is None else config.logit_scale,
        "alibi_scaling": config.alibi_scaling,
        "slopes": true_slopes(heads, device="cpu"),
        "tie": config.tie_word_embeddings,
    }
    with torch.device("meta"):
        return PlainBtlmForCausalLM(spec).to(dtype).eval()


__all__ = [
    "ABOUT_CEREBRAS",
    "PREFIX",
    "REFERENCE",
    "ROUNDINGS",
    "SLOPES",
    "btlm_recognise",
    "btlm_reference",
    "btlm_rules",
]
