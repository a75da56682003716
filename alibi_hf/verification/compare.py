"""One comparison from end to end: the truth, upstream and our model, each run over the same inputs, one at a time.

Only the truth's results are kept; the others' are compared as they appear: one model is in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.families._reference import Reference
from alibi_hf.verification.controls import run_controls
from alibi_hf.verification.generation import Greedy, check_greedy, run_decode, run_greedy, run_whole
from alibi_hf.verification.gradients import Training, check_training, compare_training, train_ours, train_upstream
from alibi_hf.verification.inputs import STEPS, Inputs
from alibi_hf.verification.logits import kept_positions, run_padded, run_row, run_unpadded
from alibi_hf.verification.measure import GATES, Difference, compare_logits, judge
from alibi_hf.verification.report import BiasSample, Check, Control
from alibi_hf.verification.subjects import compared_groups, depends_on_call, load_ours, load_upstream

Progress = Callable[[str, int, int], None]  # what comes, steps done, steps in all
Key = tuple[str, int]  # name of a check, length
DTYPES = (torch.float32, torch.bfloat16)
LOGITS, PADDED, DECODED = "logits", "logits, left-padded batch", "logits, cached decode"


@dataclass(frozen=True)
class Comparison:
    """What is compared with which truth.

    Attributes:
        truth: the context in which the float64 reference computes the truth.
        upstream: the context in which the reference computes its own answer, as it stands or with the exact bias.
        rounding: alibi_rounding of our model, None for what the output's config says.
        suffix: added to the names of the checks.
        controls: whether wrong conversions are held against this truth.
    """

    truth: Callable[[], AbstractContextManager[None]]
    upstream: Callable[[], AbstractContextManager[None]] = nullcontext
    rounding: str | None = None
    suffix: str = ""
    controls: bool = False

    @property
    def steps(self) -> int:
        """How many steps `Runner.run` reports."""
        return 2 + 2 * len(DTYPES) + self.controls


@dataclass
class Runner:
    """Runs comparisons of one checkpoint with one output; results gather in `checks` and `controls`."""

    checkpoint: Checkpoint
    output: Path
    reference: Reference
    inputs: Inputs
    stored: torch.dtype
    device: str
    progress: Progress | None = None
    checks: list[Check] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)
    bias: BiasSample | None = None
    steps: int = 0
    _said: int = 0

    def say(self, words: str) -> None:
        """Tell the caller what comes next."""
        if self.progress is not None:
            self.progress(words, self._said, self.steps)
        self._said += 1

    def run(self, comparison: Comparison) -> None:
        """Run one comparison and, where it says so, the wrong conversions against its truth."""
        self.say(f"truth in float64{comparison.suffix}")
        truth, training = self._truth(comparison)
        self.say(f"upstream as it stands in float64{comparison.suffix}")
        self._as_it_stands(truth, comparison)
        measured = {dtype: self._compare(dtype, comparison, truth, training) for dtype in DTYPES}
        if comparison.controls:
            self.say("wrong on purpose")
            row = self.inputs.rows[-1]
            key = (LOGITS, row.shape[1])
            upstream = measured[torch.float32].logits[key]
            self.controls += run_controls(self.output, row, self._kept(row), truth[key], upstream, self.device)

    def _kept(self, row: torch.Tensor) -> torch.Tensor:
        return kept_positions(tuple(row.shape), self.checkpoint.config.vocab_size)

    def _upstream(self, dtype: torch.dtype) -> nn.Module:
        longest = self.inputs.longest
        return load_upstream(self.checkpoint, self.reference, dtype, longest, self.stored, self.device)

    def _ours(self, dtype: torch.dtype, comparison: Comparison) -> nn.Module:
        fields = {"alibi_rounding": comparison.rounding} if comparison.rounding else {}
        return load_ours(self.output, dtype, self.device, **fields)

    def _rows(self, model: nn.Module) -> Iterator[tuple[Key, torch.Tensor]]:
        for row in self.inputs.rows:
            yield (LOGITS, row.shape[1]), run_row(model, row, self._kept(row))

    def _all(self, model: nn.Module) -> Iterator[tuple[Key, torch.Tensor]]:
        """Run everything that gives logits, in the ways that have to agree."""
        inputs = self.inputs
        yield from self._rows(model)
        if inputs.padded:
            yield (PADDED, inputs.padded[0].shape[1]), run_padded(model, inputs.padded, inputs.pad)
        yield (DECODED, inputs.decode.shape[1]), run_decode(model, inputs.decode, inputs.prefill)

    def _truth(self, comparison: Comparison) -> tuple[dict[Key, torch.Tensor], Training]:
        """The same logits with neither padding nor cache: rows alone, and whole, unless the call's length matters."""
        model, inputs = self._upstream(torch.float64), self.inputs
        with comparison.truth():
            results = dict(self._rows(model))
            if inputs.padded:
                results[PADDED, inputs.padded[0].shape[1]] = run_unpadded(model, inputs.padded)
            decode = run_decode if depends_on_call(self.checkpoint.config) else run_whole
            results[DECODED, inputs.decode.shape[1]] = decode(model, inputs.decode, inputs.prefill)
            return results, train_upstream(model, inputs.training, compared_groups(self.checkpoint))

    def _as_it_stands(self, truth: dict[Key, torch.Tensor], comparison: Comparison) -> None:
        for key, result in self._rows(self._upstream(torch.float64)):
            error = compare_logits(result, truth[key])
            note = f"upstream as it stands, float64, against the truth: {self.reference.as_is_truth_note}"
            name = f"upstream as it stands{comparison.suffix}"
            detail = {"upstream": error.to_dict()}
            self.checks.append(Check(name, "float64", key[1], None, error.max, None, True, detail=detail, note=note))

    def _compare(
        self, dtype: torch.dtype, comparison: Comparison, truth: dict[Key, torch.Tensor], training: Training
    ) -> Measured:
        """Run upstream and ours in `dtype`, add the checks, and return what upstream measured."""
        words, suffix = str(dtype).removeprefix("torch."), comparison.suffix
        self.say(f"upstream in {words}{suffix}")
        with comparison.upstream():
            theirs = self._measure(self._upstream(dtype), dtype, truth, training, train_upstream)
        self.say(f"ours in {words}{suffix}")
        ours = self._measure(self._ours(dtype, comparison), dtype, truth, training, train_ours)
        tie = 0.0
        for key, mine in ours.logits.items():
            size = float(truth[key].abs().max())
            self.checks.append(logits_check(key[0] + suffix, dtype, key[1], mine, theirs.logits[key], size))
            tie = max(tie, 2 * GATES[dtype].limit(theirs.logits[key], size))
        if ours.training and theirs.training and ours.greedy and theirs.greedy:
            length = self.inputs.training.shape[1]
            self.checks += check_training(ours.training, theirs.training, training, length, suffix)
            length = self.inputs.prompts[0].shape[1] + STEPS
            self.checks.append(check_greedy(ours.greedy, theirs.greedy, tie, length, suffix))
        return theirs

    def _measure(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        truth: dict[Key, torch.Tensor],
        training: Training,
        train: Callable[..., Training],
    ) -> Measured:
        logits = {key: compare_logits(result, truth[key]) for key, result in self._all(model)}
        if dtype != torch.float32:
            return Measured(logits)
        trained = train(model, self.inputs.training, compared_groups(self.checkpoint))
        greedy = run_greedy(model, self.inputs.prompts, STEPS, self.inputs.pad)
        return Measured(logits, compare_training(trained, training), greedy)


@dataclass(frozen=True)
class Measured:
    """The errors of one model in one dtype; loss, gradients and generation in float32 only."""

    logits: dict[Key, Difference]
    training: tuple[Difference, Difference] | None = None
    greedy: Greedy | None = None


def logits_check(
    name: str,
    dtype: torch.dtype,
    length: int,
    ours: Difference,
    theirs: Difference,
    size: float,
    layer: int | None = None,
) -> Check:
    """Return the check that holds our error beside upstream's; `size` is the largest value of the truth."""
    judgement = judge(GATES[dtype], ours, theirs, size)
    return Check(
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        length=length,
        ours=judgement.ours,
        upstream=judgement.upstream,
        limit=judgement.limit,
        passed=judgement.passed,
        metric=judgement.metric,
        detail={"ours": ours.to_dict(), "upstream": theirs.to_dict()},
        note=judgement.note,
        layer=layer,
    )
