"""What an MPT checkpoint is compared with: Transformers' class where it computes the config, else the plain module."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from alibi_hf.families._layout import head_sizes, layer_modules
from alibi_hf.families._mpt_config import mpt_config
from alibi_hf.families._mpt_layout import USUAL, MptLayout, mpt_layout
from alibi_hf.families._mpt_plain import PlainMptForCausalLM
from alibi_hf.families._plain import plain_reference
from alibi_hf.families._reference import Reference
from alibi_hf.families._truth import float64_truth, true_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig

# What Transformers' MptForCausalLM computes whatever its config says: (our field, the value it computes).
_COMPUTED: tuple[tuple[str, Any], ...] = (
    ("alibi_bias_max", 8),
    ("norm_type", "layer_norm"),
    ("norm_bias", False),
    ("attention_bias", False),
    ("attention_out_bias", False),
    ("mlp_bias", False),
    ("mlp_type", "plain"),
    ("hidden_act", "gelu"),
    ("qk_norm", None),
    ("logit_scale", None),
    ("attn_logit_softcapping", None),
    ("final_logit_softcapping", None),
)


def ignored_fields(config: AlibiConfig) -> dict[str, Any]:
    """Our fields whose value Transformers' class does not compute, with that value."""
    computed = dict(_COMPUTED)
    computed["num_key_value_heads"] = config.num_attention_heads
    computed["intermediate_size"] = 4 * config.hidden_size
    computed["head_dim"] = config.hidden_size // config.num_attention_heads
    return {name: getattr(config, name) for name, value in computed.items() if getattr(config, name) != value}


def mpt_reference(config: AlibiConfig, layout: MptLayout = USUAL) -> Reference:
    """The reference of an MPT config and layout; see the module's docstring."""
    ignored = ignored_fields(config) | layout.unusual()
    return _plain_reference(ignored, layout) if ignored else _native_reference(config)


def _native_reference(config: AlibiConfig) -> Reference:
    from transformers.models.mpt import modeling_mpt

    patches = {"build_mpt_alibi_tensor": _true_bias}
    return Reference(
        class_name="transformers.MptForCausalLM",
        attn_implementation="eager",
        build=_build_native,
        truth=lambda: float64_truth(modeling_mpt, patches),
        exact_truth=lambda: float64_truth(modeling_mpt, patches),
        as_is_truth_note="slopes, bias and softmax are float32 whatever the dtype",
        attention_modules=_attention_modules,
        bias_argument="position_bias",
        bias_layout="heads",
        max_length=config.max_position_embeddings,
        length_field="max_seq_len",
    )


def _plain_reference(ignored: dict[str, Any], layout: MptLayout) -> Reference:
    named = ", ".join(f"{name}={value!r}" for name, value in ignored.items())
    reason = f"Transformers' MptForCausalLM ignores {named}; the reference is a plain module after llm-foundry"
    return plain_reference(PlainMptForCausalLM, _build_plain, partial(_attention_modules, inner=layout.inner), reason)


def _true_bias(heads: int, length: int, alibi_bias_max: float = 8, device: Any = None) -> Tensor:
    """`build_mpt_alibi_tensor` in float64, [heads, 1, length]."""
    distance = torch.arange(1 - length, 1, device=device)
    return true_slopes(heads, alibi_bias_max, device)[:, None, None] * distance


def _attention_modules(model: nn.Module, inner: str = "") -> list[nn.Module]:
    return layer_modules(model, "transformer.blocks", f"{inner}attn")


def _build_native(raw: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    from transformers import MptConfig, MptForCausalLM

    config = mpt_config(raw)
    clip, scale = config.clip_qkv, config.attention_scale
    upstream = MptConfig(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        max_seq_len=config.max_position_embeddings,
        layer_norm_epsilon=config.norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        # its strict config refuses an int where it wants a float
        attn_config={"clip_qkv": clip and float(clip), "softmax_scale": scale and float(scale)},
        attn_implementation="eager",
    )
    with torch.device("meta"):
        return MptForCausalLM(upstream).to(dtype).eval()


def _build_plain(raw: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    layout = mpt_layout(raw)
    spec = plain_spec(mpt_config(raw)) | {"fused_qkv": layout.fused_qkv, "fused_norms": bool(layout.inner)}
    with torch.device("meta"):
        return PlainMptForCausalLM(spec).to(dtype).eval()


def plain_spec(config: AlibiConfig) -> dict[str, Any]:
    """What a plain model of MPT's kind is built from."""
    scale = config.attention_scale
    spec = {
        "vocab": config.vocab_size,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "inner": config.intermediate_size,
        "gated": config.mlp_type == "gated",
        "act": ACT2FN[config.hidden_act],
        "softmax_scale": scale if scale is not None else head_sizes(config)[2] ** -0.5,
        "bias_max": config.alibi_bias_max,
        "tie": config.tie_word_embeddings,
    }
    same = "head_dim norm_type norm_eps norm_bias attention_bias attention_out_bias mlp_bias qk_norm clip_qkv"
    for name in [*same.split(), "logit_scale", "attn_logit_softcapping", "final_logit_softcapping"]:
        spec[name] = getattr(config, name)
    return spec


__all__ = ["ignored_fields", "mpt_reference", "plain_spec"]
