"""Baichuan-13B and Baichuan2-13B from their formulas, in float64; no code of the package is in it.

Source of the formulas: baichuan-inc, `modeling_baichuan.py` of Baichuan-13B-Base and Baichuan2-13B-Base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import builders
from tests.references.parts import alibi, attend, by_row, read, rms, silu, slope
from tests.references.random_weights import random_tensors


def write(folder: Path, heads: int = 6, *, layers: int = 2, seed: int = 0, inner: int = 88, **kwargs: Any) -> Path:
    """A tiny random checkpoint; `raw` adds config fields (`z_loss_weight` makes it Baichuan2's)."""
    width = builders.HEAD_DIM * heads
    raw = {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "vocab_size": builders.VOCAB,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "model_max_length": 24,
        **kwargs.pop("raw", {}),
    }
    prefix = "model." if kwargs.pop("prefix", True) else ""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (raw["vocab_size"], width)}
    for i in range(layers):
        layer = f"{prefix}layers.{i}."
        shapes[f"{layer}input_layernorm.weight"] = (width,)
        shapes[f"{layer}self_attn.W_pack.weight"] = (3 * width, width)
        shapes[f"{layer}self_attn.o_proj.weight"] = (width, width)
        shapes[f"{layer}post_attention_layernorm.weight"] = (width,)
        shapes[f"{layer}mlp.gate_proj.weight"] = (inner, width)
        shapes[f"{layer}mlp.up_proj.weight"] = (inner, width)
        shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
    shapes[f"{prefix}norm.weight"] = (width,)
    shapes["lm_head.weight"] = (raw["vocab_size"], width)
    return builders.write(folder, raw, random_tensors(shapes, seed), **kwargs)


def logits(folder: Path, ids: torch.Tensor, mask: torch.Tensor | None = None, single: bool = False) -> torch.Tensor:
    """Float64 logits [batch, tokens, vocab] of ids [batch, tokens]; mask 0 hides a token."""
    raw, state = read(folder)
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    heads, width, eps = raw["num_attention_heads"], raw["hidden_size"], raw.get("rms_norm_eps", 1e-6)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return rms(x, state[f"{name}.weight"], eps)

    def text(tokens: torch.Tensor) -> torch.Tensor:
        x = state["embed_tokens.weight"][tokens]
        for i in range(raw["num_hidden_layers"]):
            layer = f"layers.{i}."
            packed = norm(x, f"{layer}input_layernorm") @ state[f"{layer}self_attn.W_pack.weight"].T
            q, k, v = (packed[:, part * width : (part + 1) * width].view(len(tokens), heads, -1) for part in range(3))
            attended = attend(q, k, v, alibi(heads, single))
            x = x + attended @ state[f"{layer}self_attn.o_proj.weight"].T
            y = norm(x, f"{layer}post_attention_layernorm")
            gate, up = (y @ state[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (silu(gate) * up) @ state[f"{layer}mlp.down_proj.weight"].T
        head = state["lm_head.weight"]
        if raw["vocab_size"] == 125696 or "z_loss_weight" in raw:
            head = head / head.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
        return norm(x, "norm") @ head.T

    return by_row(text, ids, mask)


def rounded_bias(heads: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """What upstream adds to every query's scores, in the model's dtype, [heads, length]: slope times column.

    Slopes are the paper's list in Python's floats, rounded to float32; so is the product; then comes the dtype.
    """
    slopes = torch.tensor([slope(head, heads) for head in range(heads)], dtype=torch.float32)
    return (slopes[:, None] * torch.arange(length)).to(dtype)
