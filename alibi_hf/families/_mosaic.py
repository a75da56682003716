"""What MosaicGPT and Replit-code-v1 share, which was trained with the same code: config.json, layout and reference.

* Flat field names, `ln_1`, `mlp.mlp_up` and `ln_f` in the files; otherwise what MPT became, with tied embeddings.
* Slopes without the correction for head counts that are no power of two: 2^-(M i / H) for head i of H. Where H is a
  power of two that is ALiBi's own formula; elsewhere it is not, and the slopes are written into `alibi_slopes`. (For
  three days of April 2023 the code had these names and corrected slopes. config.json cannot tell; no checkpoint of
  them is known.)
* Upstream computes the bias in the model's dtype, ours in float32.

Sources: MosaicML `examples` v0.0.4, `llm/src/models/mosaic_gpt` and `layers/attention.py` (in llm-foundry's history);
llm-foundry, `scripts/misc/convert_examples_ckpt.py`, for the names that became MPT's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from alibi_hf.checkpoints.rules import Rule
from alibi_hf.errors import ConfigFieldError
from alibi_hf.families._about import OLD_CODE, PACKED, About
from alibi_hf.families._fields import (
    BOOL,
    INT,
    NUMBER,
    TOKEN_FIELDS,
    Field,
    build_config,
    need_multiple,
    read_fields,
)
from alibi_hf.families._layout import has_tensor, layer_modules
from alibi_hf.families._mosaic_plain import PlainMosaicForCausalLM
from alibi_hf.families._mpt_config import logit_scale
from alibi_hf.families._mpt_layout import MOSAIC, mpt_rules
from alibi_hf.families._mpt_reference import plain_spec
from alibi_hf.families._plain import plain_reference
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig

REFERENCE = f"{PlainMosaicForCausalLM.__module__}.{PlainMosaicForCausalLM.__name__}"
_CAUSAL = "This decoder is causal; use the checkpoint's own code."
_TIED = "Upstream's code multiplies by the embedding, whatever this field says; remove it."

ABOUT_MOSAIC = About(
    switches=("alibi_slopes (where the number of heads is no power of two)", "qk_norm", "clip_qkv"),
    outside=(),
    exports=("llm-foundry",),
    defects=(
        "slopes of a number of heads that is no power of two are not the paper's; kept as they were trained",
        OLD_CODE,
        PACKED,
    ),
)
FIELDS = (
    Field(("vocab_size",), INT, default=50368, to="vocab_size"),
    Field(("d_model", "hidden_size"), INT, default=2048, to="hidden_size"),
    Field(("n_layers",), INT, default=24, to="num_hidden_layers"),
    Field(("n_heads",), INT, default=16, to="num_attention_heads"),
    Field(("mlp_ratio",), INT, default=4),
    Field(("max_seq_len",), INT, default=2048, to="max_position_embeddings"),
    Field(("attn_pdrop",), NUMBER, default=0.0, to="attention_dropout"),
    Field(("resid_pdrop",), NUMBER, default=0.0, to="hidden_dropout"),
    Field(("emb_pdrop",), NUMBER, default=0.0, to="embedding_dropout"),
    Field(("attn_qk_ln",), BOOL, default=False),
    Field(("attn_clip_qkv",), NUMBER, default=None),
    Field(("softmax_scale",), NUMBER, default=None, to="attention_scale"),
    Field(("prefix_lm",), BOOL, default=False, accept=(False, None), refusal=_CAUSAL),
    Field(("alibi",), BOOL, default=False),
    Field(("alibi_bias_max",), NUMBER, default=8),
    Field(("logit_scale",), (int, float, str), default=None),
    Field(("no_bias",), BOOL, default=False),
    Field(("tie_word_embeddings",), BOOL, default=True, accept=(True,), refusal=_TIED),
    *TOKEN_FIELDS,
)
INERT = {
    "attn_impl": "the backend is chosen with attn_implementation",
    "attn_uses_sequence_id": "documents are marked by position_ids here, whatever the checkpoint was trained with",
    "low_precision_layernorm": "the dtype of the norms under autocast",
    "embedding_fraction": "scales the embedding's gradient only",
    **dict.fromkeys(
        [
            "init_device",
            "verbose",
            "param_init_fn",
            "init_div_is_residual",
            "init_std",
            "emb_init_std",
            "emb_init_uniform_lim",
            "init_gain",
            "fan_mode",
            "init_nonlinearity",
            "tokenizer_name",
            "name",
            "loss_fn",
        ],
        "a setting of upstream's initialisation or training",
    ),
}


def old_slopes(heads: int, bias_max: float) -> list[float]:
    """One slope a head, 2^-(bias_max * i / heads) for i from 1: ALiBi's own where `heads` is a power of two."""
    return [2.0 ** (-bias_max * head / heads) for head in range(1, heads + 1)]


