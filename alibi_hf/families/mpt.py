"""MPT as llm-foundry and as Transformers write it: MPT-7B/30B and their chat and long variants, PhoGPT, Krutrim.

* One model_type, two dialects whose defaults differ: llm-foundry's remote code (`MPTForCausalLM`; no ALiBi and biases
  unless told otherwise) and Transformers' class (`MptForCausalLM`; ALiBi and no biases).
* Fused rows are contiguous `[q; k; v]`, with fewer key/value rows for grouped or single key/value heads; queries, keys
  and values are clamped before the query/key norm.
* Transformers' class ignores many of these fields; a checkpoint that uses one is compared with a plain module written
  after llm-foundry's formulas instead.

Sources: `transformers.models.mpt`; llm-foundry, `llmfoundry/models/mpt` and `llmfoundry/models/layers`.
"""

from collections.abc import Sequence
from typing import Any

from alibi_hf.checkpoints.rules import Rule, Split
from alibi_hf.families._about import About
from alibi_hf.families._layout import has_tensor, head_rules, head_sizes, named, parameter_rules
from alibi_hf.families._mpt_config import FIELDS, mpt_config
from alibi_hf.families._mpt_reference import mpt_reference
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig

NAMES = (
    "mpt",
    "MPTForCausalLM",
    "MptForCausalLM",
    "MptModel",
    "MptForSequenceClassification",
    "MptForTokenClassification",
    "MptForQuestionAnswering",
)
ROUNDINGS = ("exact",)
REFERENCE = "transformers.MptForCausalLM"
ABOUT = About(
    checkpoints=("MPT-7B", "MPT-30B", "MPT-7B-8k", "MPT-7B-StoryWriter", "PhoGPT", "Krutrim-1", "replit-code-v1_5-3b"),
    switches=(
        "alibi_bias_max",
        "clip_qkv",
        "qk_norm",
        "num_key_value_heads",
        "mlp_type",
        "norm_type",
        "biases",
        "attention_scale",
        "logit_scale",
        "soft caps",
    ),
    outside=("CTranslate2", "llama.cpp"),
    exports=("mpt", "llm-foundry", "gguf"),
    defects=(
        "alibi, alibi_bias_max, learned_pos_emb, no_bias, expansion_ratio, logit_scale, qk_ln, attn_type are ignored",
        "rows longer than max_seq_len fail",
        "an integer clip_qkv stops the load",
        "boolean 4-D masks are taken the wrong way round",
        "masked tokens inside a row count as distance",
        "eager attention only",
        "packed documents see each other",
    ),
    proof="bias, tensors, logits, padding, decoding, generation, loss and gradients against float64; what "
    "MptForCausalLM ignores is compared with a plain module after llm-foundry's formulas, whole rows only",
)
PREFIX = "transformer."

__all__ = ["ABOUT", "FIELDS", "NAMES", "REFERENCE", "ROUNDINGS", "config", "recognise", "reference", "rules"]


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are MPT's."""
    if not named(raw, NAMES):
        return False
    return not tensor_names or has_tensor(tensor_names, "wte.weight", "norm_f.weight")


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of an MPT config.json, whichever its dialect; `ConfigFieldError` for the inexpressible."""
    return mpt_config(raw)


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of an MPT checkpoint and what becomes of it."""
    layer, ours = "blocks.{i}.", "model.layers.{i}."
    projections = [f"{ours}self_attn.{name}_proj" for name in "qkv"]
    heads, kv_heads, head_dim = head_sizes(config)
    rows = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    norm = config.norm_type == "layer_norm" and config.norm_bias
    modules = [
        ("wte", "model.embed_tokens", False),
        ("norm_f", "model.norm", norm),
        (f"{layer}norm_1", f"{ours}input_layernorm", norm),
        (f"{layer}norm_2", f"{ours}post_attention_layernorm", norm),
        (f"{layer}attn.out_proj", f"{ours}self_attn.o_proj", config.attention_out_bias),
        (f"{layer}ffn.up_proj", f"{ours}mlp.up_proj", config.mlp_bias),
        (f"{layer}ffn.down_proj", f"{ours}mlp.down_proj", config.mlp_bias),
    ]
    if config.mlp_type == "gated":
        modules.append((f"{layer}ffn.gate_proj", f"{ours}mlp.gate_proj", config.mlp_bias))
    if config.qk_norm is not None:
        modules += [(f"{layer}attn.{part}_ln", f"{ours}self_attn.{part}_norm", norm) for part in "qk"]
    found = [rule for names in modules for rule in parameter_rules(*names[:2], bias=names[2], prefix=PREFIX)]
    found += parameter_rules(
        f"{layer}attn.Wqkv", projections, bias=config.attention_bias, operation=Split(rows), prefix=PREFIX
    )
    return found + head_rules(config, "wte.weight")


def reference(config: AlibiConfig) -> Reference:
    """`MptForCausalLM` where it computes this config, else the plain llm-foundry module."""
    return mpt_reference(config)
