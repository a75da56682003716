"""BTLM and Jais in float64, from the formulas alone: one row, one head at a time; no code of the package is in it.

Upstream adds `-slope / scale * |j - i|` to the scores, the scale being 1, a fixed factor, or the number of keys of the
call over the training length. With the latter a text read in several calls is another computation than the whole text:
`calls` says how many tokens each call reads.

The package forms slopes and bias in float32 on purpose. With `single=True` they are rounded to float32 here too, so
that everything else can be compared at float64's own precision; with `single=False` nothing is rounded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import builders

State = Mapping[str, torch.Tensor]
HEAD_DIM = builders.HEAD_DIM
CLASSES = {"btlm": "BTLMLMHeadModel", "jais": "JAISLMHeadModel"}
MUP = {"mup_width_scale": 0.1, "mup_output_alpha": 2.22, "mup_embeddings_scale": 14.6, "mup_scale_qk_dot_by_d": True}
OLD_MUP = {"width_scale": 0.222, "embeddings_scale": 14.6, "scale_qk_dot_by_d": True}


def paper_slopes(heads: int) -> list[float]:
    """Return the paper's slopes: a geometric list, then every other entry of the list for twice as many heads."""
    if math.log2(heads).is_integer():
        ratio = 2.0 ** (-8 / heads)
        return [ratio ** (i + 1) for i in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return paper_slopes(below) + paper_slopes(2 * below)[0::2][: heads - below]


def write(
    folder: Path,
    heads: int = 6,
    *,
    family: str = "btlm",
    layers: int = 2,
    length: int = 64,
    seed: int = 0,
    slopes: torch.Tensor | None = None,
    stored: bool = True,
    buffers: bool = True,
    raw: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Path:
    """Write a tiny random checkpoint in upstream's layout, muP in the newer names unless `raw` says otherwise.

    Args:
        slopes: `[heads]` or `[heads, 1]`, the paper's if not given; `stored` False leaves them out.
        buffers: with the causal masks that upstream's older files hold.
        raw: fields of config.json; None takes a field out.
        kwargs: of `builders.write`: shards, prefix, dtype.
    """
    config = {
        "model_type": family,
        "architectures": [CLASSES[family]],
        "vocab_size": builders.VOCAB,
        "n_embd": HEAD_DIM * heads,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": 3 * HEAD_DIM * heads - 3,
        "n_positions": length,
        "activation_function": "swiglu",
        "position_embedding_type": "alibi",
        **dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0),
        **dict.fromkeys(["bos_token_id", "eos_token_id"], 0),
        **MUP,
        **(raw or {}),
    }
    config = {name: value for name, value in config.items() if value is not None}
    tensors = _weights(config, torch.Generator().manual_seed(seed))
    if stored:
        tensors["transformer.relative_pe.slopes"] = (
            torch.tensor(paper_slopes(heads)).unsqueeze(-1) if slopes is None else slopes
        )
    for layer in range(layers if buffers else 0):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, length, length).tril()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return builders.write(folder, config, tensors, **kwargs)


