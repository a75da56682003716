"""BTLM's and Jais' config.json, in its older and its newer names, as an `AlibiConfig`.

Sources: `configuration_btlm.py` and `configuration_jais.py` of the model repositories; for what the older names mean,
`vllm/model_executor/models/jais.py` of vLLM.
"""

from collections.abc import Mapping
from math import isclose
from typing import Any

from alibi_hf.errors import ConfigFieldError
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
from alibi_hf.model.configuration_alibi import AlibiConfig

_LEARNED = (
    "Learned positions are not this package's: load it with the repository's own code, "
    "AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)."
)
FIELDS = (
    Field(("vocab_size",), INT, default=50257, to="vocab_size"),
    Field(("n_positions", "max_position_embeddings"), INT, default=1024, to="max_position_embeddings"),
    Field(("n_embd", "hidden_size"), INT, default=768, to="hidden_size"),
    Field(("n_layer", "num_hidden_layers"), INT, default=12, to="num_hidden_layers"),
    Field(("n_head", "num_attention_heads"), INT, default=12, to="num_attention_heads"),
    Field(("n_inner",), INT, default=None, to="intermediate_size"),
    Field(("activation_function",), TEXT, default="gelu_new"),
    Field(("resid_pdrop",), NUMBER, default=0.1, to="hidden_dropout"),
    Field(("embd_pdrop",), NUMBER, default=0.1, to="embedding_dropout"),
    Field(("attn_pdrop",), NUMBER, default=0.1, to="attention_dropout"),
    Field(("layer_norm_epsilon",), NUMBER, default=1e-5, to="norm_eps"),
    Field(("scale_attn_weights",), BOOL, default=True),
    Field(
        ("scale_attn_by_inverse_layer_idx",),
        BOOL,
        default=False,
        accept=(False,),
        refusal="Here all layers scale their scores alike.",
    ),
    Field(("position_embedding_type",), TEXT, default="learned", accept=("alibi",), refusal=_LEARNED),
    Field(("mup_width_scale",), NUMBER, default=1.0),
    Field(("mup_output_alpha",), NUMBER, default=1.0),
    Field(("width_scale",), NUMBER, default=None),
    Field(("mup_embeddings_scale", "embeddings_scale"), NUMBER, default=1.0),
    Field(("mup_scale_qk_dot_by_d", "scale_qk_dot_by_d"), BOOL, default=False),
    Field(("alibi_scaling",), (dict,), default=None, to="alibi_scaling"),
    Field(("pad_token_id",), TOKEN_IDS, default=None, to="pad_token_id"),
    Field(("bos_token_id",), TOKEN_IDS, default=50256, to="bos_token_id"),
    Field(("eos_token_id",), TOKEN_IDS, default=50256, to="eos_token_id"),
    TIE_FIELD,
)
INERT = {
    "reorder_and_upcast_attn": "the same scores, in float32; here the softmax is in float32 anyway",
    **dict.fromkeys(
        ["n_ctx", "n_special", "predict_special_tokens"], "a setting of GPT-2's first code that upstream does not read"
    ),
    **dict.fromkeys(
        [
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        ],
        "read by GPT-2's two-headed model only",
    ),
}


def btlm_config(family: str, raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a BTLM or Jais config.json; the slopes are a tensor of the checkpoint.

    Raises:
        ConfigFieldError: for a field that is not understood, or a value that cannot be expressed.
    """
    values = read_fields(raw, FIELDS, INERT, family)
    head_dim = need_multiple(values["n_embd"], values["n_head"], family)
    gated = values["activation_function"] == "swiglu"
    return build_config(
        family,
        raw,
        FIELDS,
        values,
        mlp_type="gated" if gated else "plain",
        hidden_act="silu" if gated else values["activation_function"],
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        attention_scale=_attention_scale(values, head_dim),
        embedding_scale=_factor(values["mup_embeddings_scale"]),
        logit_scale=_factor(_logit_scale(family, raw, values)),
    )


def _attention_scale(values: Mapping[str, Any], head_dim: int) -> float | None:
    if not values["scale_attn_weights"]:
        return 1.0
    return 1.0 / head_dim if values["mup_scale_qk_dot_by_d"] else None


def _logit_scale(family: str, raw: Mapping[str, Any], values: Mapping[str, Any]) -> float:
    """The factor on the logits; the older `width_scale` is already the product of the two newer fields."""
    product, older = values["mup_output_alpha"] * values["mup_width_scale"], values["width_scale"]
    if older is None:
        return product
    newer = {name: raw[name] for name in ("mup_output_alpha", "mup_width_scale") if name in raw}
    if newer and not isclose(product, older, rel_tol=1e-6):
        raise ConfigFieldError(
            f"{family}: width_scale={older} is the factor on the logits, but the newer names {newer} give {product}; "
            f"remove the one or the other."
        )
    return older


def _factor(value: float) -> float | None:
    """A factor, or None where it changes nothing."""
    return None if value == 1 else value


__all__ = ["FIELDS", "btlm_config"]
