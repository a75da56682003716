"""Negative controls: conversions made wrong on purpose. A verification that lets one pass proves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.model.bias_alibi import alibi_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from alibi_hf.verification.logits import run_row
from alibi_hf.verification.measure import GATES, Difference, compare_logits, judge
from alibi_hf.verification.report import Control
from alibi_hf.verification.subjects import load_ours

WRONG_SLOPE = 1.05
WRONG_SLOPES = "slope of one head times {}"


def wrong_slopes(config: AlibiConfig) -> list[float]:
    """Return the slopes of `config` with that of the first head, the steepest, five per cent too large."""
    slopes = config.alibi_slopes or alibi_slopes(config.num_attention_heads, config.alibi_bias_max)
    return [slopes[0] * WRONG_SLOPE, *slopes[1:]]


@torch.no_grad()
def swap_key_heads(model: Any) -> str:
    """Swap the first two key heads of our model's first layer, in place, and return what was done in words.

    Where there is one key head only, its two halves are swapped.
    """
    projection: Any = model.get_submodule("model.layers.0.self_attn.k_proj")
    config = model.config
    rows = config.head_dim if config.num_key_value_heads > 1 else config.head_dim // 2
    for tensor in (projection.weight, projection.bias):
        if tensor is not None:
            tensor[: 2 * rows] = torch.cat([tensor[rows : 2 * rows], tensor[:rows]])
    return "two heads of K swapped" if config.num_key_value_heads > 1 else "the halves of the one head of K swapped"


def hold(name: str, check: str, error: Difference, upstream: Difference, size: float) -> Control:
    """Return the control that holds a wrong conversion's `error` against the float32 gate; see `judge`."""
    judgement = judge(GATES[torch.float32], error, upstream, size)
    check = f"{check}, {judgement.metric}"
    return Control(name, check, judgement.ours, judgement.limit, caught=not judgement.passed)


def run_controls(
    output: str | Path,
    ids: torch.Tensor,
    positions: torch.Tensor,
    truth: torch.Tensor,
    upstream: Difference,
    device: str,
) -> list[Control]:
    """Run the float32 logits check on two wrong conversions; both must fail it.

    Args:
        ids: the rows to run, `[batch, length]`; `truth` their exact logits in float64 at `positions`.
        upstream: upstream's own error there, which sets the limit.
    """

    def control(name: str, model: AlibiForCausalLM) -> Control:
        error = compare_logits(run_row(model, ids, positions), truth)
        return hold(name, f"logits, float32, {ids.shape[1]} tokens", error, upstream, float(truth.abs().max()))

    slopes = wrong_slopes(read_own_config(output))
    model = load_ours(output, torch.float32, device, alibi_rounding="exact", alibi_slopes=slopes)
    controls = [control(WRONG_SLOPES.format(WRONG_SLOPE), model)]
    del model
    model = load_ours(output, torch.float32, device, alibi_rounding="exact")
    return [*controls, control(swap_key_heads(model), model)]
