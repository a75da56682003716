"""Falcon-RW (1B and 7B): the Falcons with `alibi: true`; the others use RoPE and are not this package's.

* BLOOM's layout without the norm after the embedding; one fused row block, interleaved head by head, or
  `[queries; one key; one value]` with `multi_query`.
* Upstream divides the bias, not only the scores, by sqrt(head_dim): that factor is folded into `alibi_slopes`.
* Transformers' class rounds slopes and bias to bfloat16 whatever the model's dtype, and adds the bias twice in eager
  attention: sdpa is the reference. `alibi_rounding="falcon"` reproduces the rounding.

Source: `transformers.models.falcon`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from alibi_hf.checkpoints.rules import Interleaved, Operation, Rule, Split
from alibi_hf.errors import ConfigFieldError
from alibi_hf.families._about import PACKED, About
from alibi_hf.families._fields import (
    BOOL,
    INT,
    NUMBER,
    TEXT,
    TIE_FIELD,
    TOKEN_IDS,
    Field,
    build_config,
    need_multiple,
    read_fields,
)
from alibi_hf.families._layout import (
    dropped_rules,
    has_tensor,
    head_rules,
    head_sizes,
    layer_modules,
    named,
    parameter_rules,
)
from alibi_hf.families._reference import Reference
from alibi_hf.families._truth import KeepFloat64, float64_truth, mask_bias, true_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig

NAMES = (
    "falcon",
    "RefinedWebModel",
    "RefinedWeb",
    "RWForCausalLM",
    "FalconForCausalLM",
    "FalconModel",
    "FalconForSequenceClassification",
    "FalconForTokenClassification",
    "FalconForQuestionAnswering",
)
ROUNDINGS = ("exact", "falcon")
REFERENCE = "transformers.FalconForCausalLM"
ABOUT = About(
    checkpoints=("Falcon-RW-1B", "Falcon-RW-7B"),
    switches=("alibi_slopes (divided by the square root of head_dim)", 'alibi_rounding="falcon"'),
    outside=("CTranslate2",),
    exports=("falcon",),
    defects=(
        "eager attention adds the bias twice",
        "slopes and bias are rounded to bfloat16 in float32 models too",
        "n_head and n_layer of older files are ignored",
        "a static cache fails",
        PACKED,
    ),
    proof="twice, with upstream's own bfloat16 bias and with the exact one: bias, tensors, logits, padding, decoding, "
    "generation, loss and gradients against float64",
)
PREFIX = "transformer."
_PARALLEL = "Parallel attention and MLP are not supported; load it with FalconForCausalLM of Transformers."

FIELDS = (
    Field(("vocab_size",), INT, default=65024, to="vocab_size"),
    Field(("hidden_size", "n_embed"), INT, default=4544, to="hidden_size"),
    Field(("num_hidden_layers", "n_layer"), INT, default=32, to="num_hidden_layers"),
    Field(("num_attention_heads", "n_head"), INT, default=71, to="num_attention_heads"),
    Field(("num_kv_heads", "n_head_kv"), INT, default=None),
    Field(("ffn_hidden_size",), INT, default=None, to="intermediate_size"),
    Field(("layer_norm_epsilon",), NUMBER, default=1e-5, to="norm_eps"),
    Field(("hidden_dropout",), NUMBER, default=0.0, to="hidden_dropout"),
    Field(("attention_dropout",), NUMBER, default=0.0, to="attention_dropout"),
    Field(("max_position_embeddings",), INT, default=2048, to="max_position_embeddings"),
    Field(("activation",), TEXT, default="gelu", to="hidden_act"),
    Field(("multi_query",), BOOL, default=True),
    Field(("bias",), BOOL, default=False),
    Field(("new_decoder_architecture",), BOOL, default=False, accept=(False,), refusal=_PARALLEL),
    Field(("parallel_attn",), BOOL, default=True, accept=(False,), refusal=_PARALLEL),
    Field(("apply_residual_connection_post_layernorm",), BOOL, default=False, accept=(False,)),
    Field(("pad_token_id",), TOKEN_IDS, default=None, to="pad_token_id"),
    Field(("bos_token_id",), TOKEN_IDS, default=11, to="bos_token_id"),
    Field(("eos_token_id",), TOKEN_IDS, default=11, to="eos_token_id"),
    Field(("alibi",), BOOL, default=False),
    TIE_FIELD,
)
INERT = {
    **dict.fromkeys(["rope_parameters", "rope_theta", "rope_scaling"], "RoPE is off where alibi is on"),
    "num_ln_in_parallel_attn": "read with parallel attention only",
}


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are Falcon's."""
    if not named(raw, NAMES):
        return False
    return not tensor_names or has_tensor(
        tensor_names, "word_embeddings.weight", "self_attention.query_key_value.weight"
    )


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a Falcon-RW config.json; `ConfigFieldError` for what cannot be expressed."""
    if not raw.get("alibi"):
        raise ConfigFieldError(
            f"falcon: alibi={raw.get('alibi')!r} is a Falcon with rotary positions (RoPE), not this package's. "
            f"Load it with FalconForCausalLM or AutoModelForCausalLM of Transformers."
        )
    values = read_fields(raw, FIELDS, INERT, "falcon")
    heads = values["num_attention_heads"]
    head_dim = need_multiple(values["hidden_size"], heads, "falcon")
    if values["attention_dropout"] != values["hidden_dropout"]:
        raise ConfigFieldError(
            f"falcon: attention_dropout={values['attention_dropout']} and hidden_dropout={values['hidden_dropout']} "
            f"cannot be expressed: upstream applies the first to the residual after attention too. Set both to 0.0 for "
            f"inference, or to one value."
        )
    implied = 1 if values["multi_query"] else heads
    if values["num_kv_heads"] not in (None, implied, heads):  # upstream fills in `heads` and then reads multi_query
        raise ConfigFieldError(
            f"falcon: num_kv_heads={values['num_kv_heads']} contradicts multi_query={values['multi_query']}, which "
            f"has {implied} key/value heads."
        )
    return build_config(
        "falcon",
        raw,
        FIELDS,
        values,
        num_key_value_heads=implied,
        attention_bias=values["bias"],
        attention_out_bias=values["bias"],
        mlp_bias=values["bias"],
        alibi_slopes=(true_slopes(heads) / math.sqrt(head_dim)).tolist(),
    )


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a Falcon-RW checkpoint and what becomes of it."""
    layer, ours = "h.{i}.", "model.layers.{i}."
    modules = [
        ("word_embeddings", "model.embed_tokens", False),
        ("ln_f", "model.norm", True),
        (f"{layer}input_layernorm", f"{ours}input_layernorm", True),
        (f"{layer}post_attention_layernorm", f"{ours}post_attention_layernorm", True),
        (f"{layer}self_attention.dense", f"{ours}self_attn.o_proj", config.attention_out_bias),
        (f"{layer}mlp.dense_h_to_4h", f"{ours}mlp.up_proj", config.mlp_bias),
        (f"{layer}mlp.dense_4h_to_h", f"{ours}mlp.down_proj", config.mlp_bias),
    ]
    found = [rule for names in modules for rule in parameter_rules(*names[:2], bias=names[2], prefix=PREFIX)]
    found += parameter_rules(
        f"{layer}self_attention.query_key_value",
        [f"{ours}self_attn.{name}_proj" for name in "qkv"],
        bias=config.attention_bias,
        operation=_fused(config),
        prefix=PREFIX,
    )
    buffers = [f"{layer}self_attention.{name}.inv_freq" for name in ("maybe_rotary", "rotary", "rotary_emb")]
    found += dropped_rules([*buffers, "rotary_emb.inv_freq"], "a rotary buffer, unused where alibi is on", PREFIX)
    return found + head_rules(config, "word_embeddings.weight")


