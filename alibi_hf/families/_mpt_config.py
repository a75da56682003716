"""MPT's config.json, in llm-foundry's and in Transformers' dialect, as an `AlibiConfig`.

Sources: `MptConfig` of Transformers; `MPTConfig` and the config defaults of llm-foundry.
"""

from collections.abc import Mapping
from typing import Any

from alibi_hf.errors import ConfigFieldError
from alibi_hf.families._fields import (
    BOOL,
    INT,
    NUMBER,
    TEXT,
    TIE_FIELD,
    TOKEN_FIELDS,
    Field,
    build_config,
    need_multiple,
    read_fields,
)
from alibi_hf.model.configuration_alibi import AlibiConfig

DICT = (dict,)
_OWN_CODE = "Load it with the checkpoint's own code: trust_remote_code=True."
_SHARED_KEYS = f"Every layer has keys of its own here. {_OWN_CODE}"
FIELDS = (
    Field(("vocab_size",), INT, default=50368, to="vocab_size"),
    Field(("d_model", "hidden_size"), INT, default=2048, to="hidden_size"),
    Field(("n_layers", "num_hidden_layers"), INT, default=24, to="num_hidden_layers"),
    Field(("n_heads", "num_attention_heads"), INT, default=16, to="num_attention_heads"),
    Field(("max_seq_len",), INT, default=2048, to="max_position_embeddings"),
    Field(("head_dim",), INT, default=None),
    Field(("expansion_ratio",), NUMBER, default=4),
    Field(("resid_pdrop",), NUMBER, default=0.0, to="hidden_dropout"),
    Field(("emb_pdrop",), NUMBER, default=0.0, to="embedding_dropout"),
    Field(("layer_norm_epsilon", "norm_eps"), NUMBER, default=1e-5, to="norm_eps"),
    Field(("norm_type",), TEXT, default="low_precision_layernorm"),
    Field(("logit_scale",), (int, float, str), default=None),
    Field(("no_bias",), BOOL, default=None),
    Field(("attention_bias",), BOOL, default=None),
    Field(("final_logit_softcapping",), NUMBER, default=None, to="final_logit_softcapping"),
    TIE_FIELD,
    Field(("attn_config",), DICT, default=None),
    Field(("ffn_config",), DICT, default=None),
    Field(("block_overrides",), DICT, default=None, accept=(None,), refusal=f"All layers are alike here. {_OWN_CODE}"),
    Field(("residual_modification",), TEXT, default=None, accept=(None,)),
    Field(("fuse_norm_attn_norm",), BOOL, default=False),
    *TOKEN_FIELDS,
)
INERT = {
    "learned_pos_emb": "upstream turns it off where ALiBi is on",
    "embedding_fraction": "scales the embedding's gradient only",
    "residual_coeff": "read with residual_modification only",
    **dict.fromkeys(
        ["init_device", "init_config", "verbose", "fc_type", "tokenizer_name", "name", "loss_fn"],
        "a setting of llm-foundry's initialisation or training",
    ),
    "use_pad_tok_in_ffn": "skips padded rows, which no other row reads",
}
ATTENTION_FIELDS = (
    Field(
        ("attn_type",),
        TEXT,
        default="multihead_attention",
        accept=("multihead_attention", "multiquery_attention", "grouped_query_attention"),
    ),
    Field(("attn_pdrop",), NUMBER, default=0.0, to="attention_dropout"),
    Field(("clip_qkv",), NUMBER, default=None, to="clip_qkv"),
    Field(("softmax_scale",), NUMBER, default=None),
    Field(("qk_ln",), BOOL, default=False),
    Field(("qk_gn",), BOOL, default=False),
    Field(("kv_n_heads",), INT, default=None),
    Field(("kv_dim",), INT, default=None, accept=(None,), refusal="Keys of another width are cross-attention's."),
    Field(("fused_qkv",), BOOL, default=True),
    Field(("norm_type",), TEXT, default="low_precision_layernorm"),
    Field(("norm_eps",), NUMBER, default=1e-5),
    Field(("alibi",), BOOL, default=None),
    Field(("alibi_bias_max",), NUMBER, default=8, to="alibi_bias_max"),
    Field(("rope",), BOOL, default=False, accept=(False,), refusal=f"RoPE is not ALiBi. {_OWN_CODE}"),
    Field(("nope",), BOOL, default=False, accept=(False,), refusal=f"Without positions there is no ALiBi. {_OWN_CODE}"),
    Field(("prefix_lm",), BOOL, default=False, accept=(False, None), refusal=f"This decoder is causal. {_OWN_CODE}"),
    Field(("sliding_window_size",), INT, default=-1, accept=(-1,), refusal=f"Every token sees all before. {_OWN_CODE}"),
    Field(("attn_logit_softcapping",), NUMBER, default=None, to="attn_logit_softcapping"),
    Field(("attn_temperature_tuning",), DICT, default=None),
    Field(("reuse_kv_layer_idx",), INT, default=None, accept=(None,), refusal=_SHARED_KEYS),
    Field(("reuse_kv_x_layer_idx",), INT, default=None, accept=(None,), refusal=_SHARED_KEYS),
    Field(("seq_parallel_world_size",), INT, default=None, accept=(None, 1)),
)
ATTENTION_INERT = {
    "attn_impl": "the backend is chosen with attn_implementation",
    "attn_uses_sequence_id": "documents are marked by position_ids here, whatever the checkpoint was trained with",
    **dict.fromkeys(
        ["rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config"], "read with rope only, which is off"
    ),
    "initializer_range": "only new weights would read it",
}
FFN_FIELDS = (
    Field(("ffn_type",), TEXT, default="mptmlp", accept=("mptmlp", "mptglu"), refusal=_OWN_CODE),
    Field(("ffn_act_fn",), DICT, default=None),
    Field(("ffn_hidden_size",), INT, default=None),
)
FFN_INERT = {"fc_type": "the implementation of the linear layers"}
NORMS = {
    "layernorm": "layer_norm",
    "low_precision_layernorm": "layer_norm",
    "rmsnorm": "rms_norm",
    "low_precision_rmsnorm": "rms_norm",
    "triton_rmsnorm": "rms_norm",
}
# torch.nn.functional names, with the arguments that change them, to Transformers' activations.
ACTIVATIONS = {
    ("gelu", "none"): "gelu",
    ("gelu", "tanh"): "gelu_pytorch_tanh",
    ("relu", "none"): "relu",
    ("silu", "none"): "silu",
    ("quick_gelu", "none"): "quick_gelu",
}


