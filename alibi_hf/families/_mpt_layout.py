"""Where MPT files keep their tensors: llm-foundry's layouts, and that of MosaicGPT, which MPT was called before.

Sources: llm-foundry, `llmfoundry/models/layers/blocks.py` and `attention.py`; for the old names
`scripts/misc/convert_examples_ckpt.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from alibi_hf.checkpoints.rules import Rule, Split
from alibi_hf.families._layout import head_rules, head_sizes, parameter_rules
from alibi_hf.model.configuration_alibi import AlibiConfig

PREFIX = "transformer."
WRAPPER = "model."  # Composer keeps the model in an attribute of this name


@dataclass(frozen=True)
class MptLayout:
    """Names in the files.

    Attributes:
        fused_qkv: one `Wqkv` a layer; without it `Wq`, `Wk` and `Wv`.
        inner: the module of a block that holds attention and norms, "" where the block itself does.
        norm: what the names of the norms begin with.
        up, down: the projections of the MLP in a block.
    """

    fused_qkv: bool = True
    inner: str = ""
    norm: str = "norm_"
    up: str = "ffn.up_proj"
    down: str = "ffn.down_proj"

    def unusual(self) -> dict[str, Any]:
        """llm-foundry's fields that make this layout differ from the usual one, with their values."""
        fields = {} if self.fused_qkv else {"fused_qkv": False}
        return fields | ({"fuse_norm_attn_norm": True} if self.inner else {})


USUAL = MptLayout()
MOSAIC = MptLayout(norm="ln_", up="mlp.mlp_up", down="mlp.mlp_down")


def mpt_layout(raw: Mapping[str, Any]) -> MptLayout:
    """The layout that an MPT config.json asks for."""
    attention = raw.get("attn_config")
    fused_qkv = not isinstance(attention, dict) or attention.get("fused_qkv") is not False
    return MptLayout(fused_qkv, "norm_attn_norm." if raw.get("fuse_norm_attn_norm") is True else "")


def mpt_rules(config: AlibiConfig, layout: MptLayout = USUAL) -> list[Rule]:
    """Every tensor of an MPT checkpoint with this layout and what becomes of it."""
    layer, ours = "blocks.{i}.", "model.layers.{i}."
    inner = layer + layout.inner
    norm = config.norm_type == "layer_norm" and config.norm_bias
    modules = [
        ("wte", "model.embed_tokens", False),
        (f"{layout.norm}f", "model.norm", norm),
        (f"{inner}{layout.norm}1", f"{ours}input_layernorm", norm),
        (f"{inner}{layout.norm}2", f"{ours}post_attention_layernorm", norm),
        (f"{inner}attn.out_proj", f"{ours}self_attn.o_proj", config.attention_out_bias),
        (layer + layout.up, f"{ours}mlp.up_proj", config.mlp_bias),
        (layer + layout.down, f"{ours}mlp.down_proj", config.mlp_bias),
    ]
    if config.mlp_type == "gated":
        modules.append((f"{layer}ffn.gate_proj", f"{ours}mlp.gate_proj", config.mlp_bias))
    if config.qk_norm is not None:
        modules += [(f"{inner}attn.{part}_ln", f"{ours}self_attn.{part}_norm", norm) for part in "qk"]
    if not layout.fused_qkv:
        bias = config.attention_bias
        modules += [(f"{inner}attn.W{part}", f"{ours}self_attn.{part}_proj", bias) for part in "qkv"]
    found = [rule for names in modules for rule in parameter_rules(*names[:2], bias=names[2], prefix=PREFIX)]
    if layout.fused_qkv:
        found += _fused_rules(config, f"{inner}attn.Wqkv", f"{ours}self_attn.")
    return [replace(rule, wrapper=WRAPPER) for rule in found + head_rules(config, "wte.weight")]


def _fused_rules(config: AlibiConfig, source: str, ours: str) -> list[Rule]:
    heads, kv_heads, head_dim = head_sizes(config)
    rows = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    targets = [f"{ours}{part}_proj" for part in "qkv"]
    return parameter_rules(source, targets, bias=config.attention_bias, operation=Split(rows), prefix=PREFIX)


__all__ = ["MOSAIC", "USUAL", "MptLayout", "mpt_layout", "mpt_rules"]
