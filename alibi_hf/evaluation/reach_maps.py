"""What the heat maps of a reach show, one layer a row and one head a column; the page and the picture draw the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alibi_hf.evaluation.reach_report import LEAST
from alibi_hf.evaluation.reach_words import name, percent, tokens

if TYPE_CHECKING:
    from alibi_hf.evaluation.reach_report import HeadReach, LengthReach


@dataclass(frozen=True)
class HeadMap:
    """One heat map.

    Attributes:
        title, caption: in words.
        value: of a head; `shown`: how it is written; `short`: likewise, where there is room for a few digits only.
        low, high: what has the weakest and the strongest colour; None: the smallest and the largest value.
        logarithmic: shaded by the logarithm.
    """

    title: str
    caption: str
    value: Callable[[HeadReach], float]
    shown: Callable[[HeadReach], str]
    short: Callable[[HeadReach], str]
    low: float | None = None
    high: float | None = None
    logarithmic: bool = False

    def limits(self, found: LengthReach) -> tuple[float, float]:
        """Return the values of the weakest and of the strongest colour."""
        values = [self.value(head) for head in found.heads]
        low = min(values) if self.low is None else self.low
        return low, max(values) if self.high is None else self.high

    def rows(self, found: LengthReach) -> list[list[float]]:
        """Return the values, a list a layer."""
        return [[self.value(head) for head in layer] for layer in by_layer(found)]

    def digits(self, found: LengthReach) -> list[list[str]]:
        """Return the short forms of the values, a list a layer."""
        return [[self.short(head) for head in layer] for layer in by_layer(found)]

    def names(self, found: LengthReach) -> list[list[str]]:
        """Return what each square says, a list a layer."""
        return [
            [f"{name(head)}, slope {head.slope:.4g}: {self.shown(head)}" for head in layer] for layer in by_layer(found)
        ]


def by_layer(found: LengthReach) -> list[list[HeadReach]]:
    """Return the heads, a list a layer."""
    layers: dict[int, list[HeadReach]] = {}
    for head in found.heads:
        layers.setdefault(head.layer, []).append(head)
    return list(layers.values())


def head_maps(found: LengthReach) -> list[HeadMap]:
    """Return the heat maps of a length."""
    return [
        HeadMap(
            "Mean distance, tokens",
            "How far each head attends, weighted by attention; shaded by the logarithm.",
            lambda head: max(head.mean_distance, LEAST),
            lambda head: f"{tokens(head.mean_distance)} tokens",
            lambda head: f"{head.mean_distance:.3g}",
            logarithmic=True,
        ),
        HeadMap(
            "Mean distance over that of the bias alone",
            "At 1 the text does not change how far a head attends; above, it looks farther than its slope says.",
            lambda head: head.over_bias,
            lambda head: f"{head.over_bias:.2f} times {tokens(head.bias_distance)} tokens",
            lambda head: f"{head.over_bias:.2f}",
        ),
        HeadMap(
            "Late attention on the first token",
            "Of the queries in the second half of the text. Above one half, a head is called collapsed.",
            lambda head: head.late_first_token,
            lambda head: percent(head.late_first_token),
            lambda head: percent(head.late_first_token),
            low=0.0,
            high=1.0,
        ),
        HeadMap(
            "Provable window, tokens",
            "Keys farther away cannot change what the head computes; shaded by the logarithm up to the whole text.",
            lambda head: float(head.window),
            lambda head: f"{head.window} tokens, {percent(head.saved)} of all pairs left out",
            lambda head: str(head.window),
            high=float(found.length),
            logarithmic=True,
        ),
    ]


__all__ = ["HeadMap", "by_layer", "head_maps"]
