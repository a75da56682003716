"""A plain Refact-1.6B after upstream's formulas; Transformers has no class for it.

Its norms are LayerNorms without bias; llama.cpp's port, which takes them for RMSNorms, is no source.

Source of the formulas: smallcloudai's `modeling_gpt_refact.py` of Refact-1_6B-fim: `Attention`, `MLP`,
`get_alibi_biases`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alibi_hf.families._layout import head_sizes
from alibi_hf.families._plain import PlainForCausalLM, PlainNorm, at_least_float32, attend, hidden_keys
from alibi_hf.families._truth import true_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig

LAYOUTS = ("kv", "k", "v", "gate_up_proj", "linear_1", "linear_3")  # a file has the fused or the separate ones


class PlainAttention(nn.Module):
    """Many query heads, one key/value head; `[k; v]` in one projection, or in two before the release."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__()
        width, (_, _, self.dim) = config.hidden_size, head_sizes(config)
        self.q, self.c_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * self.dim, bias=False)
        self.k, self.v = nn.Linear(width, self.dim, bias=False), nn.Linear(width, self.dim, bias=False)

    def forward(self, x: Tensor, position_bias: Tensor, attention_mask: Tensor) -> Tensor:
        """x [batch, queries, width], bias [heads, 1, keys], mask [batch, 1, queries, keys] true where hidden."""
        k, v = self.kv(x).split(self.dim, dim=-1) if hasattr(self, "kv") else (self.k(x), self.v(x))
        q = self.q(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        return self.c_proj(attend(q, k[:, None], v[:, None], position_bias, attention_mask, self.dim**-0.5))


class PlainMlp(nn.Module):
    """`c_proj(silu(gate) * up)`; gate and up in one projection `[gate; up]`, or in two before the release."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size or 0
        self.gate_up_proj = nn.Linear(width, 2 * inner, bias=False)
        self.linear_1, self.linear_3 = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.c_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        fused = hasattr(self, "gate_up_proj")
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if fused else (self.linear_1(x), self.linear_3(x))
        return self.c_proj(F.silu(gate) * up)


class PlainBlock(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__()
        norm = (config.hidden_size, "layer_norm", config.norm_eps, False)
        self.ln_1, self.ln_2 = PlainNorm(*norm), PlainNorm(*norm)
        self.attn, self.mlp = PlainAttention(config), PlainMlp(config)

    def forward(self, x: Tensor, position_bias: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, tokens, width] to [batch, tokens, width]."""
        x = x + self.attn(self.ln_1(x), position_bias=position_bias, attention_mask=attention_mask)
        return x + self.mlp(self.ln_2(x))


class PlainDecoder(nn.Module):
    """Embedding and blocks; the last norm is not part of it."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([PlainBlock(config) for _ in range(config.num_hidden_layers)])

    def forward(self, input_ids: Tensor, position_bias: Tensor, hidden: Tensor) -> Tensor:
        """Ids [batch, tokens] to states [batch, tokens, width]; `hidden` [batch or 1, 1, tokens, tokens]."""
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x, position_bias=position_bias, attention_mask=hidden)
        return x


class PlainRefactForCausalLM(PlainForCausalLM):
    """The language model, with the layout of the release and the one before it until `tie_weights` is called."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.transformer = PlainDecoder(config)
        self.ln_f = PlainNorm(config.hidden_size, "layer_norm", config.norm_eps, False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def tie_weights(self) -> None:
        """Nothing is tied; of the two layouts, the one that no checkpoint has filled goes."""
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if name in LAYOUTS and child.weight.is_meta:
                    delattr(module, name)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """As `PlainForCausalLM.states`; the bias is slope times the key's column counted from one, in float32."""
        weight = self.lm_head.weight
        slopes = true_slopes(self.heads, device=weight.device).to(at_least_float32(weight.dtype))
        bias = slopes[:, None, None] * torch.arange(1, input_ids.shape[1] + 1, device=weight.device)
        return self.ln_f(self.transformer(input_ids, bias, hidden_keys(input_ids, attention_mask)))

    def head(self) -> Tensor:
        """As `PlainForCausalLM.head`."""
        return self.lm_head.weight


__all__ = ["PlainRefactForCausalLM"]
