"""MosaicGPT and Replit-code-v1 in float64 from files and formulas alone; no code of the package is in it.

Attention and projections are those of `foundry`; names, config.json and slopes are older.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.builders import HEAD_DIM, VOCAB
from tests.references.foundry import activation, attend, linear, norm, read
from tests.references.random_weights import write_random

CLASSES = {"mosaic_gpt": "MosaicGPT", "replit_lm": "ReplitLM"}


def write(
    folder: Path, heads: int = 6, *, layers: int = 2, family: str = "mosaic_gpt", raw: dict | None = None, **how: Any
) -> Path:
    """A checkpoint of `family`, "mosaic_gpt" or "replit_lm", with the fields that a published config.json has."""
    fields = {
        "model_type": family,
        "architectures": [CLASSES[family]],
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_clip_qkv": None,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_qk_ln": True,
        "attn_uses_sequence_id": False,
        "d_model": HEAD_DIM * heads,
        "emb_init_std": None,
        "emb_init_uniform_lim": None,
        "emb_pdrop": 0,
        "embedding_fraction": 1.0,
        "fan_mode": "fan_in",
        "init_device": "cpu",
        "init_div_is_residual": True,
        "init_gain": 0,
        "init_nonlinearity": "relu",
        "init_std": 0.02,
        "logit_scale": None,
        "low_precision_layernorm": True,
        "max_seq_len": 32,
        "mlp_ratio": 4,
        "n_heads": heads,
        "n_layers": layers,
        "no_bias": True,
        "param_init_fn": "kaiming_normal_",
        "prefix_lm": False,
        "resid_pdrop": 0,
        "softmax_scale": None,
        "tokenizer_name": "EleutherAI/gpt-neox-20b",
        "use_cache": False,
        "verbose": 0,
        "vocab_size": VOCAB,
        **(raw or {}),
    }
    return write_random(folder, fields, shapes(fields), **how)


def shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that upstream has for a config, with its shape."""
    width, inner, biases = raw["d_model"], raw["d_model"] * raw["mlp_ratio"], not raw["no_bias"]
    sizes = {"transformer.wte.weight": (raw["vocab_size"], width), "transformer.ln_f.weight": (width,)}
    for layer in range(raw["n_layers"]):
        block = f"transformer.blocks.{layer}"
        sizes |= {f"{block}.ln_{number}.weight": (width,) for number in (1, 2)}
        sizes |= {f"{block}.attn.Wqkv.weight": (3 * width, width), f"{block}.attn.out_proj.weight": (width, width)}
        sizes |= {f"{block}.mlp.mlp_up.weight": (inner, width), f"{block}.mlp.mlp_down.weight": (width, inner)}
        if raw["attn_qk_ln"]:
            sizes |= {f"{block}.attn.{part}_ln.weight": (width,) for part in "qk"}
    if biases:
        biased = [name for name in sizes if "wte" not in name]
        sizes |= {name.removesuffix("weight") + "bias": sizes[name][:1] for name in biased}
    return sizes


def logits(folder: Path, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Float64 logits [batch, tokens, vocab]; ids and mask are [batch, tokens], mask 1 for a token."""
    raw, held = read(folder)
    heads, width = raw["n_heads"], raw["d_model"]
    how = {
        "heads": heads,
        "kv_heads": heads,
        "scale": raw["softmax_scale"] or (width / heads) ** -0.5,
        "slopes": [2.0 ** (-raw["alibi_bias_max"] * (head + 1) / heads) for head in range(heads)],
        "clip": raw["attn_clip_qkv"],
        "cap": None,
        "qk_norm": "full" if raw["attn_qk_ln"] else None,
        "rms": False,
        "eps": 1e-5,
    }
    gelu = activation({"name": "gelu"})
    x = held["transformer.wte.weight"][ids]
    for layer in range(raw["n_layers"]):
        block = f"transformer.blocks.{layer}"
        x = x + attend(held, f"{block}.attn", norm(held, f"{block}.ln_1", x, how), mask, how)
        up = linear(held, f"{block}.mlp.mlp_up", norm(held, f"{block}.ln_2", x, how))
        x = x + linear(held, f"{block}.mlp.mlp_down", gelu(up))
    found = norm(held, "transformer.ln_f", x, how) @ held["transformer.wte.weight"].T
    scale = raw["logit_scale"]
    return found * {None: 1.0, "inv_sqrt_d_model": width**-0.5}.get(scale, scale)
