"""Step1 from its formulas, in float64; no code of the package is in it.

Source of the formulas: stepfun-ai, `modeling_step1.py` of Step-Audio-TTS-3B.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import builders
from tests.references.parts import alibi, attend, by_row, read, rms, silu
from tests.references.random_weights import random_tensors


def write(
    folder: Path, heads: int = 6, *, groups: int = 1, layers: int = 2, seed: int = 0, inner: int = 88, **kwargs: Any
) -> Path:
    """A tiny random checkpoint with `groups` key/value heads; `raw` adds config fields."""
    width = builders.HEAD_DIM * heads
    raw = {
        "model_type": "step1",
        "architectures": ["Step1ForCausalLM"],
        "vocab_size": builders.VOCAB,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_attention_groups": groups,
        "max_seq_len": 24,
        **kwargs.pop("raw", {}),
    }
    prefix = "model." if kwargs.pop("prefix", True) else ""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (builders.VOCAB, width)}
    for i in range(layers):
        layer = f"{prefix}layers.{i}."
        shapes[f"{layer}input_layernorm.weight"] = (width,)
        shapes[f"{layer}self_attn.q_proj.weight"] = (width, width)
        shapes[f"{layer}self_attn.k_proj.weight"] = (groups * builders.HEAD_DIM, width)
        shapes[f"{layer}self_attn.v_proj.weight"] = (groups * builders.HEAD_DIM, width)
        shapes[f"{layer}self_attn.o_proj.weight"] = (width, width)
        shapes[f"{layer}post_attention_layernorm.weight"] = (width,)
        shapes[f"{layer}mlp.gate_proj.weight"] = (inner, width)
        shapes[f"{layer}mlp.up_proj.weight"] = (inner, width)
        shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
    shapes[f"{prefix}norm.weight"] = (width,)
    if not raw.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (builders.VOCAB, width)
    return builders.write(folder, raw, random_tensors(shapes, seed), **kwargs)


def logits(folder: Path, ids: torch.Tensor, mask: torch.Tensor | None = None, single: bool = False) -> torch.Tensor:
    """Float64 logits [batch, tokens, vocab] of ids [batch, tokens]; mask 0 hides a token, which upstream would not."""
    raw, state = read(folder)
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    heads, eps = raw["num_attention_heads"], raw.get("rms_norm_eps", 1e-5)
    dim = raw["hidden_size"] // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return rms(x, state[f"{name}.weight"], eps)

    def text(tokens: torch.Tensor) -> torch.Tensor:
        x = state["embed_tokens.weight"][tokens]
        for i in range(raw["num_hidden_layers"]):
            layer = f"layers.{i}."
            y = norm(x, f"{layer}input_layernorm")
            q, k, v = (
                (y @ state[f"{layer}self_attn.{name}_proj.weight"].T).view(len(tokens), -1, dim) for name in "qkv"
            )
            attended = attend(q, k, v, alibi(heads, single, root=True))
            x = x + attended @ state[f"{layer}self_attn.o_proj.weight"].T
            y = norm(x, f"{layer}post_attention_layernorm")
            gate, up = (y @ state[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (silu(gate) * up) @ state[f"{layer}mlp.down_proj.weight"].T
        return norm(x, "norm") @ state["embed_tokens.weight" if raw.get("tie_word_embeddings") else "lm_head.weight"].T

    return by_row(text, ids, mask)
