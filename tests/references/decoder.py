"""A plain float64 decoder, written from the formulas to be obviously right; no code of the package is in it.

One document at a time, one head at a time, no cache, no mask, no batch. Whatever way the package is fed, each document
has to give these logits. Where slopes are divided by the length of the call, a query has the length at the end of the
call that reads it; what it computes is then kept for the calls after, so that one pass says what a cache would.

The package forms slope, distance and their product in float32 on purpose. With `single=True` each of those three is
rounded to float32 here too, so that everything else can be compared at float64's own precision; with `single=False`
nothing is rounded. Nothing of the other positions is rounded either: a float64 model turns by float64 angles, and the
cases have frequencies of RoPE that float32 holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

State = Mapping[str, torch.Tensor]
Fields = Mapping[str, Any]


@dataclasses.dataclass
class Decoded:
    """Logits `[tokens, vocab]`, last hidden state, and each layer's attention output and weights `[heads, i, j]`."""

    logits: torch.Tensor
    hidden: torch.Tensor
    attention: list[torch.Tensor]
    weights: list[torch.Tensor]


def paper_slopes(heads: int, bias_max: float = 8.0) -> list[float]:
    """Return the paper's slopes: a geometric list, then every other entry of the list for twice as many heads."""
    if math.log2(heads).is_integer():
        ratio = 2.0 ** (-bias_max / heads)
        return [ratio ** (i + 1) for i in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return paper_slopes(below, bias_max) + paper_slopes(2 * below, bias_max)[0::2][: heads - below]


def decode(
    state: State, fields: Fields, tokens: torch.Tensor, single: bool = True, calls: Sequence[int] = ()
) -> Decoded:
    """Return what the decoder computes for the one document `tokens`, int64 `[tokens]`, all in float64.

    Args:
        state: the state dict of an `AlibiForCausalLM`, in any dtype.
        fields: the fields of its config.
        single: round slope, distance and their product to float32.
        calls: tokens that each call reads; all of them are read in one if empty.
    """
    calls = calls or [len(tokens)]
    assert sum(calls) == len(tokens)
    ends = [sum(calls[: number + 1]) for number, size in enumerate(calls) for _ in range(size)]
    x = state["model.embed_tokens.weight"].double()[tokens]
    if fields["embedding_scale"] is not None:
        x = x * fields["embedding_scale"]
    if fields["learned_positions"]:
        x = x + state["model.embed_positions.weight"].double()[: len(tokens)]
    if fields["sinusoidal_positions"]:
        x = x + sinusoids(len(tokens), x.shape[1])
    if fields["embedding_norm"]:
        x = norm(state, fields, "model.embed_norm", x)
    attention, weights = [], []
    for layer in range(fields["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        normed = norm(state, fields, f"{name}.input_layernorm", x)
        attended, layer_weights = attend(state, fields, f"{name}.self_attn", normed, single, ends)
        x = (normed if fields["residual_from_norm"] else x) + attended
        normed = norm(state, fields, f"{name}.post_attention_layernorm", x)
        x = (normed if fields["residual_from_norm"] else x) + mlp(state, fields, f"{name}.mlp", normed)
        attention.append(attended)
        weights.append(layer_weights)
    hidden = norm(state, fields, "model.norm", x)
    head = "model.embed_tokens.weight" if fields["tie_word_embeddings"] else "lm_head.weight"
    logits = hidden @ state[head].double().T
    if fields["logit_scale"] is not None:
        logits = logits * fields["logit_scale"]
    return Decoded(cap(logits, fields["final_logit_softcapping"]), hidden, attention, weights)


def attend(
    state: State, fields: Fields, name: str, x: torch.Tensor, single: bool, ends: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention output `[tokens, hidden]` and the weights `[heads, tokens, tokens]`."""
    heads, groups, dim = fields["num_attention_heads"], fields["num_key_value_heads"], fields["head_dim"]
    q, k, v = (linear(state, f"{name}.{part}_proj", x) for part in "qkv")
    if fields["clip_qkv"] is not None:
        limit = fields["clip_qkv"]
        q, k, v = (states.clamp(-limit, limit) for states in (q, k, v))
    if fields["qk_norm"] == "full":
        q, k = norm(state, fields, f"{name}.q_norm", q), norm(state, fields, f"{name}.k_norm", k)
    q, k, v = q.view(-1, heads, dim), k.view(-1, groups, dim), v.view(-1, groups, dim)
    if fields["qk_norm"] == "head":
        q, k = norm(state, fields, f"{name}.q_norm", q), norm(state, fields, f"{name}.k_norm", k)
    if fields["rope_parameters"] is not None:
        q, k = rotated(fields["rope_parameters"], q), rotated(fields["rope_parameters"], k)
    scale = fields["attention_scale"] if fields["attention_scale"] is not None else 1 / math.sqrt(dim)
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    outputs, all_weights = [], []
    for head in range(heads):
        group = head // (heads // groups)
        scores = cap(scale * q[:, head] @ k[:, group].T, fields["attn_logit_softcapping"])
        scores = scores + bias(fields, head, ends, single)
        all_weights.append(scores.masked_fill(future, -torch.inf).softmax(-1))
        outputs.append(all_weights[-1] @ v[:, group])
    return linear(state, f"{name}.o_proj", torch.cat(outputs, dim=-1)), torch.stack(all_weights)


def sinusoids(tokens: int, width: int) -> torch.Tensor:
    """Return the paper's sinusoidal embeddings `[tokens, width]`, number by number."""
    table = [
        [(math.cos if i % 2 else math.sin)(position / 10000 ** ((i - i % 2) / width)) for i in range(width)]
        for position in range(tokens)
    ]
    return torch.tensor(table, dtype=torch.float64)


def rotated(rope: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    """Return queries or keys `[tokens, heads, dim]`, features i and i + d / 2 of the first d taken as complex numbers.

    The number of token n and feature i is multiplied by exp(sqrt(-1) n theta^(-2i / d)), n over `factor` if linear.
    """
    assert rope["rope_type"] in ("default", "linear"), rope
    dim = int(x.shape[2] * rope.get("partial_rotary_factor", 1))
    positions = torch.arange(len(x)).double() / (rope["factor"] if rope["rope_type"] == "linear" else 1)
    angles = positions[:, None] * rope["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim)
    turned = torch.complex(x[..., : dim // 2], x[..., dim // 2 : dim]) * torch.exp(1j * angles)[:, None]
    return torch.cat([turned.real, turned.imag, x[..., dim:]], dim=-1)


def bias(fields: Fields, head: int, ends: Sequence[int], single: bool) -> torch.Tensor:
    """Return what ALiBi adds to the scores of one head, `[tokens, tokens]`: minus slope times (i - j).

    `ends` says for each query how many tokens there are when it is read.
    """
    tokens = len(ends)

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.float().double() if single else value

    i, j = torch.arange(tokens).double()[:, None], torch.arange(tokens).double()[None, :]
    if not fields["alibi"]:
        return torch.zeros(tokens, tokens, dtype=torch.float64)
    distance = (i - j).clamp(min=0)
    if fields["alibi_distance"] == "sqrt":
        distance = rounded(distance.sqrt())
    slopes = fields["alibi_slopes"] or paper_slopes(fields["num_attention_heads"], fields["alibi_bias_max"])
    slope = rounded(torch.tensor(slopes[head], dtype=torch.float64))
    scaling = fields["alibi_scaling"] or {}
    if "factor" in scaling:
        slope = rounded(slope / scaling["factor"])
    if "train_seq_len" in scaling:
        scales = torch.tensor([[max(1.0, end / scaling["train_seq_len"])] for end in ends], dtype=torch.float64)
        slope = rounded(slope / rounded(scales))
    return -rounded(slope * distance)


def mlp(state: State, fields: Fields, name: str, x: torch.Tensor) -> torch.Tensor:
    """Return down(act(up(x))), or down(act(gate(x)) * up(x))."""
    up = linear(state, f"{name}.up_proj", x)
    if fields["mlp_type"] == "gated":
        inner = activation(fields["hidden_act"], linear(state, f"{name}.gate_proj", x)) * up
    else:
        inner = activation(fields["hidden_act"], up)
    return linear(state, f"{name}.down_proj", inner)


def activation(name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the activation, from its formula."""
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "relu":
        return x.clamp(min=0)
    if name == "gelu_pytorch_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert name == "gelu", name
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def norm(state: State, fields: Fields, name: str, x: torch.Tensor) -> torch.Tensor:
    """Return the layer norm or the root-mean-square norm over the last dimension."""
    if fields["norm_type"] == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + fields["norm_eps"]) * state[f"{name}.weight"].double()
    return x + state[f"{name}.bias"].double() if f"{name}.bias" in state else x


def linear(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    """Return x W^T, plus the bias where there is one."""
    x = x @ state[f"{name}.weight"].double().T
    return x + state[f"{name}.bias"].double() if f"{name}.bias" in state else x


def cap(x: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Return limit * tanh(x / limit), or x where there is no limit."""
    return x if limit is None else limit * torch.tanh(x / limit)
