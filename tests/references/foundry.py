"""llm-foundry's MPT in float64 from files and formulas alone; no code of the package is in it.

`write` makes a tiny random checkpoint in any of llm-foundry's layouts; `logits` reads files and config.json back and
computes what llm-foundry would: one head at a time, one loop a formula. Older code has a module of its own, `mosaic`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.builders import HEAD_DIM, VOCAB
from tests.references.random_weights import write_random

ATTENTION = {"alibi": True, "attn_type": "multihead_attention"}


def write(
    folder: Path,
    heads: int = 6,
    *,
    layers: int = 2,
    attn_config: dict | None = None,
    raw: dict | None = None,
    **how: Any,
) -> Path:
    """A checkpoint as `MPTForCausalLM` writes it; `raw` and `attn_config` hold any fields of its config.

    `how` goes on to `write_random`: seed, shards, dtype, and `start`, what every name begins with.
    """
    fields = {
        "model_type": "mpt",
        "architectures": ["MPTForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
        "vocab_size": VOCAB,
        "d_model": HEAD_DIM * heads,
        "n_layers": layers,
        "n_heads": heads,
        "max_seq_len": 32,
        "no_bias": True,
        "attn_config": {**ATTENTION, **(attn_config or {})},
        **(raw or {}),
    }
    return write_random(folder, fields, shapes(fields), **how)


def shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that llm-foundry has for a config, with its shape."""
    attention, ffn = raw["attn_config"], raw.get("ffn_config") or {}
    width, inner = raw["d_model"], ffn.get("ffn_hidden_size") or int(raw["d_model"] * raw.get("expansion_ratio", 4))
    heads, kv_heads, dim = head_sizes(raw)
    biases = not raw.get("no_bias", False)
    qkv_bias = biases if raw.get("attention_bias") is None else raw["attention_bias"]
    norm_bias = biases and "rms" not in raw.get("norm_type", "low_precision_layernorm")
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (raw["vocab_size"], width)}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        found[f"{name}.weight"] = (rows, columns)
        if bias:
            found[f"{name}.bias"] = (rows,)

    def norm(name: str, size: int) -> None:
        found[f"{name}.weight"] = (size,)
        if norm_bias:
            found[f"{name}.bias"] = (size,)

    for layer in range(raw["n_layers"]):
        block = f"transformer.blocks.{layer}"
        part = f"{block}.norm_attn_norm" if raw.get("fuse_norm_attn_norm") else block
        sizes = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * dim}
        norm(f"{part}.norm_1", width), norm(f"{part}.norm_2", width)
        for name, rows in sizes.items() if attention.get("fused_qkv") is False else [("qkv", sum(sizes.values()))]:
            linear(f"{part}.attn.W{name}", rows, width, qkv_bias)
        linear(f"{part}.attn.out_proj", width, heads * dim, biases)
        for name in "qk" if attention.get("qk_ln") or attention.get("qk_gn") else "":
            norm(f"{part}.attn.{name}_ln", sizes[name] if attention.get("qk_ln") else dim)
        for name in ("up_proj", "gate_proj") if ffn.get("ffn_type") == "mptglu" else ("up_proj",):
            linear(f"{block}.ffn.{name}", inner, width, biases)
        linear(f"{block}.ffn.down_proj", width, inner, biases)
    norm("transformer.norm_f", width)
    if raw.get("tie_word_embeddings") is False:
        linear("lm_head", raw["vocab_size"], width, False)
    return found


def head_sizes(raw: dict[str, Any]) -> tuple[int, int, int]:
    """Query heads, key/value heads and the width of a head."""
    attention, heads = raw["attn_config"], raw["n_heads"]
    kind = attention.get("attn_type", "multihead_attention")
    kv_heads = {"multihead_attention": heads, "multiquery_attention": 1}.get(kind) or attention["kv_n_heads"]
    return heads, kv_heads, raw.get("head_dim") or raw["d_model"] // heads


def slope(head: int, heads: int, bias_max: float) -> float:
    """llm-foundry's slope of head 0, 1, ...: of the next power of two, every second one first."""
    power = 2 ** math.ceil(math.log2(heads))
    places = range(1, power + 1)
    order = list(places) if power == heads else [*places[1::2], *places[0::2]]
    return 2.0 ** (-bias_max * order[head] / power)


