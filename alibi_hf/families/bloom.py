"""BLOOM and everything with its layout: BLOOMZ, FinGPT, Poro, NorBLOOM, BLOOMChat, TigerBot-180B, XuanYuan-176B.

* A norm after the embedding, biases everywhere, tied embeddings, tanh-GELU, MLP of four times the width.
* Fused query/key/value rows are interleaved head by head; files come with and without `transformer.`.
* Transformers' class multiplies slopes in float32 and rounds the bias to the model's dtype; ours is exact by default.

Source: `transformers.models.bloom`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from alibi_hf.checkpoints.rules import Interleaved, Rule
from alibi_hf.errors import ConfigFieldError
from alibi_hf.families._about import PACKED, About
from alibi_hf.families._fields import (
    BOOL,
    INT,
    NUMBER,
    TIE_FIELD,
    TOKEN_IDS,
    Field,
    build_config,
    need_multiple,
    read_fields,
)
from alibi_hf.families._layout import has_tensor, head_rules, layer_modules, named, parameter_rules
from alibi_hf.families._reference import Reference
from alibi_hf.families._truth import float64_truth, mask_bias, true_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig

NAMES = (
    "bloom",
    "BloomForCausalLM",
    "BloomModel",
    "BloomForSequenceClassification",
    "BloomForTokenClassification",
    "BloomForQuestionAnswering",
)
ROUNDINGS = ("exact", "bloom")
REFERENCE = "transformers.BloomForCausalLM"
ABOUT = About(
    checkpoints=(
        "BLOOM",
        "BLOOMZ",
        "FinGPT",
        "Poro-34B",
        "NorBLOOM",
        "BLOOMChat-176B",
        "TigerBot-180B",
        "XuanYuan-176B",
    ),
    switches=("embedding_norm", "residual_from_norm", 'alibi_rounding="bloom"'),
    outside=("CTranslate2", "llama.cpp"),
    exports=("bloom", "gguf"),
    defects=(
        "the bias is rounded to the model's dtype: at 8192 tokens in bfloat16 the last 32 keys of a head have 2 values",
        "eager attention only",
        PACKED,
        "4-D masks are refused",
        "left-padded rows are NaN in float64",
    ),
)
PREFIX = "transformer."

FIELDS = (
    Field(("vocab_size",), INT, default=250880, to="vocab_size"),
    Field(("hidden_size", "n_embed"), INT, default=64, to="hidden_size"),
    Field(("n_layer", "num_hidden_layers"), INT, default=2, to="num_hidden_layers"),
    Field(("n_head", "num_attention_heads"), INT, default=8, to="num_attention_heads"),
    Field(("layer_norm_epsilon",), NUMBER, default=1e-5, to="norm_eps"),
    Field(("apply_residual_connection_post_layernorm",), BOOL, default=False, to="residual_from_norm"),
    Field(("hidden_dropout",), NUMBER, default=0.0, to="hidden_dropout"),
    Field(("attention_dropout",), NUMBER, default=0.0, to="attention_dropout"),
    Field(("seq_length",), INT, default=2048, to="max_position_embeddings"),
    Field(("n_inner",), INT, default=None),
    Field(("pretraining_tp",), INT, default=1),
    Field(("slow_but_exact",), BOOL, default=False),
    Field(("pad_token_id",), TOKEN_IDS, default=None, to="pad_token_id"),
    Field(("bos_token_id",), TOKEN_IDS, default=1, to="bos_token_id"),
    Field(("eos_token_id",), TOKEN_IDS, default=2, to="eos_token_id"),
    TIE_FIELD,
)
INERT = dict.fromkeys(
    [
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "offset_alibi",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "pretraining_pp",
    ],
    "a setting of the training code that Transformers' class does not read",
)


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are BLOOM's."""
    if not named(raw, NAMES):
        return False
    return not tensor_names or has_tensor(tensor_names, "word_embeddings_layernorm.weight")


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a BLOOM config.json; `ConfigFieldError` for what cannot be expressed."""
    values = read_fields(raw, FIELDS, INERT, "bloom")
    width = values["hidden_size"]
    need_multiple(width, values["n_head"], "bloom")
    if values["n_inner"] not in (None, 4 * width):
        raise ConfigFieldError(
            f"bloom: n_inner={values['n_inner']} cannot be expressed; BLOOM's MLP is 4 * hidden_size = {4 * width}."
        )
    if values["slow_but_exact"] and values["pretraining_tp"] > 1:
        raise ConfigFieldError(
            f"bloom: slow_but_exact=True with pretraining_tp={values['pretraining_tp']} cannot be expressed: upstream "
            f"then leaves out the biases of the output projections. Set slow_but_exact to false."
        )
    return build_config(
        "bloom",
        raw,
        FIELDS,
        values,
        embedding_norm=True,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        hidden_act="gelu_pytorch_tanh",
    )


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a BLOOM checkpoint and what becomes of it."""
    layer, ours = "h.{i}.", "model.layers.{i}."
    projections = [f"{ours}self_attn.{name}_proj" for name in "qkv"]
    fused = Interleaved(config.num_attention_heads)
    plain = {
        "word_embeddings_layernorm": "model.embed_norm",
        f"{layer}input_layernorm": f"{ours}input_layernorm",
        f"{layer}self_attention.dense": f"{ours}self_attn.o_proj",
        f"{layer}post_attention_layernorm": f"{ours}post_attention_layernorm",
        f"{layer}mlp.dense_h_to_4h": f"{ours}mlp.up_proj",
        f"{layer}mlp.dense_4h_to_h": f"{ours}mlp.down_proj",
        "ln_f": "model.norm",
    }
    found = parameter_rules("word_embeddings", "model.embed_tokens", bias=False, prefix=PREFIX)
    for source, target in plain.items():
        found += parameter_rules(source, target, bias=True, prefix=PREFIX)
    query_key_value = f"{layer}self_attention.query_key_value"
    found += parameter_rules(query_key_value, projections, bias=True, operation=fused, prefix=PREFIX)
    return found + head_rules(config, "word_embeddings.weight")


def reference(config: AlibiConfig) -> Reference:
    """`BloomForCausalLM`, which computes attention in its eager form only."""
    from transformers.models.bloom import modeling_bloom

    patches: dict[str, Callable[..., torch.Tensor]] = {
        "_get_alibi_slopes": lambda heads, device: true_slopes(heads, device=device),
        "build_alibi_tensor": mask_bias,
    }
    return Reference(
        class_name=REFERENCE,
        attn_implementation="eager",
        build=_build,
        truth=lambda: float64_truth(modeling_bloom, patches),
        exact_truth=lambda: float64_truth(modeling_bloom, patches),
        as_is_truth_note="slopes are powers of a float32 base, the bias is rounded to the model's dtype, and the "
        "softmax is float32 whatever the dtype",
        attention_modules=lambda model: layer_modules(model, "transformer.h", "self_attention"),
        bias_argument="alibi",
        bias_layout="flat",
    )


def _build(raw: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    values = read_fields(raw, FIELDS, INERT, "bloom")
    names = [
        "vocab_size",
        "hidden_size",
        "n_layer",
        "n_head",
        "layer_norm_epsilon",
        "apply_residual_connection_post_layernorm",
    ]
    names += [
        "hidden_dropout",
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
    ]
    upstream = BloomConfig(**{name: values[name] for name in names}, attn_implementation="eager")
    with torch.device("meta"):
        return BloomForCausalLM(upstream).to(dtype).eval()
