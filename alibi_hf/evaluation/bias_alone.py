"""What the bias of a head does before any query meets a key: how far it lets equal scores reach, what 16 bits leave."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from alibi_hf.model.bias_alibi import Distances

KEYS = 32  # neighbouring keys whose stored biases are counted
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BiasRounding:
    """One head's bias, stored in 16 bits.

    Attributes:
        head, slope: which; the slope as the model uses it.
        dtype: "bfloat16" or "float16".
        absolute_values: how many different values the last `KEYS` keys of the text keep where slope times position is
            stored, as Transformers' BLOOM and Falcon do (`build_alibi_tensor` of `modeling_bloom.py`); of 32 there
            should be 32.
        relative_values: likewise, with slope times distance, of the `KEYS` nearest keys.
        zero_distance: the smallest distance in tokens at which exp(bias) is rounded to zero, whatever the text; None
            for a head without a slope.
    """

    head: int
    slope: float
    dtype: str
    absolute_values: int
    relative_values: int
    zero_distance: int | None


def round_biases(slopes: torch.Tensor, sqrt: bool, tokens: int) -> list[BiasRounding]:
    """Return what 16 bits leave of the bias of each head, first all in bfloat16, then all in float16.

    Args:
        slopes: float32 `[heads]`.
        sqrt: the bias takes the square root of the distance; positions, which have none, are then stored as they are.
        tokens: length of the text.
    """
    slopes = slopes.cpu()
    positions = torch.arange(max(0, tokens - KEYS), tokens).float()
    nearest = torch.arange(min(KEYS, tokens)).float()
    nearest = nearest.sqrt() if sqrt else nearest
    return [
        BiasRounding(
            head=head,
            slope=float(slope),
            dtype=str(dtype).removeprefix("torch."),
            absolute_values=len((slope * positions).to(dtype).unique()),
            relative_values=len((slope * nearest).to(dtype).unique()),
            zero_distance=zero_distance(float(slope), sqrt, dtype),
        )
        for dtype in DTYPES
        for head, slope in enumerate(slopes)
    ]


def zero_distance(slope: float, sqrt: bool, dtype: torch.dtype) -> int | None:
    """Return the smallest distance in tokens at which exp(bias) rounds to zero in `dtype`; None for a slope of zero."""
    if slope == 0:
        return None
    info = torch.finfo(dtype)
    bias = math.log(2 / (info.smallest_normal * info.eps))  # half of the smallest number rounds to zero
    return math.ceil((bias / slope) ** 2 if sqrt else bias / slope)


def mean_distance_of_bias(distances: Distances, tokens: int) -> torch.Tensor:
    """Return the mean distance of heads to whom all keys are alike, by their bias alone, float64 `[heads]`, in tokens.

    It is the mean over the queries of a text, as `AttentionSums.mean_distance`: about 1 / slope in a long text, and a
    quarter of the text without a slope.
    """
    distance = torch.arange(tokens, device=distances.slopes.device)
    weights = distances.bias(distance[None, None])[0, :, 0].double().exp().cpu()
    moments = weights * distance.double().cpu()
    return (moments.cumsum(1) / weights.cumsum(1)).mean(1)


__all__ = ["DTYPES", "KEYS", "BiasRounding", "mean_distance_of_bias", "round_biases", "zero_distance"]
