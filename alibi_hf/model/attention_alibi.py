"""The attention interface: which function computes attention for which `attn_implementation`.

Transformers' names are kept (`eager`, `sdpa`, `flex_attention`, and the paged ones of `generate_batch`); the functions
behind them are this model's own, registered locally, so that no stock path can drop the bias.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import AttentionInterface

from .bias_alibi import Distances
from .dense_alibi import eager_attention, sdpa_attention
from .flex_alibi import flex_alibi, window_eps

Output = tuple[torch.Tensor, torch.Tensor | None]


def eager_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    distances: Distances,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> Output:
    """Attend with all scores in memory; returns `[batch, queries, heads, dim]` and the weights."""
    key, value = update_paged(module, key, value, kwargs)
    output, weights = eager_attention(query, key, value, distances, scaling, dropout, softcap)
    return output.transpose(1, 2), weights


def sdpa_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    distances: Distances,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> Output:
    """Attend with PyTorch's fused attention; returns `[batch, queries, heads, dim]`, weights only if asked for."""
    key, value = update_paged(module, key, value, kwargs)
    output = sdpa_attention(query, key, value, distances, scaling, dropout)
    weights = eager_attention(query, key, value, distances, scaling)[1] if output_attentions else None
    return output.transpose(1, 2), weights


def flex_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    distances: Distances,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> Output:
    """Attend with FlexAttention; returns `[batch, queries, heads, dim]`, weights only if asked for."""
    eps = window_eps(module.config, query.dtype)
    output = flex_alibi(query, key, value, distances, scaling, dropout, softcap, eps)
    weights = eager_attention(query, key, value, distances, scaling, 0.0, softcap)[1] if output_attentions else None
    return output.transpose(1, 2), weights


def update_paged(
    module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store keys and values in the paged cache of `generate_batch`, if there is one, and return all that are read."""
    cache = kwargs.get("cache")
    if cache is None:
        return key, value
    if "read_index" not in cache.update.__code__.co_varnames[: cache.update.__code__.co_argcount]:
        return cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=dict(kwargs))
    read, write = kwargs["read_index"], kwargs["write_index"]  # up to Transformers 5.17
    key, value = cache.update(key, value, module.layer_idx, read_index=read, write_index=write)
    return key.transpose(0, 1)[None], value.transpose(0, 1)[None]


FUNCTIONS = {
    "eager": eager_attention_forward,
    "paged|eager": eager_attention_forward,
    "sdpa": sdpa_attention_forward,
    "paged|sdpa": sdpa_attention_forward,
    "flex_attention": flex_attention_forward,
}

ALL_ATTENTION_FUNCTIONS = AttentionInterface()
for _name, _function in FUNCTIONS.items():
    ALL_ATTENTION_FUNCTIONS[_name] = _function


def check_attention(name: str | None, softcap: float | None = None) -> None:
    """Refuse an attention backend that would run this model without its bias, or without its soft cap on scores.

    Raises:
        ValueError: for any name but `FUNCTIONS`' own; for vLLM's backend it names the way round.
    """
    if softcap is not None and name in ("sdpa", "paged|sdpa"):
        raise ValueError(
            f"sdpa has no soft cap on scores, attn_logit_softcapping is {softcap}; use 'eager' or 'flex_attention'."
        )
    if name is None or name in FUNCTIONS:
        return
    if name == "vllm":
        raise ValueError(
            'attn_implementation="vllm" computes attention without ALiBi slopes and would serve wrong text. '
            "Serve the checkpoint in its upstream layout, which vLLM knows natively."
        )
    raise ValueError(
        f"attn_implementation={name!r} has no ALiBi bias here; use one of 'eager', 'sdpa', 'flex_attention'."
    )