def has_old_names(tensor_names: Sequence[str]) -> bool:
    """Whether there are no names yet, or they are those of MosaicGPT."""
    return not tensor_names or has_tensor(tensor_names, "wte.weight", "ln_f.weight")


def mosaic_config(raw: dict[str, Any], family: str) -> AlibiConfig:
    """The `AlibiConfig` of a flat config.json; `ConfigFieldError` for what cannot be expressed."""
    if "attn_config" in raw or "norm_type" in raw:
        raise ConfigFieldError(
            f"{family}: attn_config={raw.get('attn_config')!r} and norm_type={raw.get('norm_type')!r} are of the "
            f"days in which MosaicGPT became MPT, whose slopes and names it has. Set model_type to 'mpt' and "
            f"architectures to ['MPTForCausalLM'] in config.json."
        )
    values = read_fields(raw, FIELDS, INERT, family)
    heads, bias_max = values["n_heads"], values["alibi_bias_max"]
    need_multiple(values["d_model"], heads, family)
    if not values["alibi"]:
        raise ConfigFieldError(
            f"{family}: alibi={raw.get('alibi')!r} is a checkpoint with learned positions (wpe), not with ALiBi. Load "
            f"it with the repository's own code: trust_remote_code=True."
        )
    if bias_max <= 0:
        raise ConfigFieldError(f"{family}: alibi_bias_max={bias_max} must be positive.")
    bias, power_of_two = not values["no_bias"], heads & (heads - 1) == 0
    return build_config(
        family,
        raw,
        FIELDS,
        values,
        intermediate_size=values["mlp_ratio"] * values["d_model"],
        qk_norm="full" if values["attn_qk_ln"] else None,
        clip_qkv=values["attn_clip_qkv"] or None,  # upstream tests its truth, so that 0 means none
        norm_bias=bias,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        logit_scale=logit_scale(values, family),
        alibi_bias_max=bias_max,
        alibi_slopes=None if power_of_two else old_slopes(heads, bias_max),
    )


def mosaic_rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a checkpoint with the old names and what becomes of it."""
    return mpt_rules(config, MOSAIC)


def mosaic_reference(family: str) -> Reference:
    """The plain module after upstream's formulas."""
    reason = f"Transformers has no class for {family}; the reference is a plain module after MosaicML's own code"
    build = partial(_build, family=family)
    return plain_reference(PlainMosaicForCausalLM, build, _attention_modules, reason)


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    return layer_modules(model, "transformer.blocks", "attn")


def _build(raw: dict[str, Any], dtype: torch.dtype, family: str) -> nn.Module:
    spec = plain_spec(mosaic_config(raw, family)) | {"fused_qkv": True}
    with torch.device("meta"):
        return PlainMosaicForCausalLM(spec).to(dtype).eval()


__all__ = ["ABOUT_MOSAIC", "FIELDS", "REFERENCE", "has_old_names", "mosaic_config", "mosaic_reference", "mosaic_rules"]
