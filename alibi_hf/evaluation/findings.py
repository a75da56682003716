"""What an evaluation found, in words that follow from its numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alibi_hf.evaluation.report import Evaluation, ModelEvaluation, Protocol, Reading

LARGEST = 1e100  # a perplexity past it is shown, and neither drawn nor compared
WITHIN = 0.01  # a model holds to a length as long as no perplexity is more than this above its best before


def of_protocol(model: ModelEvaluation, protocol: Protocol) -> list[Reading]:
    """Return the readings of one protocol, from the shortest length to the longest."""
    return sorted((r for r in model.readings if r.protocol == protocol), key=lambda reading: reading.length)


def telling(model: ModelEvaluation) -> list[Reading]:
    """Return the readings that findings are about: those of the sliding protocol, or else of the other."""
    return of_protocol(model, "sliding") or of_protocol(model, "non-overlapping")


def finite_perplexity(reading: Reading) -> float | None:
    """Return the perplexity; None where there is none that can be drawn or compared."""
    found = reading.perplexity
    return found if found is not None and found <= LARGEST else None


def why_none(reading: Reading) -> str:
    """Return why there is no finite perplexity, or an empty string where there is one."""
    if reading.failure:
        return reading.failure
    if reading.loss is None or math.isnan(reading.loss):
        return "the loss is not a number"
    if math.isinf(reading.perplexity or 0.0):
        return f"the perplexity is infinite, of a loss of {reading.loss:g}"
    return "" if finite_perplexity(reading) is not None else f"the perplexity is past {LARGEST:.0e}"


def holds_to(readings: Sequence[Reading]) -> int:
    """Return the longest length up to which no perplexity is worse than the best before it; 0 where the first failed.

    Args:
        readings: of one model by one protocol, from the shortest length to the longest. Worse is what is more than
            `WITHIN` above.
    """
    held, best = 0, math.inf
    for reading in readings:
        found = finite_perplexity(reading)
        if found is None or found > best * (1 + WITHIN):
            break
        held, best = reading.length, min(best, found)
    return held


def against_shortest(model: ModelEvaluation, protocol: Protocol) -> dict[int, float]:
    """Return by length the perplexity over that at the shortest length, which has read the same text.

    One protocol is compared with itself only: the sliding one predicts fewer tokens of the text than the other.
    """
    numbers = {r.length: found for r in of_protocol(model, protocol) if (found := finite_perplexity(r)) is not None}
    return {length: found / numbers[min(numbers)] for length, found in numbers.items()} if len(numbers) > 1 else {}


def headline(report: Evaluation) -> str:
    """Return what was found in one line."""
    longest = max((reading.length for model in report.models for reading in model.readings), default=0)
    if not any(finite_perplexity(reading) is not None for model in report.models for reading in model.readings):
        return "No model could be read"
    if len({reading.length for model in report.models for reading in model.readings}) == 1:
        return f"Perplexity at {longest:,} tokens"
    holding = [model.name for model in report.models if not model.failure and holds_to(telling(model)) == longest]
    if not holding:
        return f"No model holds to {longest:,} tokens"
    names = ", ".join(map(shortened, holding))
    names = names if len(names) <= 80 else f"{len(holding)} of {len(report.models)} models"
    return f"Holds to {longest:,} tokens: {names}"


def finding(model: ModelEvaluation) -> str:
    """Return one sentence about a model: how far it holds, and what comes then."""
    readings = telling(model)
    numbers = {r.length: found for r in readings if (found := finite_perplexity(r)) is not None}
    if model.failure or not readings:
        return f"{model.name} could not be read: {model.failure or 'no length was left'}"
    if not numbers:
        return f"{model.name} {'; '.join(failures(model, readings))}"
    held, longest, best = holds_to(readings), readings[-1].length, min(numbers, key=lambda length: numbers[length])
    if len(readings) == 1:
        return f"{model.name} has a perplexity of {number(numbers[held])} at {held:,} tokens, the only length"
    parts = []
    if held == longest:
        lowest = f"{number(numbers[best])} at best ({best:,} tokens)"
        lowest = "its best" if numbers[held] == numbers[best] else lowest
        parts.append(f"perplexity {number(numbers[held])} there, {lowest}")
    elif (last := max(numbers)) > held:
        times = numbers[last] / numbers[best]
        parts.append(
            f"perplexity {number(numbers[last])} at {last:,} tokens, {times:.3g} times its best "
            f"({number(numbers[best])} at {best:,})"
        )
    start = f"{model.name} {_held(model, held)}" if held else model.name
    return f"{start}: {'; '.join(parts + failures(model, readings))}"


def _held(model: ModelEvaluation, held: int) -> str:
    """How far the model holds, beside its training length."""
    trained = model.trained_length
    if trained is None:
        return f"holds to {held:,} tokens"
    if held == trained:
        return f"holds to {held:,} tokens, its training length"
    if held < trained:
        return f"holds to {held:,} tokens, within its training length of {trained:,}"
    return f"holds to {held:,} tokens, {held / trained:.3g} times its training length"


def failures(model: ModelEvaluation, readings: Sequence[Reading] | None = None) -> list[str]:
    """Return one line a reason why there is no perplexity, with the lengths; of all readings if none are given.

    Reasons that differ in numbers only are one, in the words of the shortest length.
    """
    if model.failure:
        return [f"fails at every length: {model.failure}"]
    readings = sorted(model.readings if readings is None else readings, key=lambda reading: reading.length)
    reasons: dict[str, list[Reading]] = {}
    for reading in readings:
        if reason := why_none(reading):
            reasons.setdefault(re.sub(r"\d+", "0", reason), []).append(reading)
    lengths = {reading.length for reading in readings}
    return [f"fails {_where({r.length for r in found}, lengths)}: {why_none(found[0])}" for found in reasons.values()]


def _where(some: set[int], lengths: set[int]) -> str:
    """Say which of `lengths` are meant."""
    if some == lengths:
        return "at every length"
    if len(some) > 1 and some == {length for length in lengths if length >= min(some)}:
        return f"from {min(some):,} tokens on"
    return f"at {', '.join(f'{length:,}' for length in sorted(some))} tokens"


def tokenizers_differ(report: Evaluation) -> bool:
    """True if the models cut the text into different tokens, so that their perplexities are not to be compared."""
    return len({(model.vocabulary, model.tokens) for model in report.models if not model.failure}) > 1


def all_notes(report: Evaluation) -> list[str]:
    """Return what a reader has to know, with the names of the models that it is about where it is not about all."""
    about: dict[str, list[str]] = {}
    for model in report.models:
        for note in model.notes:
            about.setdefault(note, []).append(model.name)
    whole = [
        note if len(names) == len(report.models) else f"{', '.join(names)}: {note}" for note, names in about.items()
    ]
    return report.notes + whole


def number(value: float | None) -> str:
    """Return a perplexity as tables show it: four digits, or a power of ten; nothing for None."""
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value):
        return "infinite"
    return f"{value:.2e}" if value >= 1e6 else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def shortened(name: str, most: int = 48) -> str:
    """Return a name with its middle left out where it is longer than `most` characters."""
    name = " ".join(name.split())
    half = (most - 3) // 2
    return name if len(name) <= most else f"{name[:half]}...{name[-half:]}"


__all__ = [
    "WITHIN",
    "against_shortest",
    "all_notes",
    "failures",
    "finding",
    "finite_perplexity",
    "headline",
    "holds_to",
    "number",
    "of_protocol",
    "shortened",
    "telling",
    "tokenizers_differ",
    "why_none",
]
