"""Refact from its formulas, in float64; no code of the package is in it.

Source of the formulas: smallcloudai, `modeling_gpt_refact.py` of Refact-1_6B-fim.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import torch

from tests import builders
from tests.references.parts import State, alibi, attend, by_row, layer_norm, read, silu
from tests.references.random_weights import random_tensors


def write(
    folder: Path, heads: int = 6, *, layers: int = 2, seed: int = 0, released: bool = True, **kwargs: Any
) -> Path:
    """A tiny random checkpoint, with the tensor names of the release or of before; `raw` adds config fields."""
    width = builders.HEAD_DIM * heads
    raw = {
        "model_type": "gpt_refact",
        "architectures": ["GPTRefactForCausalLM"],
        "vocab_size": builders.VOCAB,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 24,
        **kwargs.pop("raw", {}),
    }
    inner = 256 * ceil(int(2 * (raw.get("n_inner") or 4 * width) / 3) / 256)
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (builders.VOCAB, width)}
    for i in range(layers):
        layer = f"transformer.h.{i}."
        shapes[f"{layer}ln_1.weight"] = (width,)
        shapes[f"{layer}attn.q.weight"] = (width, width)
        shapes[f"{layer}attn.kv.weight"] = (2 * builders.HEAD_DIM, width)
        shapes[f"{layer}attn.c_proj.weight"] = (width, width)
        shapes[f"{layer}ln_2.weight"] = (width,)
        shapes[f"{layer}mlp.gate_up_proj.weight"] = (2 * inner, width)
        shapes[f"{layer}mlp.c_proj.weight"] = (width, inner)
    shapes["ln_f.weight"] = (width,)
    shapes["lm_head.weight"] = (builders.VOCAB, width)
    state = random_tensors(shapes, seed)
    return builders.write(folder, raw, state if released else older(state), **kwargs)


def older(state: State) -> State:
    """The same weights under the names from before the release."""
    apart = {"attn.kv": ("attn.k", "attn.v"), "mlp.gate_up_proj": ("mlp.linear_1", "mlp.linear_3")}
    found: State = {}
    for name, tensor in state.items():
        fused = next((fused for fused in apart if fused in name), None)
        if fused is None:
            found[name] = tensor
            continue
        for part, rows in zip(apart[fused], tensor.chunk(2), strict=True):
            found[name.replace(fused, part)] = rows
    return found


def logits(folder: Path, ids: torch.Tensor, mask: torch.Tensor | None = None, single: bool = False) -> torch.Tensor:
    """Float64 logits [batch, tokens, vocab] of ids [batch, tokens]; mask 0 hides a token. Release names only."""
    raw, state = read(folder)
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    heads, eps = raw["n_head"], raw.get("layer_norm_epsilon", 1e-5)
    dim = raw["n_embd"] // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(x, state[f"{name}.weight"], eps)

    def text(tokens: torch.Tensor) -> torch.Tensor:
        x = state["wte.weight"][tokens]
        for i in range(raw["n_layer"]):
            layer = f"h.{i}."
            y = norm(x, f"{layer}ln_1")
            q, kv = y @ state[f"{layer}attn.q.weight"].T, y @ state[f"{layer}attn.kv.weight"].T
            q, k, v = q.view(len(tokens), heads, dim), kv[:, None, :dim], kv[:, None, dim:]
            attended = attend(q, k, v, alibi(heads, single))
            x = x + attended @ state[f"{layer}attn.c_proj.weight"].T
            both = norm(x, f"{layer}ln_2") @ state[f"{layer}mlp.gate_up_proj.weight"].T
            half = both.shape[-1] // 2
            x = x + (silu(both[:, :half]) * both[:, half:]) @ state[f"{layer}mlp.c_proj.weight"].T
        return norm(x, "ln_f") @ state["lm_head.weight"].T

    return by_row(text, ids, mask)