def logits(folder: Path, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Float64 logits [batch, tokens, vocab]; ids and mask are [batch, tokens], mask 1 for a token."""
    raw, held = read(folder)
    attention = raw["attn_config"]
    heads, kv_heads, _ = head_sizes(raw)
    how = {
        "heads": heads,
        "kv_heads": kv_heads,
        "scale": attention.get("softmax_scale") or (raw["d_model"] / heads) ** -0.5,
        "slopes": [slope(head, heads, attention.get("alibi_bias_max", 8)) for head in range(heads)],
        "clip": attention.get("clip_qkv"),
        "cap": attention.get("attn_logit_softcapping"),
        "qk_norm": "full" if attention.get("qk_ln") else "head" if attention.get("qk_gn") else None,
        "rms": "rms" in raw.get("norm_type", "low_precision_layernorm"),
        "eps": raw.get("norm_eps", 1e-5),
    }
    act = activation((raw.get("ffn_config") or {}).get("ffn_act_fn") or {"name": "gelu"})
    x = held["transformer.wte.weight"][ids]
    for layer in range(raw["n_layers"]):
        block = f"transformer.blocks.{layer}"
        part = f"{block}.norm_attn_norm" if raw.get("fuse_norm_attn_norm") else block
        x = x + attend(held, f"{part}.attn", norm(held, f"{part}.norm_1", x, how), mask, how)
        x = x + mlp(held, f"{block}.ffn", norm(held, f"{part}.norm_2", x, how), act)
    x = norm(held, "transformer.norm_f", x, how)
    found = x @ held.get("lm_head.weight", held["transformer.wte.weight"]).T
    scale = raw.get("logit_scale")
    found = found * {None: 1.0, "inv_sqrt_d_model": raw["d_model"] ** -0.5}.get(scale, scale)
    return capped(found, raw.get("final_logit_softcapping"))


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json, and every tensor in float64 under its name from `transformer.` or `lm_head.` on."""
    held = {name: tensor.double() for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    held = {name.removeprefix("model.").removeprefix("transformer."): tensor for name, tensor in held.items()}
    own = {name if name.startswith("lm_head.") else f"transformer.{name}": tensor for name, tensor in held.items()}
    return json.loads((folder / "config.json").read_text()), own


def norm(held: dict[str, torch.Tensor], name: str, x: torch.Tensor, how: dict[str, Any]) -> torch.Tensor:
    """Layer norm, or root-mean-square norm with `rms`."""
    if not how["rms"]:
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + how["eps"]) * held[f"{name}.weight"]
    return x + held.get(f"{name}.bias", 0.0)


def linear(held: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """x W^T, plus the bias where there is one."""
    return x @ held[f"{name}.weight"].T + held.get(f"{name}.bias", 0.0)


def attend(
    held: dict[str, torch.Tensor], name: str, x: torch.Tensor, mask: torch.Tensor | None, how: dict[str, Any]
) -> torch.Tensor:
    """Causal attention; the bias of a key is slope times its column, counted back from the last."""
    parts = project(held, name, x, how)
    tokens = x.shape[1]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[None]
    if mask is not None:
        hidden = hidden | (mask == 0)[:, None, :]
    columns = torch.arange(tokens, dtype=torch.float64) - (tokens - 1)
    outputs = []
    for head in range(how["heads"]):
        q, k, v = parts[0][head], *(part[head * how["kv_heads"] // how["heads"]] for part in parts[1:])
        scores = capped(how["scale"] * q @ k.transpose(1, 2), how["cap"]) + how["slopes"][head] * columns
        outputs.append(scores.masked_fill(hidden, -1e300).softmax(-1) @ v)
    return linear(held, f"{name}.out_proj", torch.cat(outputs, -1))


def project(held: dict[str, torch.Tensor], name: str, x: torch.Tensor, how: dict[str, Any]) -> list[list[torch.Tensor]]:
    """Queries, keys and values, a list of heads each: clamped, then normalised, over all heads or head by head."""
    heads, kv_heads = how["heads"], how["kv_heads"]
    if f"{name}.Wqkv.weight" in held:
        fused = linear(held, f"{name}.Wqkv", x)
        width = fused.shape[-1] // (heads + 2 * kv_heads)
        parts = list(fused.split([heads * width, kv_heads * width, kv_heads * width], -1))
    else:
        parts = [linear(held, f"{name}.W{part}", x) for part in "qkv"]
    if how["clip"]:
        parts = [part.clamp(-how["clip"], how["clip"]) for part in parts]
    if how["qk_norm"] == "full":
        parts[:2] = [norm(held, f"{name}.{part}_ln", parts[i], how) for i, part in enumerate("qk")]
    found = [list(part.chunk(count, -1)) for part, count in zip(parts, (heads, kv_heads, kv_heads), strict=True)]
    if how["qk_norm"] == "head":
        for i, part in enumerate("qk"):
            found[i] = [norm(held, f"{name}.{part}_ln", head, how) for head in found[i]]
    return found


def mlp(held: dict[str, torch.Tensor], name: str, x: torch.Tensor, act: Any) -> torch.Tensor:
    """down(act(up)), or down(act(gate) * up)."""
    up = linear(held, f"{name}.up_proj", x)
    gated = f"{name}.gate_proj.weight" in held
    return linear(held, f"{name}.down_proj", act(linear(held, f"{name}.gate_proj", x)) * up if gated else act(up))


def activation(spec: dict[str, Any]) -> Any:
    """The activation of an `ffn_act_fn`, from its formula."""
    tanh_gelu = math.sqrt(2 / math.pi)
    known = {
        ("gelu", "none"): lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        ("gelu", "tanh"): lambda x: 0.5 * x * (1 + torch.tanh(tanh_gelu * (x + 0.044715 * x**3))),
        ("silu", "none"): lambda x: x / (1 + torch.exp(-x)),
        ("relu", "none"): lambda x: x.clamp(min=0),
        ("quick_gelu", "none"): lambda x: x / (1 + torch.exp(-1.702 * x)),
    }
    return known[spec["name"], spec.get("approximate", "none")]


def capped(x: torch.Tensor, limit: float | None) -> torch.Tensor:
    """limit * tanh(x / limit), or x where there is no limit."""
    return x if limit is None else limit * torch.tanh(x / limit)
