"""`Reference`: what verification needs to know about the upstream class a checkpoint is compared with."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Reference:
    """The upstream model of one checkpoint, and how truth is made from it.

    Attributes:
        class_name: the reference class, as reports name it.
        attn_implementation: the attention path of that class that is compared with.
        build: `build(raw, dtype)` gives the reference model in evaluation mode with parameters of `dtype` whose names
            are upstream's own, to be filled by `load_state_dict`; under `torch.device("meta")` it allocates nothing.
        truth: a context manager under which the float64 reference computes the gate's truth: float64 bias and
            float64 softmax.
        exact_truth: the same with exact ALiBi where the gate's truth is the family's own rounded bias (Falcon);
            equal to `truth` elsewhere.
        as_is_truth_note: one sentence on what the unpatched class rounds, for the report.
        attention_modules: the modules, one a layer, at which the bias arrives.
        bias_argument: the keyword under which the bias arrives there.
        bias_layout: the shape it has: "flat" [batch * heads, 1, keys], "heads" [heads, 1, keys], "mask"
            [batch, heads, queries, keys] with the causal mask folded in.
        expressible: whether Transformers' class computes what this checkpoint's code does; if not, `build` gives this
            package's plain module after upstream's formulas, and `reason` says why.
        reason: see `expressible`.
        max_length: the longest input the reference takes, None for no limit.
        length_field: the field of upstream's config.json that lifts `max_length` and changes nothing else.
        has_cache: whether the reference decodes with a cache and generates.
        prepare: `prepare(name, tensor)` gives what upstream makes of a tensor of its files before it computes, in the
            dtype of the tensor given; None where it computes with the files' tensors.
    """

    class_name: str
    attn_implementation: str
    build: Callable[[dict[str, Any], torch.dtype], nn.Module]
    truth: Callable[[], AbstractContextManager[None]]
    exact_truth: Callable[[], AbstractContextManager[None]]
    as_is_truth_note: str
    attention_modules: Callable[[nn.Module], list[nn.Module]]
    bias_argument: str
    bias_layout: Literal["flat", "heads", "mask"]
    expressible: bool = True
    reason: str = ""
    max_length: int | None = None
    length_field: str | None = None
    has_cache: bool = True
    prepare: Callable[[str, torch.Tensor], torch.Tensor] | None = None


__all__ = ["Reference"]