def _fused(config: AlibiConfig) -> Operation:
    heads, kv_heads, head_dim = head_sizes(config)
    return Interleaved(heads) if kv_heads == heads else Split((heads * head_dim, head_dim, head_dim))


def reference(config: AlibiConfig) -> Reference:
    """`FalconForCausalLM` through sdpa; the gate's truth is its own bfloat16 bias in a float64 model."""
    from transformers.models.falcon import modeling_falcon

    patches = {"build_alibi_tensor": mask_bias}
    return Reference(
        class_name=REFERENCE,
        attn_implementation="sdpa",
        build=_build,
        truth=KeepFloat64,
        exact_truth=lambda: float64_truth(modeling_falcon, patches),
        as_is_truth_note="slopes and their product with the position are rounded to bfloat16 whatever the dtype",
        attention_modules=lambda model: layer_modules(model, "transformer.h", "self_attention"),
        bias_argument="attention_mask",
        bias_layout="mask",
    )


def _build(raw: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM
    from transformers.models.falcon.modeling_falcon import FalconRotaryEmbedding

    values = read_fields(raw, FIELDS, INERT, "falcon")
    values["num_kv_heads"] = values["num_kv_heads"] or values["num_attention_heads"]
    values.pop("apply_residual_connection_post_layernorm")
    upstream = FalconConfig(**values, attn_implementation="sdpa")
    with torch.device("meta"):
        model = FalconForCausalLM(upstream).to(dtype).eval()
    model.transformer.rotary_emb = FalconRotaryEmbedding(upstream)  # its buffers are in no file, and it runs unused
    return model