def _weights(config: Mapping[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
    width = config["n_embd"]
    inner = config.get("n_inner", 4 * width)
    linear = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width), "mlp.c_fc": (width, inner)}
    if config["activation_function"] == "swiglu":
        linear["mlp.c_fc2"] = (width, inner)
    linear["mlp.c_proj"] = (inner, width)
    held = {"transformer.wte.weight": torch.randn(config["vocab_size"], width, generator=generator) * 1.5 / width**0.5}
    norms = ["transformer.ln_f"]
    for layer in range(config["n_layer"]):
        name = f"transformer.h.{layer}"
        norms += [f"{name}.ln_1", f"{name}.ln_2"]
        for part, shape in linear.items():
            held[f"{name}.{part}.weight"] = torch.randn(shape, generator=generator) * 1.5 / shape[0] ** 0.5
            held[f"{name}.{part}.bias"] = 0.1 * torch.randn(shape[1], generator=generator)
    for name in norms:
        held[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        held[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)
    if not config.get("tie_word_embeddings", True):
        held["lm_head.weight"] = torch.randn(config["vocab_size"], width, generator=generator) * 1.5 / width**0.5
    return held


def read(folder: Path) -> tuple[dict[str, Any], State]:
    """Return config.json and every tensor as it is stored, by its name without `transformer.`."""
    state = {
        name.removeprefix("transformer."): tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return json.loads((folder / "config.json").read_text()), state


def logits(
    folder: Path,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    calls: Sequence[int] | None = None,
    single: bool = True,
    slope_factor: float = 1.0,
) -> torch.Tensor:
    """Return the logits `[batch, tokens, vocab]` of ids `[batch, tokens]`, float64; zero where `mask` is.

    Args:
        mask: `[batch, tokens]`, 1 for a token; each row is read as if the others were not there.
        calls: tokens of each call, all in one if not given.
        slope_factor: a wrong factor on the slopes, for tests that have to fail.
    """
    raw, stored = read(folder)
    state = {name: tensor.double() for name, tensor in stored.items()}
    slopes = state.get("relative_pe.slopes", torch.tensor(paper_slopes(raw["n_head"]), dtype=torch.float64)).flatten()
    state["relative_pe.slopes"] = slopes * slope_factor
    result = torch.zeros(*ids.shape, raw["vocab_size"], dtype=torch.float64)
    for row, tokens in enumerate(ids):
        kept = torch.ones_like(tokens).bool() if mask is None else mask[row].bool()
        result[row, kept] = _row(raw, state, tokens[kept], calls or [int(kept.sum())], single)
    return result


def _row(
    raw: Mapping[str, Any], state: State, tokens: torch.Tensor, calls: Sequence[int], single: bool
) -> torch.Tensor:
    """Return the logits `[tokens, vocab]` of one row, read in several calls; keys and values are kept between them."""
    caches = [(torch.zeros(0, raw["n_embd"]).double(), torch.zeros(0, raw["n_embd"]).double())] * raw["n_layer"]
    found = []
    for part in tokens.split(list(calls)):
        x = state["wte.weight"][part] * raw.get("embeddings_scale", raw.get("mup_embeddings_scale", 1.0))
        for layer in range(raw["n_layer"]):
            attended, caches[layer] = _attend(raw, state, f"h.{layer}", _norm(raw, state, f"h.{layer}.ln_1", x),
                                              caches[layer], single)  # fmt: skip
            x = x + attended
            x = x + _mlp(raw, state, f"h.{layer}.mlp", _norm(raw, state, f"h.{layer}.ln_2", x))
        head = state["wte.weight" if raw.get("tie_word_embeddings", True) else "lm_head.weight"]
        product = raw.get("mup_output_alpha", 1.0) * raw.get("mup_width_scale", 1.0)
        found.append(_norm(raw, state, "ln_f", x) @ head.T * raw.get("width_scale", product))
    return torch.cat(found)


def _attend(
    raw: Mapping[str, Any],
    state: State,
    name: str,
    x: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    single: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return the attention output `[queries, width]`, and the keys and values of all tokens so far."""
    fused, width = _linear(state, f"{name}.attn.c_attn", x), raw["n_embd"]
    q = fused[:, :width]
    k, v = torch.cat([cache[0], fused[:, width : 2 * width]]), torch.cat([cache[1], fused[:, 2 * width :]])
    queries, keys, dim = len(q), len(k), width // raw["n_head"]
    power = 1.0 if raw.get("scale_qk_dot_by_d", raw.get("mup_scale_qk_dot_by_d", False)) else 0.5
    divisor = dim**power if raw.get("scale_attn_weights", True) else 1.0
    future = torch.ones(queries, keys).triu(keys - queries + 1).bool()
    outputs = []
    for head in range(raw["n_head"]):
        own = slice(head * dim, (head + 1) * dim)
        scores = q[:, own] @ k[:, own].T / divisor + _bias(
            raw, state["relative_pe.slopes"][head], queries, keys, single
        )
        outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, own])
    return _linear(state, f"{name}.attn.c_proj", torch.cat(outputs, dim=1)), (k, v)


def _bias(raw: Mapping[str, Any], slope: torch.Tensor, queries: int, keys: int, single: bool) -> torch.Tensor:
    """Return the bias of one head `[queries, keys]`; the last query is the last key."""

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.float().double() if single else value

    slope = rounded(slope)
    if (scale := _scale(raw, keys)) != 1.0:
        slope = rounded(slope / rounded(torch.tensor(scale, dtype=torch.float64)))
    i, j = torch.arange(keys - queries, keys).double()[:, None], torch.arange(keys).double()[None]
    return -rounded(slope * (i - j).abs())


def _scale(raw: Mapping[str, Any], keys: int) -> float:
    scaling = raw.get("alibi_scaling") or {}
    if "train_seq_len" in scaling:
        return max(1.0, keys / scaling["train_seq_len"])
    return scaling.get("factor", 1.0)


def upstream_bias(folder: Path, queries: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the bias that upstream's code forms in a model of `dtype`, `[heads, queries, keys]`.

    The slopes are a parameter of the model, so of its dtype; dividing and multiplying keep it.
    """
    raw, state = read(folder)
    slopes = state["relative_pe.slopes"].view(-1, 1).to(dtype)
    i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
    return (slopes / -_scale(raw, keys)).unsqueeze(1) * (j - i).abs()


def _mlp(raw: Mapping[str, Any], state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    up = _linear(state, f"{name}.c_fc", x)
    if raw["activation_function"] == "swiglu":
        gate = _linear(state, f"{name}.c_fc2", x)
        return _linear(state, f"{name}.c_proj", up * gate / (1 + torch.exp(-gate)))
    if raw["activation_function"] == "relu":
        return _linear(state, f"{name}.c_proj", up.clamp(min=0))
    assert raw["activation_function"] == "gelu_new"
    inner = math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)
    return _linear(state, f"{name}.c_proj", 0.5 * up * (1 + torch.tanh(inner)))


def _linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ state[f"{name}.weight"] + state[f"{name}.bias"]


def _norm(raw: Mapping[str, Any], state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + raw.get("layer_norm_epsilon", 1e-5))
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]