def is_foundry(raw: Mapping[str, Any]) -> bool:
    """Whether the config was written for llm-foundry's code: it names that class, or remote code."""
    return "auto_map" in raw or any(str(name).startswith("MPT") for name in raw.get("architectures") or [])


def mpt_config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of an MPT config.json.

    Raises:
        ConfigFieldError: for a field that is not understood, or a value that cannot be expressed.
    """
    values = read_fields(raw, FIELDS, INERT, "mpt")
    attention = read_fields(values["attn_config"] or {}, ATTENTION_FIELDS, ATTENTION_INERT, "mpt attn_config")
    ffn = read_fields(values["ffn_config"] or {}, FFN_FIELDS, FFN_INERT, "mpt ffn_config")
    _need_alibi(raw, attention)
    _need_plain_queries(values, attention)
    no_bias = values["no_bias"] if values["no_bias"] is not None else not is_foundry(raw)
    share = need_multiple(values["d_model"], values["n_heads"], "mpt")  # upstream wants it beside head_dim too
    head_dim = share if values["head_dim"] is None else values["head_dim"]
    more = {field.to: attention[field.names[0]] for field in ATTENTION_FIELDS if field.to}
    more |= {
        "head_dim": head_dim,
        "attention_scale": _attention_scale(attention["softmax_scale"], share, head_dim),
        "num_key_value_heads": _kv_heads(values["n_heads"], attention),
        "qk_norm": "full" if attention["qk_ln"] else "head" if attention["qk_gn"] else None,
        "clip_qkv": attention["clip_qkv"] or None,  # upstream tests its truth, so that 0 means none
        "intermediate_size": _ffn_width(values, ffn),
        "mlp_type": "gated" if ffn["ffn_type"] == "mptglu" else "plain",
        "hidden_act": _activation(ffn["ffn_act_fn"]),
        "norm_type": _norm_type(values["norm_type"]),
        "norm_bias": not no_bias,
        # of Wqkv alone, where it has the last word; the output projection has what no_bias says
        "attention_bias": values["attention_bias"] if values["attention_bias"] is not None else not no_bias,
        "attention_out_bias": not no_bias,
        "mlp_bias": not no_bias,
        "logit_scale": logit_scale(values, "mpt"),
    }
    return build_config("mpt", raw, FIELDS, values, **more)


def _need_alibi(raw: dict[str, Any], attention: dict[str, Any]) -> None:
    alibi = attention["alibi"] if attention["alibi"] is not None else not is_foundry(raw)
    if not alibi:
        raise ConfigFieldError(
            f"mpt attn_config: alibi={attention['alibi']!r} is an MPT without ALiBi (rope={attention['rope']}, "
            f"learned_pos_emb={raw.get('learned_pos_emb', True)}), which is not this package's. Load it with the "
            f"repository's own code: AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True). Transformers' "
            f"MptForCausalLM would ignore the positions."
        )
    if attention["qk_ln"] and attention["qk_gn"]:
        raise ConfigFieldError("mpt attn_config: qk_ln=True and qk_gn=True exclude each other.")


def _need_plain_queries(values: dict[str, Any], attention: dict[str, Any]) -> None:
    """Refuse a query/key norm of another kind than the other norms, and queries scaled by their position."""
    tuning = attention["attn_temperature_tuning"] or {}
    if tuning.get("attn_scale", 0.0) != 0.0:
        raise ConfigFieldError(
            f"mpt attn_config: attn_temperature_tuning={tuning} scales queries by their position, which cannot be "
            f"expressed; only attn_scale=0.0 can. {_OWN_CODE}"
        )
    norms = (_norm_type(attention["norm_type"]), attention["norm_eps"])
    others = (_norm_type(values["norm_type"]), values["layer_norm_epsilon"])
    if (attention["qk_ln"] or attention["qk_gn"]) and norms != others:
        kind = "qk_ln" if attention["qk_ln"] else "qk_gn"
        raise ConfigFieldError(
            f"mpt attn_config: {kind}=True is a {norms[0]} with eps={norms[1]} in llm-foundry's code, whatever "
            f"norm_type={values['norm_type']!r} and norm_eps={others[1]} say of the other norms; norms of two kinds "
            f"cannot be expressed. {_OWN_CODE}"
        )


def _attention_scale(given: float | None, share: int, head_dim: int) -> float | None:
    """Upstream's default is the root of d_model / n_heads, whatever head_dim says."""
    return share**-0.5 if given is None and head_dim != share else given


