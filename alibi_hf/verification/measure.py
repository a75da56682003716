"""How far a result is from the truth, and how far it may be.

Everything is measured in float64 against float64 truth. The gate puts our error beside upstream's own error in the same
dtype: in float32 the largest error, in 16 bits the root mean square. The largest of millions of 16-bit roundings is
luck: between two runs that are equally good it differs by more than the gate allows, the root mean square does not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median

import torch

ROWS = 128  # positions compared at once: bounds the float64 copies of wide vocabularies


@dataclass(frozen=True)
class Difference:
    """Distance of a result from the truth.

    Attributes:
        max, rms: the largest and the root-mean-square error.
        typical: the median over positions, or over tensors, of the root-mean-square error of each.
        kl: mean over positions of KL(truth || result) in nats; of logits only.
        argmax: share of positions with the same argmax, 0 to 1; of logits only.
    """

    max: float
    rms: float
    typical: float
    kl: float | None = None
    argmax: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Return the figures by name."""
        return asdict(self)


@dataclass(frozen=True)
class Gate:
    """How large our error may be: `factor` times upstream's, or `floor` times the true values' size if more."""

    metric: str
    factor: float
    floor: float

    def limit(self, upstream: Difference, size: float) -> float:
        """Return the largest error that passes; `size` is the largest true value, or their root mean square."""
        return max(self.factor * getattr(upstream, self.metric), self.floor * size)


GATES = {
    torch.float32: Gate("max", factor=1.5, floor=1e-6),
    torch.bfloat16: Gate("rms", factor=1.1, floor=0.0),
}
GRADIENT_GATE = Gate("rms", factor=1.5, floor=1e-6)
LUCK = 4.0
# The second look of `judge`. One token's rounding reaches the gradient of every tensor, so there it stays a wider one.
SECOND = {"logits": Gate("typical", factor=1.1, floor=0.0), "gradients": Gate("typical", factor=2.0, floor=0.0)}


@dataclass(frozen=True)
class Judgement:
    """Our error, upstream's and the limit in the figure that decided, `metric`, and whether ours passes."""

    metric: str
    ours: float
    upstream: float
    limit: float
    passed: bool
    note: str = ""


def judge(gate: Gate, ours: Difference, upstream: Difference, size: float, kind: str = "logits") -> Judgement:
    """Apply `gate`; `size` is the largest true value, or their root mean square, whichever the gate's floor is for.

    Very narrow models have single tokens whose norm is so badly conditioned that they alone make up the largest error
    and even the root mean square, and rounding there is a throw of dice on both sides. So up to `LUCK` times upstream's
    own error the median over positions (of gradients: over tensors) decides; single tokens cannot throw it off.
    """
    judgement = _apply(gate, ours, upstream, size)
    error, theirs = getattr(ours, gate.metric), getattr(upstream, gate.metric)
    if judgement.passed or not error <= LUCK * theirs:
        return judgement
    note = f"{gate.metric} {error:.1e}, upstream {theirs:.1e}, may come from single tokens: the median decides"
    return _apply(SECOND[kind], ours, upstream, size, note)


def _apply(gate: Gate, ours: Difference, upstream: Difference, size: float, note: str = "") -> Judgement:
    error, limit = getattr(ours, gate.metric), gate.limit(upstream, size)
    return Judgement(gate.metric, error, getattr(upstream, gate.metric), limit, error <= limit, note)


def compare_logits(logits: torch.Tensor, truth: torch.Tensor) -> Difference:
    """Compare logits [..., vocabulary] with float64 truth of the same shape.

    Raises:
        ValueError: if the shapes differ.
    """
    _same_shape(logits, truth)
    logits, truth = logits.flatten(0, -2), truth.flatten(0, -2)
    largest, divergence, agreed, squares = 0.0, 0.0, 0, []
    for ours, true in zip(logits.split(ROWS), truth.split(ROWS), strict=True):
        ours, true = ours.double(), true.double()
        error = (ours - true).abs()
        largest = _larger(largest, float(error.max()))
        squares.append(error.square().mean(-1))
        true_log = true.log_softmax(-1)
        divergence += float((true_log.exp() * (true_log - ours.log_softmax(-1))).sum())
        agreed += int((ours.argmax(-1) == true.argmax(-1)).sum())
    positions, square = truth.shape[0], torch.cat(squares)
    typical = float(square.median().sqrt())
    return Difference(largest, float(square.mean().sqrt()), typical, divergence / positions, agreed / positions)


def compare_states(states: torch.Tensor, truth: torch.Tensor) -> Difference:
    """Compare hidden states [..., hidden] with float64 truth of the same shape, the median being over positions.

    Raises:
        ValueError: if the shapes differ.
    """
    _same_shape(states, truth)
    error = (states.double() - truth.double()).abs().flatten(0, -2)
    square = error.square().mean(-1)
    return Difference(float(error.max()), float(square.mean().sqrt()), float(square.median().sqrt()))


def compare_values(values: torch.Tensor, truth: torch.Tensor) -> Difference:
    """Compare plain numbers (a loss, one gradient) with float64 truth of the same shape.

    Raises:
        ValueError: if the shapes differ.
    """
    _same_shape(values, truth)
    error = (values.double() - truth.double()).abs()
    rms = float(error.square().mean().sqrt())
    return Difference(float(error.max()), rms, rms)


def compare_all(values: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> Difference:
    """Compare two sets of tensors of the same names as if each were one long vector.

    Raises:
        ValueError: if the names or a shape differ.
    """
    if values.keys() != truth.keys():
        raise ValueError(f"Tensors on one side only: {sorted(values.keys() ^ truth.keys())[:5]}.")
    parts = [(compare_values(values[name], truth[name]), truth[name].numel()) for name in truth]
    largest = 0.0
    for part, _ in parts:
        largest = _larger(largest, part.max)
    total = sum(count for _, count in parts)
    rms = (sum(part.rms**2 * count for part, count in parts) / total) ** 0.5
    return Difference(largest, rms, median(part.rms for part, _ in parts))


def _larger(largest: float, entry: float) -> float:
    """The larger of two numbers; NaN wins, so that it can never hide."""
    return entry if entry != entry or (largest == largest and entry > largest) else largest


def _same_shape(values: torch.Tensor, truth: torch.Tensor) -> None:
    if values.shape != truth.shape:
        raise ValueError(f"The result has shape {tuple(values.shape)}, the truth {tuple(truth.shape)}.")
