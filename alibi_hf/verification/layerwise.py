"""Layer by layer: the same hidden states through one layer of upstream and one of ours, whatever the model's size.

The truth's states go from layer to layer in float64, and both sides get them at every layer, cast to the dtype under
test. So an error is measured where it arises, and one layer is in memory at a time. Embedding and head are steps too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isqrt

import torch

from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.verification import controls
from alibi_hf.verification.compare import DTYPES, Comparison, Runner, logits_check
from alibi_hf.verification.measure import Difference, compare_logits, compare_states
from alibi_hf.verification.part import OurParts, Part, UpstreamParts, Wanted
from alibi_hf.verification.report import Check, Control

SCORES = 2**26  # bytes of one layer's float64 attention scores; longer rows are cut unless they were asked for
HEAD_VALUES = 2**25  # weights of the head that are read together
LOGITS = 2**24  # logits that are compared

Loader = Callable[[torch.dtype, Wanted], Part]


@dataclass(frozen=True)
class Step:
    """One part of the model, run by itself.

    Attributes:
        name: of its checks.
        pieces: what is loaded, one after the other; the results lie side by side in the last dimension.
        call: runs a loaded part on one input.
        compare: measures a result against the truth.
        layer: index of the layer, if it is one.
    """

    name: str
    pieces: list[Wanted]
    call: Callable[[Part, torch.Tensor], torch.Tensor]
    compare: Callable[[torch.Tensor, torch.Tensor], Difference] = compare_states
    layer: int | None = None


def steps_of(config: AlibiConfig) -> int:
    """Return how many steps one comparison takes."""
    return config.num_hidden_layers + 2


def layer_rows(rows: list[torch.Tensor], heads: int, asked: bool) -> list[torch.Tensor]:
    """Return the rows `[batch, length]` to run: as they are if `asked` for, else the longest, cut to `SCORES`.

    A layer is causal, so the start of a long row is what a shorter one would show.
    """
    if asked:
        return rows
    longest = isqrt(SCORES // (8 * heads))
    row = rows[-1][:, :longest]
    return [row[: max(1, SCORES // (8 * heads * row.shape[1] ** 2))]]


class LayerRunner:
    """Goes through a model once for one comparison; results gather in the runner that it is given."""

    def __init__(self, runner: Runner, comparison: Comparison, rows: list[torch.Tensor]) -> None:
        self.runner, self.comparison, self.rows = runner, comparison, rows
        longest = max(row.shape[1] for row in rows)
        self.upstream = UpstreamParts(runner.checkpoint, runner.reference, runner.stored, longest, runner.device)
        self.ours = OurParts(runner.output, runner.device)

    def run(self) -> None:
        """Run embedding, every layer, and last norm and head."""
        config = self.runner.checkpoint.config
        known = torch.unique(torch.cat([row.flatten() for row in self.rows]))
        ids = [torch.searchsorted(known, row) for row in self.rows]
        states = self._run(Step("embedding", [Wanted(embedding=known.tolist())], Part.embed), ids)
        for layer in range(config.num_hidden_layers):
            states = self._run(Step("layer", [Wanted(layer=layer)], Part.layer, layer=layer), states)
        chunk = max(1, HEAD_VALUES // config.hidden_size)
        starts = range(0, config.vocab_size, chunk)
        pieces = [Wanted(head=range(start, min(start + chunk, config.vocab_size))) for start in starts]
        states = [_thin(entry, config.vocab_size) for entry in states]
        self._run(Step("last norm and head", pieces, Part.logits, compare_logits), states)

    def _run(self, step: Step, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run one step on both sides, add its checks, and return the truth."""
        layer = "" if step.layer is None else f" {step.layer}"
        self.runner.say(f"{step.name}{layer}{self.comparison.suffix}")
        truth = _results(step, self.upstream.load, torch.float64, inputs, self.comparison.truth)
        for dtype in DTYPES:
            theirs = _errors(step, self.upstream.load, dtype, inputs, truth, self.comparison.upstream)
            ours = _errors(step, self._load_ours, dtype, inputs, truth)
            pairs = zip(inputs, truth, ours, theirs, strict=True)
            self.runner.checks += [self._check(step, dtype, *entries) for entries in pairs]
            if self.comparison.controls and step.layer == 0 and dtype == torch.float32:
                self.runner.controls += self._controls(step, inputs[-1], truth[-1], theirs[-1])
        return truth

    def _load_ours(self, dtype: torch.dtype, wanted: Wanted) -> Part:
        rounding = self.comparison.rounding
        return self.ours.load(dtype, wanted, **({"alibi_rounding": rounding} if rounding else {}))

    def _check(
        self,
        step: Step,
        dtype: torch.dtype,
        given: torch.Tensor,
        truth: torch.Tensor,
        ours: Difference,
        theirs: Difference,
    ) -> Check:
        name, size = step.name + self.comparison.suffix, float(truth.abs().max())
        return logits_check(name, dtype, given.shape[1], ours, theirs, size, step.layer)

    def _controls(self, step: Step, given: torch.Tensor, truth: torch.Tensor, upstream: Difference) -> list[Control]:
        """Hold two wrong first layers against the truth; both must fail."""
        wanted, float32 = step.pieces[0], torch.float32
        slopes = controls.wrong_slopes(read_own_config(self.runner.output))
        steep = self.ours.load(float32, wanted, alibi_rounding="exact", alibi_slopes=slopes)
        swapped = self.ours.load(float32, wanted, alibi_rounding="exact")
        names = [controls.WRONG_SLOPES.format(controls.WRONG_SLOPE), controls.swap_key_heads(swapped.model)]
        where, size = f"layer 0, float32, {given.shape[1]} tokens", float(truth.abs().max())
        errors = [step.compare(step.call(part, given.float()), truth) for part in (steep, swapped)]
        return [
            controls.hold(f"layer by layer, {name}", where, error, upstream, size)
            for name, error in zip(names, errors, strict=True)
        ]


def _results(
    step: Step,
    load: Loader,
    dtype: torch.dtype,
    inputs: list[torch.Tensor],
    patches: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[torch.Tensor]:
    """Return the step's result for every input, one loaded piece after the other."""
    results: list[list[torch.Tensor]] = [[] for _ in inputs]
    for wanted in step.pieces:
        part = load(dtype, wanted)
        with patches():
            for result, given in zip(results, inputs, strict=True):
                result.append(step.call(part, given.to(dtype) if given.is_floating_point() else given))
    return [torch.cat(result, dim=-1) for result in results]


def _errors(
    step: Step,
    load: Loader,
    dtype: torch.dtype,
    inputs: list[torch.Tensor],
    truth: list[torch.Tensor],
    patches: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Difference]:
    results = _results(step, load, dtype, inputs, patches)
    return [step.compare(result, true) for result, true in zip(results, truth, strict=True)]


def _thin(states: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return as many rows, or an even choice of positions, as keep the logits to `LOGITS` numbers."""
    length = states.shape[1]
    states = states[: max(1, LOGITS // (length * vocab_size))]
    if length * vocab_size <= LOGITS:
        return states
    kept = torch.linspace(0, length - 1, max(2, LOGITS // vocab_size), dtype=torch.float64).round().long()
    return states[:, kept.to(states.device)]