def _kv_heads(heads: int, attention: dict[str, Any]) -> int:
    kind, given = attention["attn_type"], attention["kv_n_heads"]
    implied = {"multihead_attention": heads, "multiquery_attention": 1}.get(kind, given)
    if implied is None:
        raise ConfigFieldError(f"mpt attn_config: attn_type={kind!r} needs kv_n_heads, which is missing.")
    if given not in (None, implied):
        raise ConfigFieldError(
            f"mpt attn_config: kv_n_heads={given} contradicts attn_type={kind!r}, which has {implied} key/value heads."
        )
    need_multiple(heads, implied, "mpt attn_config kv_n_heads")
    return implied


def _ffn_width(values: dict[str, Any], ffn: dict[str, Any]) -> int:
    if ffn["ffn_hidden_size"] is not None:
        return ffn["ffn_hidden_size"]
    width = values["expansion_ratio"] * values["d_model"]
    if width != int(width):
        raise ConfigFieldError(
            f"mpt: expansion_ratio={values['expansion_ratio']} times d_model={values['d_model']} is {width}, no whole "
            f"number; set ffn_config.ffn_hidden_size to the rows of ffn.up_proj.weight."
        )
    return int(width)


def _activation(spec: dict[str, Any] | None) -> str:
    spec = {"name": "gelu", "approximate": "none"} if spec is None else dict(spec)
    key = (spec.pop("name", None), spec.pop("approximate", "none"))
    if key not in ACTIVATIONS or spec:
        known = sorted({name for name, _ in ACTIVATIONS})
        raise ConfigFieldError(f"mpt ffn_config: ffn_act_fn={key, spec} is not understood; known: {known}.")
    return ACTIVATIONS[key]


def _norm_type(name: str) -> str:
    if name.lower() not in NORMS:
        raise ConfigFieldError(f"mpt: norm_type={name!r} is not understood; known: {', '.join(NORMS)}.")
    return NORMS[name.lower()]


def logit_scale(values: dict[str, Any], where: str) -> float | None:
    """The factor on the logits that `logit_scale` and `d_model` say; `ConfigFieldError` for an unknown word."""
    scale = values["logit_scale"]
    if isinstance(scale, str):
        if scale != "inv_sqrt_d_model":
            raise ConfigFieldError(f"{where}: logit_scale={scale!r} is not understood; a number or 'inv_sqrt_d_model'.")
        return values["d_model"] ** -0.5
    return scale


__all__ = ["ATTENTION_FIELDS", "FFN_FIELDS", "FIELDS", "is_foundry", "logit_scale", "mpt_config"]
