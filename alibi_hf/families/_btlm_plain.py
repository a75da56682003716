"""A plain BTLM or Jais after upstream's formulas: Transformers has no class for them.

Unlike the other plain models it has a cache, since with `alibi_scaling` by length a cached decode is not the whole row,
and it rounds slopes, bias and factors to its own dtype, as upstream does. Slopes are a buffer: they are not trained,
and rounding the parameters leaves them alone.

Source of the formulas: `modeling_btlm.py` and `modeling_jais.py` of the model repositories; for the order of scaling,
`AlibiPositionEmbeddingLayer` there.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput, CausalLMOutputWithPast

from alibi_hf.families._plain import PlainForCausalLM, attend, hidden_keys

Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [batch, heads, tokens, head_dim]


def scaled(x: Tensor, factor: float) -> Tensor:
    """x times the factor, which upstream rounds to the dtype of x first."""
    return x * torch.tensor(factor, dtype=x.dtype, device=x.device)


class PlainConv1D(nn.Module):
    """`x @ weight + bias` with a weight of [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


def _as_column(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Slopes stored as [heads] become [heads, 1]."""
    if f"{prefix}slopes" in state:
        state[f"{prefix}slopes"] = state[f"{prefix}slopes"].view(-1, 1)


class PlainSlopes(nn.Module):
    """The slopes, [heads, 1], and the bias that they give; from the formula until a checkpoint's are loaded."""

    slopes: Tensor

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.scaling = spec["alibi_scaling"]
        self.register_buffer("slopes", spec["slopes"][:, None])
        self.register_load_state_dict_pre_hook(_as_column)

    def forward(self, queries: int, keys: int) -> Tensor:
        """The bias of the last `queries` of `keys` tokens, [heads, queries, keys], in the dtype of the slopes."""
        scale = 1.0
        if self.scaling is not None:
            scale = self.scaling.get("factor") or max(1.0, keys / self.scaling["train_seq_len"])
        steps = torch.arange(keys, device=self.slopes.device)
        distance = (steps[None, :] - steps[keys - queries :, None]).abs()
        return (self.slopes / -scale)[:, None] * distance


class PlainAttention(nn.Module):
    """Fused projection, scores plus bias, softmax, output projection."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.scale = spec["heads"], spec["softmax_scale"]
        self.c_attn = PlainConv1D(spec["width"], 3 * spec["width"])
        self.c_proj = PlainConv1D(spec["width"], spec["width"])

    def forward(
        self, x: Tensor, position_bias: Tensor, attention_mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The output [batch, queries, width], and all keys and values.

        x is [batch, queries, width], the bias [heads, queries, keys], the mask [batch or 1, 1, queries, keys], true
        where hidden.
        """
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return self.c_proj(attend(q, k, v, position_bias, attention_mask, self.scale)), (k, v)


class PlainMlp(nn.Module):
    """`c_proj(act(c_fc(x)))`, or `c_proj(c_fc(x) * silu(c_fc2(x)))`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.act = spec["act"]
        self.c_fc = PlainConv1D(spec["width"], spec["inner"])
        if spec["gated"]:
            self.c_fc2 = PlainConv1D(spec["width"], spec["inner"])
        self.c_proj = PlainConv1D(spec["inner"], spec["width"])

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        up = self.c_fc(x)
        return self.c_proj(up * self.act(self.c_fc2(x)) if hasattr(self, "c_fc2") else self.act(up))


class PlainBlock(nn.Module):
    """One pre-norm layer."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(spec["width"], eps=spec["norm_eps"]) for _ in range(2))
        self.attn, self.mlp = PlainAttention(spec), PlainMlp(spec)

    def forward(
        self, x: Tensor, bias: Tensor, hidden: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[batch, queries, width] to the same shape, and the layer's keys and values."""
        attended, present = self.attn(self.ln_1(x), position_bias=bias, attention_mask=hidden, past=past)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), present


class PlainDecoder(nn.Module):
    """Embedding, slopes, blocks and the last norm, under upstream's names."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.embeddings_scale = spec["embeddings_scale"]
        self.wte = nn.Embedding(spec["vocab"], spec["width"])
        self.relative_pe = PlainSlopes(spec)
        self.h = nn.ModuleList([PlainBlock(spec) for _ in range(spec["layers"])])
        self.ln_f = nn.LayerNorm(spec["width"], eps=spec["norm_eps"])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, past: Cache | None) -> tuple[Tensor, Cache]:
        """Ids [batch, queries] and mask [batch, keys] to states [batch, queries, width] and the cache."""
        queries = input_ids.shape[1]
        keys = queries + (past[0][0].shape[2] if past else 0)
        bias = self.relative_pe(queries, keys)
        hidden = hidden_keys(input_ids.new_zeros(1, keys), attention_mask)[:, :, keys - queries :]
        x = scaled(self.wte(input_ids), self.embeddings_scale)
        presents = []
        for layer, block in enumerate(self.h):
            x, present = block(x, bias, hidden, past[layer] if past else None)
            presents.append(present)
        return self.ln_f(x), presents


class PlainBtlmForCausalLM(PlainForCausalLM):
    """The language model."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.logit_scale: float = spec["logit_scale"]
        self.transformer = PlainDecoder(spec)
        self.lm_head = None if spec["tie"] else nn.Linear(spec["width"], spec["vocab"], bias=False)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """As `PlainForCausalLM.states`."""
        return self.transformer(input_ids, attention_mask, None)[0]

    def head(self) -> Tensor:
        """As `PlainForCausalLM.head`."""
        return self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> CausalLMOutput | CausalLMOutputWithPast:
        """Ids [batch, queries] to logits [batch, queries, vocab] and the cache of all tokens so far, or to the loss."""
        if labels is not None:
            return super().forward(input_ids, attention_mask, labels)
        states, cache = self.transformer(input_ids, attention_mask, past_key_values)
        return CausalLMOutputWithPast(
            logits=scaled(F.linear(states, self.head()), self.logit_scale), past_key_values=cache
        )


__all__ = ["PlainBtlmForCausalLM"]
