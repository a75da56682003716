"""Our config as an upstream config.json: the inverse of the family's own map, proved by reading it back.

A target's map writes what upstream's format can say. Reading the result with the family's `config` then shows what the
upstream class computes, and every difference from our config is either made good exactly (a bias that we lack is a bias
of zeros) or refused by name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from alibi_hf.checkpoints.export_source import Converted
from alibi_hf.errors import ConfigFieldError
from alibi_hf.families import Family, find_family
from alibi_hf.families._fields import LABEL_FIELDS
from alibi_hf.families._layout import head_sizes
from alibi_hf.families._mpt_config import ACTIVATIONS, is_foundry
from alibi_hf.model.bias_alibi import alibi_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig

BIASES = ("attention_bias", "attention_out_bias", "mlp_bias", "norm_bias")
TRAINING = ("attention_dropout", "hidden_dropout", "embedding_dropout")  # no inference reads them
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Said by `alibi_slopes` of `computed`; checked apart; or no part of what is computed.
_NOT_COMPARED = (
    *TRAINING,
    *TOKENS,
    "alibi",
    "alibi_bias_max",
    "alibi_rounding",
    "attention_window",
    "attention_window_eps",
    "initializer_range",
    "use_cache",
)
_SAME_ACTIVATION = {
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
}
_HEAD_NAMES = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


@dataclass(frozen=True)
class Target:
    """An upstream layout that can be written.

    Attributes:
        family_name: whose rules and config map are inverted.
        raw: our config as upstream's fields, without class, dtype, tokens and labels.
        classes: upstream's class of each of ours.
        reader: who computes it, for messages.
        caution: what whoever loads it there should know, one sentence.
        instead: what else may hold a config that this one cannot.
    """

    family_name: str
    raw: Callable[[AlibiConfig], dict[str, Any]]
    classes: dict[str, str]
    reader: str
    caution: str = ""
    instead: str = ""

    @property
    def family(self) -> Family:
        """The family module."""
        return find_family({"model_type": self.family_name})


def computed(config: AlibiConfig) -> dict[str, Any]:
    """What a config computes, by field: defaults filled in, slopes as numbers, names of one function made one."""
    names = [name for name in AlibiConfig.__annotations__ if name not in _NOT_COMPARED]
    values = {name: getattr(config, name) for name in names}
    _, _, head_dim = head_sizes(config)
    scale = config.attention_scale
    return values | {
        "attention_scale": head_dim**-0.5 if scale is None else scale,
        "embedding_scale": 1.0 if config.embedding_scale is None else config.embedding_scale,
        "logit_scale": 1.0 if config.logit_scale is None else config.logit_scale,
        "hidden_act": _SAME_ACTIVATION.get(config.hidden_act, config.hidden_act),
        "norm_bias": config.norm_bias and config.norm_type == "layer_norm",
        "alibi_slopes": effective_slopes(config),
    }


def effective_slopes(config: AlibiConfig) -> list[float]:
    """The exact slope of each query head, in float64; zeros without ALiBi."""
    heads = config.num_attention_heads
    if not config.alibi:
        return [0.0] * heads
    return config.alibi_slopes or alibi_slopes(heads, config.alibi_bias_max)


def near(ours: Any, theirs: Any) -> bool:
    """Whether two values are one: numbers and lists of them within float32's rounding."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(near, ours, theirs))
    if isinstance(ours, float) or isinstance(theirs, float):
        return ours is not None and theirs is not None and math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)


def blamed(config: AlibiConfig, name: str) -> str:
    """The field that a difference in `name` comes from, and its value: slopes have three fields."""
    if name == "alibi_slopes" and config.alibi_slopes is None:
        name = "alibi" if not config.alibi else "alibi_bias_max"
    value = getattr(config, name)
    return f"{name}={_shown(value)}"


def target_config(source: Converted, to: str) -> tuple[dict[str, Any], AlibiConfig, list[str]]:
    """Upstream's config.json for a folder, our config of what upstream computes from it, and what is to be known.

    Raises:
        ConfigFieldError: naming the field that the target cannot hold, its value, and what the target computes.
    """
    target, config = TARGETS[to], source.config
    _check_class(source, to)
    raw = recorded(source, to)
    notes = ["config.json is upstream's own, as conversion.json keeps it"]
    if raw is None:
        raw = {name: getattr(config, name) for name in (*TOKENS, "use_cache", "initializer_range")}
        raw = target.raw(config) | raw
        notes = _check(config, target.family.config(raw), to)
    raw["architectures"] = [target.classes[source.class_name]]
    mapped = target.family.config(raw)
    raw |= {name: getattr(config, name) for name in TOKENS if getattr(config, name) != getattr(mapped, name)}
    if source.class_name != "AlibiForCausalLM":
        raw |= {name: getattr(config, name) for name in LABEL_FIELDS if name != "num_labels"}
    return raw, target.family.config(raw), notes + ([target.caution] if target.caution else [])


