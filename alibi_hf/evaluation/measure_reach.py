"""What each head of a loaded model looks at, layer after layer while the model reads; nothing is kept but sums."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from alibi_hf.checkpoints.options import Progress
from alibi_hf.errors import AlibiError
from alibi_hf.evaluation.attention_sums import AttentionSums, observed_attention
from alibi_hf.evaluation.bias_alone import BiasRounding, mean_distance_of_bias, round_biases
from alibi_hf.evaluation.peak import measure_peak
from alibi_hf.evaluation.perplexity import evaluating
from alibi_hf.evaluation.reach_report import COLLAPSED, HeadReach, LengthReach
from alibi_hf.evaluation.window_share import LayerWindows, find_windows
from alibi_hf.model.bias_alibi import Distances
from alibi_hf.model.modeling_alibi import AlibiForCausalLM


def measure_reach(
    model: AlibiForCausalLM, ids: torch.Tensor, lengths: Sequence[int], progress: Progress | None = None
) -> list[LengthReach]:
    """Return what each head looks at in the first tokens of `ids` `[tokens]`, by length.

    The model is evaluated without dropout and left as it was.

    Raises:
        AlibiError: naming the layer and the heads whose attention is not finite.
    """
    done, total = 0, sum(length**2 for length in lengths) * model.config.num_hidden_layers
    found = []
    with evaluating(model):
        for length in lengths:

            def step(layer: int, length: int = length, done: int = done) -> None:
                if progress is not None:
                    progress(f"{length} tokens, layer {layer + 1}", done + (layer + 1) * length**2, total)

            if progress is not None:
                progress(f"{length} tokens", done, total)
            found.append(_measure(model, ids[:length], step))
            done += length**2 * model.config.num_hidden_layers
    return found


@torch.no_grad()
def _measure(model: AlibiForCausalLM, ids: torch.Tensor, step: Callable[[int], None]) -> LengthReach:
    started = time.monotonic()
    heads: list[HeadReach] = []
    plans: list[str] = []
    rounding: list[BiasRounding] = []

    def observe(
        layer: int, query: torch.Tensor, key: torch.Tensor, distances: Distances, scaling: float, sums: AttentionSums
    ) -> None:
        _require_finite(layer, sums)
        windows = find_windows(query, key, distances, scaling, model.config.attn_logit_softcapping)
        alone = mean_distance_of_bias(distances, sums.tokens)
        heads.extend(_head(layer, distances.slopes, alone, windows, sums))
        plans.append(windows.plan)
        if not rounding:
            rounding.extend(round_biases(distances.slopes, distances.sqrt, sums.tokens))
        step(layer)

    with measure_peak(model.device) as peak, observed_attention(model, observe):
        model.model(ids[None].long().to(model.device), use_cache=False)
    return LengthReach(len(ids), heads, rounding, plans, time.monotonic() - started, peak.bytes)


def _require_finite(layer: int, sums: AttentionSums) -> None:
    wrong = (~sums.entropy.isfinite()).nonzero().flatten().tolist()
    if wrong:
        which = f"head {wrong[0]}" if len(wrong) == 1 else f"heads {', '.join(map(str, wrong))}"
        raise AlibiError(
            f"the attention of layer {layer}, {which}, is not finite (NaN or infinite) at {sums.tokens} tokens: the "
            "model overflows, or its weights are damaged. Try --dtype float32."
        )


def _head(
    layer: int, slopes: torch.Tensor, alone: torch.Tensor, windows: LayerWindows, sums: AttentionSums
) -> list[HeadReach]:
    mean, half, most = sums.mean_distance, sums.distance_of(0.5), sums.distance_of(0.9)
    late = sums.late_first / sums.late_tokens
    return [
        HeadReach(
            layer=layer,
            head=head,
            slope=float(slopes[head]),
            mean_distance=float(mean[head]),
            bias_distance=float(alone[head]),
            distance_50=int(half[head]),
            distance_90=int(most[head]),
            first_token=float(sums.first[head]) / sums.tokens,
            late_first_token=float(late[head]),
            own_token=float(sums.mass[head, 0]) / sums.tokens,
            entropy=float(sums.entropy[head]) / sums.tokens,
            collapsed=float(late[head]) > COLLAPSED,
            gap=gap if (gap := windows.gaps[head]) is not None and math.isfinite(gap) else None,
            window=windows.windows[head],
            saved=windows.saved[head],
            planned=windows.planned[head],
        )
        for head in range(len(slopes))
    ]


__all__ = ["measure_reach"]
