"""A plain Step1 after upstream's formulas; Transformers has no class for it.

Upstream ignores `attention_mask`, so that padding changes its answers; this module hides what the mask hides.

Source of the formulas: stepfun-ai's `modeling_step1.py` of Step-Audio-TTS-3B: `StepAttention`, `build_alibi_cache`.
"""

import torch
from torch import Tensor, nn

from alibi_hf.families._layout import head_sizes
from alibi_hf.families._llama_plain import PlainLlamaForCausalLM
from alibi_hf.families._plain import at_least_float32, attend
from alibi_hf.families._truth import true_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig


class PlainAttention(nn.Module):
    """Grouped-query attention whose key/value heads each serve as many neighbouring query heads."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__()
        heads, groups, self.dim = head_sizes(config)
        self.q_proj = nn.Linear(config.hidden_size, heads * self.dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * self.dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * self.dim, bias=False)
        self.o_proj = nn.Linear(heads * self.dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, position_bias: Tensor, attention_mask: Tensor) -> Tensor:
        """x [batch, queries, width], bias [1, heads, queries, keys], mask [batch, 1, queries, keys], true: hidden."""
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (-1, self.dim)).transpose(1, 2) for part in parts)
        return self.o_proj(attend(q, k, v, position_bias, attention_mask, self.dim**-0.5))


class PlainStep1ForCausalLM(PlainLlamaForCausalLM):
    """The language model."""

    attention = PlainAttention

    def position_bias(self, length: int) -> Tensor:
        """Minus slope times the root of the distance, rounded to the model's dtype, [1, heads, queries, keys]."""
        weight = self.model.embed_tokens.weight
        dtype = at_least_float32(weight.dtype)
        slopes = true_slopes(self.heads, device=weight.device).to(dtype)
        index = torch.arange(length, device=weight.device)
        distance = (index[:, None] - index).clamp(min=0).to(dtype)  # later keys are hidden
        return (-slopes[:, None, None] * distance.sqrt())[None].to(weight.dtype)


__all__ = ["PlainStep1ForCausalLM"]
