"""Refact-1.6B (fim, base): many query heads with one key/value head, SwiGLU, LayerNorms without bias.

* `attn.kv` is `[k; v]` and `mlp.gate_up_proj` is `[gate; up]`; before the release they were `attn.k`, `attn.v`,
  `mlp.linear_1` (gate) and `mlp.linear_3` (up), which are read as well.
* The MLP's width follows from `n_inner` (four times the width if not given): two thirds of it, rounded up to 256.
* The last norm is `ln_f` at the top level, and `lm_head` is a tensor of its own whatever `tie_word_embeddings` says.

Source: `configuration_gpt_refact.py` and `modeling_gpt_refact.py` of smallcloudai/Refact-1_6B-fim.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from alibi_hf.checkpoints.rules import Rule, Split
from alibi_hf.families._about import OLD_CODE, PACKED, About
from alibi_hf.families._fields import BOOL, INT, NUMBER, TOKEN_IDS, Field, build_config, need_multiple, read_fields
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
from alibi_hf.families._refact_plain import PlainRefactForCausalLM
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig

NAMES = ("refact", "gpt_refact", "GPTRefactForCausalLM", "GPTRefactModel")
ROUNDINGS = ("exact",)
REFERENCE = "alibi_hf.families._refact_plain.PlainRefactForCausalLM"
ABOUT = About(
    checkpoints=("Refact-1.6B-fim", "Refact-1.6B-base"),
    switches=("num_key_value_heads", "mlp_type", "norm_bias", "tie_word_embeddings"),
    outside=("llama.cpp",),
    exports=("llm-foundry", "gguf"),
    defects=(
        "rows longer than n_positions fail",
        "llama.cpp's refact takes LayerNorm for RMSNorm",
        OLD_CODE,
        PACKED,
    ),
)
PREFIX = "transformer."
MULTIPLE = 256  # the MLP's width is rounded up to one

FIELDS = (
    Field(("vocab_size",), INT, default=49216, to="vocab_size"),
    Field(("n_embd", "hidden_size"), INT, to="hidden_size"),
    Field(("n_layer", "num_hidden_layers"), INT, to="num_hidden_layers"),
    Field(("n_head", "num_attention_heads"), INT, to="num_attention_heads"),
    Field(("n_inner",), INT, default=None),
    Field(("n_positions", "max_position_embeddings"), INT, default=4096, to="max_position_embeddings"),
    Field(("layer_norm_epsilon",), NUMBER, default=1e-5, to="norm_eps"),
    Field(("multi_query",), BOOL, default=True, accept=(True,), refusal="Upstream's code has one key/value head."),
    Field(("pad_token_id",), TOKEN_IDS, default=None, to="pad_token_id"),
    Field(("bos_token_id",), TOKEN_IDS, default=None, to="bos_token_id"),
    Field(("eos_token_id",), TOKEN_IDS, default=0, to="eos_token_id"),
)
INERT = {
    "tie_word_embeddings": "upstream's head is a tensor of its own whatever this says",
    **dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], "upstream's code has no dropout"),
    **dict.fromkeys(
        ["attention_softmax_in_fp32", "attention_bias_in_fp32"],
        "the dtype of an intermediate result; here both are in float32 always",
    ),
    **dict.fromkeys(
        ["scale_attention_softmax_in_fp32", "activation_function", "scale_attn_weights"],
        "left over from GPTBigCode; the released code does not read it",
    ),
}


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are Refact's."""
    return named(raw, NAMES) and (not tensor_names or has_tensor(tensor_names, "wte.weight", "attn.q.weight"))


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a Refact config.json; `ConfigFieldError` for what cannot be expressed."""
    values = read_fields(raw, FIELDS, INERT, "refact")
    width, inner = values["n_embd"], values["n_inner"]
    need_multiple(width, values["n_head"], "refact")
    return build_config(
        "refact",
        raw,
        FIELDS,
        values,
        num_key_value_heads=1,
        intermediate_size=mlp_width(4 * width if inner is None else inner),
        norm_bias=False,
        mlp_type="gated",
        hidden_act="silu",
        tie_word_embeddings=False,
    )


def mlp_width(inner: int) -> int:
    """Two thirds of `inner`, rounded up to a multiple of 256: 5632 of 8192."""
    return -(-int(2 * inner / 3) // MULTIPLE) * MULTIPLE


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a Refact checkpoint, released or older, and what becomes of it."""
    layer, ours = "h.{i}.", "model.layers.{i}."
    modules = {
        "wte": "model.embed_tokens",
        f"{layer}ln_1": f"{ours}input_layernorm",
        f"{layer}ln_2": f"{ours}post_attention_layernorm",
        f"{layer}attn.q": f"{ours}self_attn.q_proj",
        f"{layer}attn.c_proj": f"{ours}self_attn.o_proj",
        f"{layer}mlp.c_proj": f"{ours}mlp.down_proj",
    }
    found = [*parameter_rules("ln_f", "model.norm", bias=False)]
    for source, target in modules.items():
        found += parameter_rules(source, target, bias=False, prefix=PREFIX)
    _, _, head_dim = head_sizes(config)
    inner = config.intermediate_size or 0
    found += _pair(f"{layer}attn.kv", ("attn.k", "attn.v"), ("self_attn.k_proj", "self_attn.v_proj"), head_dim)
    found += _pair(
        f"{layer}mlp.gate_up_proj", ("mlp.linear_1", "mlp.linear_3"), ("mlp.gate_proj", "mlp.up_proj"), inner
    )
    buffers = ["bias", *(f"{layer}attn.{name}" for name in ("bias", "masked_bias"))]
    found += dropped_rules(buffers, "a causal mask, which is no weight", PREFIX)
    return found + head_rules(config, "wte.weight")


def _pair(fused: str, separate: tuple[str, str], targets: tuple[str, str], rows: int) -> list[Rule]:
    """The rules of two projections in one tensor, and of the same two apart; a file has the one or the other."""
    ours = [f"model.layers.{{i}}.{target}" for target in targets]
    found = parameter_rules(fused, ours, bias=False, operation=Split((rows, rows)), prefix=PREFIX)
    for source, target in zip(separate, ours, strict=True):
        found += parameter_rules(f"h.{{i}}.{source}", target, bias=False, prefix=PREFIX)
    return [replace(rule, required=False) for rule in found]


def reference(config: AlibiConfig) -> Reference:
    """The plain module: upstream's own class is remote code that no longer runs on Transformers 5."""
    return plain_reference(
        PlainRefactForCausalLM,
        _build,
        lambda model: layer_modules(model, "transformer.h", "attn"),
        "Transformers has no class for Refact; the reference is a plain module after upstream's modeling_gpt_refact.py",
    )


def _build(raw: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return PlainRefactForCausalLM(config(raw)).to(dtype).eval()
