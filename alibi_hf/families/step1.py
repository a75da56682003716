"""Step1, the language models of Step-Audio (TTS-3B, EditX, Chat-130B) and of StepLaw.

* Llama's layer and names without rotary positions; key/value heads are `num_attention_groups`.
* The bias is minus slope times the square root of the distance, so only true distances will do.
* Upstream's class ignores `attention_mask`: padding changes its answers. Ours hides padding, as everywhere.
* The class names no output embeddings, so Transformers does not tie the head unless config.json says so.

Source: `configuration_step1.py` and `modeling_step1.py` of stepfun-ai/Step-Audio-TTS-3B.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from alibi_hf.checkpoints.rules import Rule
from alibi_hf.families._about import OLD_CODE, PACKED, About
from alibi_hf.families._fields import BOOL, INT, NUMBER, TOKEN_IDS, Field, build_config, need_multiple, read_fields
from alibi_hf.families._layout import has_tensor, head_rules, layer_modules, named, parameter_rules
from alibi_hf.families._plain import plain_reference
from alibi_hf.families._reference import Reference
from alibi_hf.families._step1_plain import PlainStep1ForCausalLM
from alibi_hf.model.configuration_alibi import AlibiConfig

NAMES = ("step1", "Step1ForCausalLM", "Step1Model", "Step1MoEForCausalLM")
ROUNDINGS = ("exact",)
REFERENCE = "alibi_hf.families._step1_plain.PlainStep1ForCausalLM"
ABOUT = About(
    checkpoints=("Step-Audio-TTS-3B", "Step-Audio-EditX", "Step-Audio-Chat-130B"),
    switches=("alibi_distance (square root)", "num_key_value_heads", "norm_type", "mlp_type"),
    outside=(),
    exports=(),
    defects=(
        "attention_mask is ignored: padding changes the answers",
        "a bias of heads x queries x keys is built in every layer",
        OLD_CODE,
        PACKED,
    ),
)
PREFIX = "model."
_NO_BIASES = "Upstream's class has no biases."

FIELDS = (
    Field(("vocab_size",), INT, default=65536, to="vocab_size"),
    Field(("hidden_size",), INT, default=5120, to="hidden_size"),
    Field(("intermediate_size",), INT, default=13312, to="intermediate_size"),
    Field(("num_hidden_layers",), INT, default=48, to="num_hidden_layers"),
    Field(("num_attention_heads",), INT, default=40, to="num_attention_heads"),
    Field(("num_attention_groups",), INT, default=8, to="num_key_value_heads"),
    Field(("max_seq_len",), INT, default=4096, to="max_position_embeddings"),
    Field(("rms_norm_eps",), NUMBER, default=1e-5, to="norm_eps"),
    Field(("attention_bias",), BOOL, default=False, accept=(False,), refusal=_NO_BIASES),
    Field(("mlp_bias",), BOOL, default=False, accept=(False,), refusal=_NO_BIASES),
    Field(("tie_word_embeddings",), BOOL, default=False, to="tie_word_embeddings"),
    Field(("pad_token_id",), TOKEN_IDS, default=0, to="pad_token_id"),
    Field(("bos_token_id",), TOKEN_IDS, default=1, to="bos_token_id"),
    Field(("eos_token_id",), TOKEN_IDS, default=3, to="eos_token_id"),
)
INERT = {
    "max_position_embeddings": "a copy of max_seq_len for servers; upstream's class does not read it",
    **dict.fromkeys(
        ["use_moe", "moe_num_experts", "moe_top_k", "moe_intermediate_size", "share_expert_dim"],
        "StepLaw's dense checkpoints carry such fields; tensors of experts stop the load",
    ),
}


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are Step1's."""
    return named(raw, NAMES) and (not tensor_names or has_tensor(tensor_names, "self_attn.q_proj.weight"))


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a Step1 config.json; `ConfigFieldError` for what cannot be expressed."""
    values = read_fields(raw, FIELDS, INERT, "step1")
    need_multiple(values["hidden_size"], values["num_attention_heads"], "step1")
    need_multiple(values["num_attention_heads"], values["num_attention_groups"], "step1 num_attention_groups")
    return build_config(
        "step1",
        raw,
        FIELDS,
        values,
        norm_type="rms_norm",
        mlp_type="gated",
        hidden_act="silu",
        alibi_distance="sqrt",
    )


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a Step1 checkpoint and what becomes of it."""
    parts = ["input_layernorm", "post_attention_layernorm"]
    parts += [f"self_attn.{name}_proj" for name in "qkvo"]
    parts += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    found = []
    for module in ["embed_tokens", "norm", *(f"layers.{{i}}.{part}" for part in parts)]:
        found += parameter_rules(module, f"model.{module}", bias=False, prefix=PREFIX)
    return found + head_rules(config, "embed_tokens.weight")


def reference(config: AlibiConfig) -> Reference:
    """The plain module: upstream's own class is remote code that no longer runs on Transformers 5."""
    return plain_reference(
        PlainStep1ForCausalLM,
        _build,
        lambda model: layer_modules(model, "model.layers", "self_attn"),
        "Transformers has no class for Step1; the reference is a plain module after upstream's modeling_step1.py, but "
        "hides padding, which upstream does not",
        bias_layout="mask",
    )


def _build(raw: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return PlainStep1ForCausalLM(config(raw)).to(dtype).eval()
