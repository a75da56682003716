"""A plain Baichuan-13B and Baichuan2-13B after upstream's formulas; Transformers has no class for them.

Source of the formulas: baichuan-inc's `modeling_baichuan.py` of Baichuan-13B and Baichuan2-13B: `BaichuanAttention`,
`_gen_alibi_mask`, `NormHead`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alibi_hf.families._layout import head_sizes
from alibi_hf.families._llama_plain import PlainLlamaForCausalLM
from alibi_hf.families._plain import at_least_float32, attend
from alibi_hf.families._truth import true_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig


class PlainAttention(nn.Module):
    """One fused projection `[q; k; v]`, scores plus bias, softmax, output projection."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__()
        self.heads, _, self.dim = head_sizes(config)
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, position_bias: Tensor, attention_mask: Tensor) -> Tensor:
        """x [batch, queries, width], bias [heads, 1, keys], mask [batch, 1, queries, keys] true where hidden."""
        q, k, v = self.W_pack(x).unflatten(-1, (3, self.heads, self.dim)).permute(2, 0, 3, 1, 4)
        return self.o_proj(attend(q, k, v, position_bias, attention_mask, self.dim**-0.5))


class PlainBaichuanForCausalLM(PlainLlamaForCausalLM):
    """The language model."""

    attention = PlainAttention

    def position_bias(self, length: int) -> Tensor:
        """Slope times the key's column, rounded to the model's dtype as upstream's mask is, [heads, 1, keys]."""
        weight = self.model.embed_tokens.weight
        slopes = true_slopes(self.heads, device=weight.device).to(at_least_float32(weight.dtype))
        return (slopes[:, None, None] * torch.arange(length, device=weight.device)).to(weight.dtype)


def normalise_head(name: str, tensor: Tensor) -> Tensor:
    """The head as `NormHead` leaves it after its first evaluation, [vocab, width]; other tensors as they are."""
    if name != "lm_head.weight":
        return tensor
    return F.normalize(tensor.double(), dim=1, eps=1e-12).to(tensor.dtype)


__all__ = ["PlainBaichuanForCausalLM", "normalise_head"]
