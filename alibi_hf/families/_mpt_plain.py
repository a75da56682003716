"""A plain MPT after llm-foundry's formulas, for checkpoints that Transformers' `MptForCausalLM` does not compute.

Source of the formulas: llm-foundry, `llmfoundry/models/mpt/modeling_mpt.py` and `llmfoundry/models/layers`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from alibi_hf.families._plain import PlainForCausalLM, PlainNorm, at_least_float32, attend, hidden_keys


def plain_slopes(heads: int, bias_max: float, dtype: torch.dtype, device: Any = None) -> Tensor:
    """llm-foundry's slopes, [heads]: those of the next power of two, every second one first."""
    power = 1
    while power < heads:
        power *= 2
    steps = torch.arange(1, power + 1, dtype=dtype, device=device) * (bias_max / power)
    slopes = torch.exp2(-steps)
    if power != heads:
        slopes = torch.cat([slopes[1::2], slopes[0::2]])[:heads]
    return slopes


class PlainAttention(nn.Module):
    """Fused projection, clamp, query/key norm, scores plus bias, softmax, output projection."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.heads, self.kv_heads, self.dim = spec["heads"], spec["kv_heads"], spec["head_dim"]
        rows = {"Wq": self.heads * self.dim, "Wk": self.kv_heads * self.dim, "Wv": self.kv_heads * self.dim}
        for name, size in {"Wqkv": sum(rows.values())}.items() if spec["fused_qkv"] else rows.items():
            self.add_module(name, nn.Linear(spec["width"], size, bias=spec["attention_bias"]))
        self.out_proj = nn.Linear(self.heads * self.dim, spec["width"], bias=spec["attention_out_bias"])
        norm = (spec["norm_type"], spec["norm_eps"], spec["norm_bias"])
        if spec["qk_norm"] == "full":
            self.q_ln = PlainNorm(self.heads * self.dim, *norm)
            self.k_ln = PlainNorm(self.kv_heads * self.dim, *norm)
        elif spec["qk_norm"] == "head":
            self.q_ln, self.k_ln = PlainNorm(self.dim, *norm), PlainNorm(self.dim, *norm)

    def forward(self, x: Tensor, position_bias: Tensor, attention_mask: Tensor) -> Tensor:
        """x [batch, queries, width], bias [heads, 1, keys], mask [batch, 1, queries, keys] true where hidden."""
        spec = self.spec
        names = ["Wqkv"] if spec["fused_qkv"] else ["Wq", "Wk", "Wv"]
        fused = torch.cat([self.get_submodule(name)(x) for name in names], dim=-1)
        if spec["clip_qkv"]:
            fused = fused.clamp(-spec["clip_qkv"], spec["clip_qkv"])
        q, k, v = fused.split([self.heads * self.dim] + [self.kv_heads * self.dim] * 2, dim=-1)
        if spec["qk_norm"] == "full":
            q, k = self.q_ln(q), self.k_ln(k)
        q, k, v = (part.unflatten(-1, (-1, self.dim)) for part in (q, k, v))
        if spec["qk_norm"] == "head":
            q, k = self.q_ln(q), self.k_ln(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        scale, softcap = spec["softmax_scale"], spec["attn_logit_softcapping"]
        return self.out_proj(attend(q, k, v, position_bias, attention_mask, scale, softcap))


class PlainMlp(nn.Module):
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.act = spec["act"]
        self.up_proj = nn.Linear(spec["width"], spec["inner"], bias=spec["mlp_bias"])
        self.down_proj = nn.Linear(spec["inner"], spec["width"], bias=spec["mlp_bias"])
        if spec["gated"]:
            self.gate_proj = nn.Linear(spec["width"], spec["inner"], bias=spec["mlp_bias"])

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        up = self.up_proj(x)
        return self.down_proj(self.act(self.gate_proj(x)) * up if hasattr(self, "gate_proj") else self.act(up))


class PlainBlock(nn.Module):
    """One pre-norm layer; with `fuse_norm_attn_norm` its norms and its attention are in a module of their own."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        norm = (spec["width"], spec["norm_type"], spec["norm_eps"], spec["norm_bias"])
        part: Any = self
        if spec["fused_norms"]:
            part = self.norm_attn_norm = nn.Module()
        part.norm_1, part.norm_2, part.attn = PlainNorm(*norm), PlainNorm(*norm), PlainAttention(spec)
        self.ffn = PlainMlp(spec)

    def forward(self, x: Tensor, position_bias: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, tokens, width] to [batch, tokens, width]."""
        part: Any = getattr(self, "norm_attn_norm", self)
        x = x + part.attn(part.norm_1(x), position_bias=position_bias, attention_mask=attention_mask)
        return x + self.ffn(part.norm_2(x))


class PlainDecoder(nn.Module):
    """Embedding, blocks and the last norm, under upstream's names."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.wte = nn.Embedding(spec["vocab"], spec["width"])
        self.blocks = nn.ModuleList([PlainBlock(spec) for _ in range(spec["layers"])])
        self.norm_f = PlainNorm(spec["width"], spec["norm_type"], spec["norm_eps"], spec["norm_bias"])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Ids [batch, tokens] and mask [batch, tokens] (1 for a token) to states [batch, tokens, width]."""
        length, device = input_ids.shape[1], input_ids.device
        slopes = plain_slopes(
            self.spec["heads"], self.spec["bias_max"], at_least_float32(self.wte.weight.dtype), device
        )
        bias = slopes[:, None, None] * torch.arange(1 - length, 1, device=device)
        hidden = hidden_keys(input_ids, attention_mask)
        x = self.wte(input_ids)
        for block in self.blocks:
            x = block(x, position_bias=bias, attention_mask=hidden)
        return self.norm_f(x)


class PlainMptForCausalLM(PlainForCausalLM):
    """The language model."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.logit_scale, self.final_softcap = spec["logit_scale"], spec["final_logit_softcapping"]
        self.transformer = PlainDecoder(spec)
        self.lm_head = None if spec["tie"] else nn.Linear(spec["width"], spec["vocab"], bias=False)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """As `PlainForCausalLM.states`."""
        return self.transformer(input_ids, attention_mask)

    def head(self) -> Tensor:
        """As `PlainForCausalLM.head`."""
        return self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight


__all__ = ["PlainMptForCausalLM", "plain_slopes"]
