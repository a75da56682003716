"""Our config as the fields of an upstream config.json, each map the inverse of its family's own.

A map writes what the format can say and leaves out the rest; reading the result back shows what was left out. Class,
dtype, tokens and labels are the caller's.

Sources: `BloomConfig`, `MptConfig` and `FalconConfig` of Transformers; `MPTConfig` of llm-foundry.
"""

from typing import Any

from alibi_hf.checkpoints.export_compare import BIASES, computed
from alibi_hf.families._layout import head_sizes
from alibi_hf.families._mpt_config import ACTIVATIONS
from alibi_hf.model.configuration_alibi import AlibiConfig

# Of llm-foundry's initialisation; TGI reads them without a default, vLLM the first.
_SETTINGS = {"embedding_fraction": 1.0, "init_device": "cpu", "init_config": {"verbose": 0}, "verbose": 0}


def bloom_fields(config: AlibiConfig) -> dict[str, Any]:
    """The fields of `BloomConfig`, and `seq_length`, which published configs have."""
    return {
        "model_type": "bloom",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "layer_norm_epsilon": float(config.norm_eps),
        "apply_residual_connection_post_layernorm": config.residual_from_norm,
        "hidden_dropout": float(config.hidden_dropout),
        "attention_dropout": float(config.attention_dropout),
        "seq_length": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def falcon_fields(config: AlibiConfig) -> dict[str, Any]:
    """The fields of `FalconConfig` for a Falcon-RW."""
    same = config.hidden_dropout == config.attention_dropout  # upstream has one rate for both
    dropout = float(config.hidden_dropout) if same else 0.0
    multi_query = config.num_key_value_heads == 1 < config.num_attention_heads  # the only other number it has
    return {
        "model_type": "falcon",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_kv_heads": 1 if multi_query else config.num_attention_heads,
        "ffn_hidden_size": config.intermediate_size,
        "layer_norm_epsilon": float(config.norm_eps),
        "hidden_dropout": dropout,
        "attention_dropout": dropout,
        "max_position_embeddings": config.max_position_embeddings,
        "activation": config.hidden_act,
        "alibi": True,
        "multi_query": multi_query,
        "bias": config.attention_bias or config.attention_out_bias or config.mlp_bias,
        "new_decoder_architecture": False,
        "parallel_attn": False,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def mpt_fields(config: AlibiConfig) -> dict[str, Any]:
    """Only what `MptForCausalLM` reads; the rest at the values that it computes."""
    clip, scale = config.clip_qkv, config.attention_scale
    return {
        "model_type": "mpt",
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "max_seq_len": config.max_position_embeddings,
        "expansion_ratio": 4,
        "resid_pdrop": float(config.hidden_dropout),
        "emb_pdrop": float(config.embedding_dropout),
        "layer_norm_epsilon": float(config.norm_eps),
        "norm_type": "low_precision_layernorm",
        "no_bias": True,
        "learned_pos_emb": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": 8,
            "attn_type": "multihead_attention",
            "attn_impl": "torch",
            "attn_pdrop": 0,  # its strict config takes whole numbers only
            "clip_qkv": None if clip is None else float(clip),
            "softmax_scale": None if scale is None else float(scale),
            "qk_ln": False,
            "prefix_lm": False,
            "attn_uses_sequence_id": False,
        },
    }


def foundry_fields(config: AlibiConfig) -> dict[str, Any]:
    """llm-foundry's dialect; fields that older readers do not know are written only where they matter."""
    raw = mpt_fields(config)
    raw["norm_eps"] = raw.pop("layer_norm_epsilon")
    ratio = (config.intermediate_size or 0) / config.hidden_size
    biases = [getattr(config, name) for name in BIASES[:3]] + [computed(config)["norm_bias"]]
    raw |= {
        "expansion_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "norm_type": _norm_type(config),
        "no_bias": not any(biases),
        "logit_scale": config.logit_scale,
        **_SETTINGS,
    }
    raw["attn_config"] |= _foundry_attention(config)
    ffn = _foundry_ffn(config)
    more = {"head_dim": config.head_dim, "final_logit_softcapping": config.final_logit_softcapping}
    if config.head_dim == config.hidden_size // config.num_attention_heads:
        del more["head_dim"]
    return (
        raw | {name: value for name, value in more.items() if value is not None} | ({"ffn_config": ffn} if ffn else {})
    )


def _norm_type(config: AlibiConfig) -> str:
    return f"low_precision_{config.norm_type.replace('_', '')}"


def _foundry_attention(config: AlibiConfig) -> dict[str, Any]:
    heads, kv_heads, _ = head_sizes(config)
    kind = {1: "multiquery_attention", heads: "multihead_attention"}
    maximum = config.alibi_bias_max
    attention: dict[str, Any] = {
        "alibi": config.alibi,
        "alibi_bias_max": int(maximum) if maximum == int(maximum) else maximum,
        "attn_type": kind.get(kv_heads, "grouped_query_attention"),
        "attn_pdrop": config.attention_dropout or 0,
        "qk_ln": config.qk_norm == "full",
    }
    if kv_heads != heads:
        attention["kv_n_heads"] = kv_heads
    if config.qk_norm == "head":
        attention["qk_gn"] = True
    if config.qk_norm is not None:  # llm-foundry gives these norms a kind of their own, which is LayerNorm by default
        attention |= {"norm_type": _norm_type(config), "norm_eps": float(config.norm_eps)}
    if config.head_dim != config.hidden_size // heads:  # llm-foundry's default knows nothing of head_dim
        attention["softmax_scale"] = computed(config)["attention_scale"]
    if config.attn_logit_softcapping is not None:
        attention["attn_logit_softcapping"] = config.attn_logit_softcapping
    return attention


def _foundry_ffn(config: AlibiConfig) -> dict[str, Any]:
    ffn: dict[str, Any] = {"ffn_type": "mptglu"} if config.mlp_type == "gated" else {}
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    name = computed(config)["hidden_act"]
    if name != "gelu" and name in names:  # an unknown one is refused when this is read back
        function, approximate = names[name]
        ffn["ffn_act_fn"] = {"name": function} | ({"approximate": approximate} if function == "gelu" else {})
    if config.intermediate_size is not None and config.intermediate_size % config.hidden_size:
        ffn["ffn_hidden_size"] = config.intermediate_size
    return ffn if not ffn or "ffn_type" in ffn else {"ffn_type": "mptmlp", **ffn}


__all__ = ["bloom_fields", "falcon_fields", "foundry_fields", "mpt_fields"]
