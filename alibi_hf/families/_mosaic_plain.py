"""A plain MosaicGPT after the formulas of MosaicML's v0.0.4 code: MPT's attention, older names, slopes uncorrected.

Source of the formulas: MosaicML `examples` v0.0.4, `llm/src/models/mosaic_gpt/mosaic_gpt.py` and `layers`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alibi_hf.families._mpt_plain import PlainAttention
from alibi_hf.families._plain import PlainForCausalLM, PlainNorm, at_least_float32, hidden_keys


class PlainMosaicMlp(nn.Module):
    """`mlp_down(gelu(mlp_up(x)))`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.mlp_up = nn.Linear(spec["width"], spec["inner"], bias=spec["mlp_bias"])
        self.mlp_down = nn.Linear(spec["inner"], spec["width"], bias=spec["mlp_bias"])

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        return self.mlp_down(F.gelu(self.mlp_up(x)))


class PlainMosaicBlock(nn.Module):
    """One pre-norm layer."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        norm = (spec["width"], "layer_norm", spec["norm_eps"], spec["norm_bias"])
        self.ln_1, self.ln_2 = PlainNorm(*norm), PlainNorm(*norm)
        self.attn, self.mlp = PlainAttention(spec), PlainMosaicMlp(spec)

    def forward(self, x: Tensor, position_bias: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, tokens, width] to [batch, tokens, width]."""
        x = x + self.attn(self.ln_1(x), position_bias=position_bias, attention_mask=attention_mask)
        return x + self.mlp(self.ln_2(x))


class PlainMosaicDecoder(nn.Module):
    """Embedding, blocks and the last norm, under upstream's names."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.bias_max = spec["heads"], spec["bias_max"]
        self.wte = nn.Embedding(spec["vocab"], spec["width"])
        self.blocks = nn.ModuleList([PlainMosaicBlock(spec) for _ in range(spec["layers"])])
        self.ln_f = PlainNorm(spec["width"], "layer_norm", spec["norm_eps"], spec["norm_bias"])

    def bias(self, length: int) -> Tensor:
        """The bias, [heads, 1, length]: one geometric sequence of slopes, whatever the number of heads."""
        dtype, device = at_least_float32(self.wte.weight.dtype), self.wte.weight.device
        exponents = torch.arange(1, self.heads + 1, dtype=dtype, device=device) * (self.bias_max / self.heads)
        return torch.exp2(-exponents)[:, None, None] * torch.arange(1 - length, 1, device=device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Ids [batch, tokens] and mask [batch, tokens] (1 for a token) to states [batch, tokens, width]."""
        bias, hidden = self.bias(input_ids.shape[1]), hidden_keys(input_ids, attention_mask)
        x = self.wte(input_ids)
        for block in self.blocks:
            x = block(x, position_bias=bias, attention_mask=hidden)
        return self.ln_f(x)


class PlainMosaicForCausalLM(PlainForCausalLM):
    """The language model; its head is the embedding."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.logit_scale = spec["logit_scale"]
        self.transformer = PlainMosaicDecoder(spec)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """As `PlainForCausalLM.states`."""
        return self.transformer(input_ids, attention_mask)

    def head(self) -> Tensor:
        """As `PlainForCausalLM.head`."""
        return self.transformer.wte.weight


__all__ = ["PlainMosaicForCausalLM"]
