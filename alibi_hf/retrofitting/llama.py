"""Llama's layout: rotary positions are left out, everything else stays.

* RMSNorm, gated SiLU, grouped queries, `head_dim` of its own; biases where `attention_bias` and `mlp_bias` say so.
* YaRN and LongRoPE also multiply queries and keys by a factor; it is no position and stays, in `attention_scale`.

Source: `transformers.models.llama` and `transformers.modeling_rope_utils`.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from alibi_hf.checkpoints.rules import Rule
from alibi_hf.errors import ConfigFieldError
from alibi_hf.families._fields import (
    BOOL,
    INT,
    NUMBER,
    TEXT,
    TOKEN_IDS,
    Field,
    build_config,
    need_multiple,
    read_fields,
)
from alibi_hf.families._layout import dropped_rules, head_rules, layer_modules, parameter_rules
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.retrofitting.layout import DROPPED, recognised, without_positions

NAMES = ("llama",)
ROUNDINGS = ("exact",)
REFERENCE = "transformers.LlamaForCausalLM"
POSITIONS = "rotary"
PREFIX = "model."

FIELDS = (
    Field(("vocab_size",), INT, default=32000, to="vocab_size"),
    Field(("hidden_size",), INT, default=4096, to="hidden_size"),
    Field(("intermediate_size",), INT, default=11008, to="intermediate_size"),
    Field(("num_hidden_layers",), INT, default=32, to="num_hidden_layers"),
    Field(("num_attention_heads",), INT, default=32, to="num_attention_heads"),
    Field(("num_key_value_heads",), INT, default=None, to="num_key_value_heads"),
    Field(("head_dim",), INT, default=None, to="head_dim"),
    Field(("hidden_act",), TEXT, default="silu", to="hidden_act"),
    Field(("max_position_embeddings",), INT, default=2048, to="max_position_embeddings"),
    Field(("rms_norm_eps",), NUMBER, default=1e-6, to="norm_eps"),
    Field(("attention_bias",), BOOL, default=False, to="attention_bias"),
    Field(("mlp_bias",), BOOL, default=False, to="mlp_bias"),
    Field(("attention_dropout",), NUMBER, default=0.0, to="attention_dropout"),
    Field(("tie_word_embeddings",), BOOL, default=False, to="tie_word_embeddings"),
    Field(("pad_token_id",), TOKEN_IDS, default=None, to="pad_token_id"),
    Field(("bos_token_id",), TOKEN_IDS, default=1, to="bos_token_id"),
    Field(("eos_token_id",), TOKEN_IDS, default=2, to="eos_token_id"),
)
TENSORS = ("self_attn.q_proj.weight", "mlp.gate_proj.weight")
ROTARY = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "rope_interleaved",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)
INERT = {
    **dict.fromkeys(ROTARY, DROPPED),
    **dict.fromkeys(["is_llama_config", "transformers.js_config"], "describes the file, not the computation"),
    "max_sequence_length": "a setting of the first conversions that Transformers does not read",
    "pretraining_tp": "splits matrix products, which changes nothing but rounding",
}


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are Llama's."""
    return recognised(NAMES, raw, tensor_names, *TENSORS)


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a Llama config.json with ALiBi in it; `ConfigFieldError` for what cannot be expressed."""
    values = read_fields(raw, FIELDS, INERT, "llama")
    return llama_config("llama", raw, FIELDS, values, attention_out_bias=values["attention_bias"])


def llama_config(
    name: str, raw: dict[str, Any], fields: Sequence[Field], values: dict[str, Any], **more: Any
) -> AlibiConfig:
    """The `AlibiConfig` of Llama's decoder from the `values` of `fields`, with `more` on top."""
    if values["head_dim"] is None:
        need_multiple(values["hidden_size"], values["num_attention_heads"], name)
    found = build_config(
        name, raw, fields, values, norm_type="rms_norm", mlp_type="gated", retrofitted_from=name, **more
    )
    factor = rotary_factor(raw)
    if factor != 1:
        assert found.head_dim is not None  # the config fills it in
        found.attention_scale = factor**2 * found.head_dim**-0.5
    return found


def rotary_factor(raw: dict[str, Any]) -> float:
    """The factor by which the rotary positions of `raw` multiply queries and keys, in float32 as there; 1 for most.

    Raises:
        ConfigFieldError: where Transformers cannot make them, so that the factor is not known.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        factor = LlamaRotaryEmbedding(source_config(raw)).attention_scaling
        return torch.tensor(factor, dtype=torch.float32).item()
    except Exception as error:  # whatever Transformers raises, its class does not load such a config either
        found = {field: raw[field] for field in ROTARY if field in raw}
        said = " ".join(str(error).split())
        raise ConfigFieldError(
            f"{raw['model_type']}: Transformers cannot make the rotary positions of {found or 'config.json'} "
            f"({type(error).__name__}: {said}). Correct config.json; a factor on queries and keys is read from them."
        ) from error


def source_config(raw: dict[str, Any]) -> Any:
    """Transformers' own config of `raw`, for eager attention."""
    from transformers import CONFIG_MAPPING

    own = copy.deepcopy(raw)  # Transformers completes the rotary fields in place
    return CONFIG_MAPPING[raw["model_type"]].from_dict(own, attn_implementation="eager")


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a Llama or Mistral checkpoint and what becomes of it."""
    layer = "layers.{i}."
    modules = {"embed_tokens": False, "norm": False}
    modules |= {f"{layer}{name}_layernorm": False for name in ("input", "post_attention")}
    modules |= {f"{layer}self_attn.{name}_proj": config.attention_bias for name in "qkv"}
    modules[f"{layer}self_attn.o_proj"] = config.attention_out_bias
    modules |= {f"{layer}mlp.{name}_proj": config.mlp_bias for name in ("gate", "up", "down")}
    found = []
    for module, bias in modules.items():
        found += parameter_rules(module, f"model.{module}", bias=bias, prefix=PREFIX)
    found += dropped_rules([f"{layer}self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"], DROPPED, PREFIX)
    return found + head_rules(config, "embed_tokens.weight")


def notes(raw: dict[str, Any]) -> list[str]:
    """What became of the positions, one sentence each."""
    given = ", ".join(f"{name}={raw[name]!r}" for name in ROTARY if raw.get(name) is not None)
    factor = rotary_factor(raw)
    kept = "nothing of them is kept"
    if factor != 1:
        kept = f"a factor of {factor:.4g} on queries and keys, which is no position, is kept in attention_scale"
    return [f"the rotary positions ({given or 'defaults'}) are removed; {kept}"]


def reference(config: AlibiConfig) -> Reference:
    """`LlamaForCausalLM`, whose queries and keys are turned by no angle where every position is zero."""
    return without_positions(REFERENCE, build, lambda model: layer_modules(model, "model.layers", "self_attn"))


def build(raw: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Transformers' model of `raw` on the meta device, its rotary tables on the CPU."""
    from transformers import AutoModelForCausalLM

    source = source_config(raw)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source, trust_remote_code=False).to(dtype).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(source)
    return model