def _check_class(source: Converted, to: str) -> None:
    """Refuse a head that the target lacks, and a rounding of the bias that it does not compute."""
    target, rounding = TARGETS[to], source.config.alibi_rounding
    if source.class_name not in target.classes:
        known = ", ".join(target.classes)
        raise ConfigFieldError(f"{to} cannot hold the head of {source.class_name}: {target.reader} has {known} only.")
    if rounding not in target.family.ROUNDINGS:
        raise ConfigFieldError(
            f"{to} cannot hold alibi_rounding={rounding!r}: {target.reader} computes "
            f"{' or '.join(target.family.ROUNDINGS)}. Set alibi_rounding to 'exact' in config.json."
        )


def recorded(source: Converted, to: str) -> dict[str, Any] | None:
    """Upstream's own config.json, where the folder came from that layout and its config still says the same."""
    target, config = TARGETS[to], source.config
    raw = source.record.get("config", {}).get("from")
    if not isinstance(raw, dict) or raw.get("model_type") != target.family_name:
        return None
    if target.family_name == "mpt" and is_foundry(raw) != (to == "llm-foundry"):
        return None
    mapped = target.family.config(raw)
    ours, theirs = computed(config), computed(mapped)
    if any(not near(value, theirs[name]) for name, value in ours.items()):
        return None
    if any(getattr(config, name) != getattr(mapped, name) for name in TRAINING):
        return None
    return {name: value for name, value in raw.items() if name != "auto_map"}  # it names code that is not here


def _check(config: AlibiConfig, mapped: AlibiConfig, to: str) -> list[str]:
    """Refuse what `mapped`, read back from the target's own file, does not compute as `config` does; say the rest."""
    target, notes = TARGETS[to], []
    ours, theirs = computed(config), computed(mapped)
    for name, value in ours.items():
        if name in BIASES and theirs[name] and not value:
            notes.append(f"{name}: {target.reader} has these biases, the source has none; they are zeros")
        elif not near(value, theirs[name]):
            what = "the slopes " if name == "alibi_slopes" else ""
            raise ConfigFieldError(
                f"{to} cannot hold {blamed(config, name)}: {target.reader} computes {what}{_shown(theirs[name])}. "
                f"{target.instead}".rstrip()
            )
    for name in TRAINING:
        if getattr(config, name) != getattr(mapped, name):
            notes.append(f"{name}={getattr(config, name)} is not kept; only training would read it")
    return notes


def _shown(value: Any) -> str:
    if not isinstance(value, list):
        return repr(value)
    return f"[{', '.join(f'{slope:.6g}' for slope in value[:3])}{', ...' if len(value) > 3 else ''}]"


def _bloom(config: AlibiConfig) -> dict[str, Any]:
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


def _falcon(config: AlibiConfig) -> dict[str, Any]:
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


def _mpt(config: AlibiConfig) -> dict[str, Any]:
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


def _foundry(config: AlibiConfig) -> dict[str, Any]:
    """llm-foundry's dialect; fields that older readers do not know are written only where they matter."""
    raw = _mpt(config)
    raw["norm_eps"] = raw.pop("layer_norm_epsilon")
    ratio = (config.intermediate_size or 0) / config.hidden_size
    biases = [getattr(config, name) for name in BIASES[:3]] + [computed(config)["norm_bias"]]
    raw |= {
        "expansion_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "norm_type": f"low_precision_{config.norm_type.replace('_', '')}",
        "no_bias": not any(biases),
        "logit_scale": config.logit_scale,
    }
    raw["attn_config"] |= _foundry_attention(config)
    ffn = _foundry_ffn(config)
    more = {"head_dim": config.head_dim, "final_logit_softcapping": config.final_logit_softcapping}
    if config.head_dim == config.hidden_size // config.num_attention_heads:
        del more["head_dim"]
    return (
        raw | {name: value for name, value in more.items() if value is not None} | ({"ffn_config": ffn} if ffn else {})
    )


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


def _classes(start: str) -> dict[str, str]:
    return {f"Alibi{head}": f"{start}{head}" for head in _HEAD_NAMES}


TARGETS: dict[str, Target] = {
    "bloom": Target(
        "bloom",
        _bloom,
        _classes("Bloom"),
        "Transformers' BLOOM",
        caution="Transformers' BLOOM rounds the bias to the model's dtype: in 16 bits it is another bias than here",
    ),
    "mpt": Target(
        "mpt",
        _mpt,
        _classes("Mpt"),
        "Transformers' MPT",
        caution="Transformers' MPT raises past max_seq_len tokens; a larger max_seq_len changes nothing else",
        instead="llm-foundry's flavour (--to llm-foundry) can say more.",
    ),
    "llm-foundry": Target("mpt", _foundry, {"AlibiForCausalLM": "MPTForCausalLM"}, "llm-foundry's MPT"),
    "falcon": Target(
        "falcon",
        _falcon,
        _classes("Falcon"),
        "Transformers' Falcon",
        caution="Transformers' Falcon rounds the bias to bfloat16 in any dtype, and adds it twice in eager attention: "
        "load it with attn_implementation='sdpa'",
    ),
}

__all__ = ["BIASES", "TARGETS", "Target", "blamed", "computed", "effective_slopes", "near", "recorded", "target_config"]
