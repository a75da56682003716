"""Pieces of the plain reference models: what checkpoints are compared with where Transformers has no class for them.

A plain model has upstream's tensor names, eager attention, any dtype and no cache, and shares nothing with the model of
this package. Softmax and bias are in float32, or in float64 for a float64 model, so that its float64 is the truth.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from alibi_hf.families._reference import Reference
from alibi_hf.families._truth import KeepFloat64


class PlainNorm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, with or without bias."""

    def __init__(self, size: int, kind: str, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias and kind == "layer_norm" else None
        self.kind, self.eps = kind, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to [..., size]."""
        if self.kind == "layer_norm":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def hidden_keys(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """True where a query must not look, [batch or 1, 1, tokens, tokens]: later keys, and padding (mask 0)."""
    length = input_ids.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)[None, None]
    return hidden if attention_mask is None else hidden | (attention_mask == 0)[:, None, None, :]


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention with the bias added after the scale, [batch, queries, heads * dim].

    q is [batch, heads, queries, dim]; k and v may have fewer heads, each of which serves as many neighbouring queries.
    """
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of slopes and bias in a model of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


class PlainForCausalLM(nn.Module):
    """A language model around the `states` and the `head` of a subclass; with labels, their loss too."""

    logit_scale: float | None = None
    final_softcap: float | None = None

    def states(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Ids [batch, tokens] and mask [batch, tokens] (1 for a token) to the last states [batch, tokens, width]."""
        raise NotImplementedError

    def head(self) -> Tensor:
        """The weight of the head, [vocab, width]."""
        raise NotImplementedError

    def tie_weights(self) -> None:
        """Nothing to do: a tied model has no weight of its own for the head."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Ids [batch, tokens] to logits [batch, tokens, vocab]."""
        logits = F.linear(self.states(input_ids, attention_mask), self.head())
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        if self.final_softcap:
            logits = self.final_softcap * torch.tanh(logits / self.final_softcap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def plain_reference(
    model: type[PlainForCausalLM],
    build: Callable[[dict[str, Any], torch.dtype], nn.Module],
    attention_modules: Callable[[nn.Module], list[nn.Module]],
    reason: str,
    bias_layout: Literal["heads", "mask"] = "heads",
    prepare: Callable[[str, Tensor], Tensor] | None = None,
) -> Reference:
    """The `Reference` of a plain model whose attention is given its bias as `position_bias`; see `Reference`."""
    return Reference(
        class_name=f"{model.__module__}.{model.__name__}",
        attn_implementation="eager",
        build=build,
        truth=KeepFloat64,
        exact_truth=KeepFloat64,
        as_is_truth_note="a float64 model of the plain module is the truth as it stands",
        attention_modules=attention_modules,
        bias_argument="position_bias",
        bias_layout=bias_layout,
        expressible=False,
        reason=reason,
        has_cache=False,
        prepare=prepare,
    )


__all__ = ["PlainForCausalLM", "PlainNorm", "at_least_float32", "attend", "hidden_keys", "plain_reference"]
