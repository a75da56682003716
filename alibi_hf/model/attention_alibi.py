"""The attention interface: which function computes attention for which `attn_implementation`.

Transformers' names are kept (`eager`, `sdpa`, `flex_attention`, `flash_attention_2`, and the paged ones of
`generate_batch`); the functions behind them are this model's own, registered locally, so that no stock path can drop
the bias. Flash attention that takes no slopes is replaced by a backend that has them, by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging

from .bias_alibi import Distances
from .dense_alibi import eager_attention
from .flash_alibi import check_flash, flash_alibi
from .flex_alibi import flex_alibi
from .sdpa_alibi import sdpa_attention
from .window_alibi import KeyNorms

logger = logging.get_logger(__name__)

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
    key_norms: Callable[[], KeyNorms | None] | None = None,
    **kwargs: Any,
) -> Output:
    """Attend with PyTorch's fused attention; returns `[batch, queries, heads, dim]`, weights only if asked for."""
    key, value = update_paged(module, key, value, kwargs)
    output = sdpa_attention(query, key, value, distances, scaling, dropout, key_norms)
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
    output = flex_alibi(query, key, value, distances, scaling, dropout, softcap)
    weights = eager_attention(query, key, value, distances, scaling, 0.0, softcap)[1] if output_attentions else None
    return output.transpose(1, 2), weights


def flash_attention_forward(
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
    """Attend with FlashAttention 2; returns `[batch, queries, heads, dim]`, weights only if asked for."""
    output = flash_alibi(query, key, value, distances, scaling, dropout, softcap)
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
    "flash_attention_2": flash_attention_forward,
}

ALL_ATTENTION_FUNCTIONS = AttentionInterface()
for _name, _function in FUNCTIONS.items():
    ALL_ATTENTION_FUNCTIONS[_name] = _function


def is_flash(name: str | None) -> bool:
    """True for what Transformers calls flash attention: `flash_attention_2` to `_4`, and such kernels on the Hub."""
    return name is not None and (name.startswith("flash_attention_") or ("/" in name and "flash" in name.lower()))


def resolve_attention(name: str | None, config: Any, device: str) -> str | None:
    """Return the backend that runs where `name` was asked for; None leaves the choice to Transformers.

    Args:
        config: an `AlibiConfig`.
        device: "cuda" or another device type, on which the model is or will be.

    Raises:
        ValueError: where no backend of that name computes this config's attention.
    """
    if name is None:
        return None if config.attn_logit_softcapping is None else "eager"  # the default, sdpa, has no soft cap
    if name == "flash_attention_2":
        check_flash(config)
    elif is_flash(name):
        chosen = _nearest(config, device)
        logger.warning_once(
            f"attn_implementation={name!r} takes no ALiBi slopes and would drop the positions; {chosen!r} runs "
            "instead. 'flash_attention_2' has slopes, with the package flash_attn."
        )
        return chosen
    check_attention(name, config.attn_logit_softcapping)
    return name


def _nearest(config: Any, device: str) -> str:
    """Return the fastest backend on `device` that has all that `config` asks for."""
    if device == "cuda" and config.attention_dropout == 0:
        return "flex_attention"
    return "sdpa" if config.attn_logit_softcapping is None else "eager"


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
        f"attn_implementation={name!r} has no ALiBi bias here; use one of 'eager', 'sdpa', 'flex_attention', "
        "'flash_attention_2'."
    )
