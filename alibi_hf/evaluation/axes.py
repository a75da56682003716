"""Lines over tokens, an axis of tokens, an axis of values, and marks along their edges; for matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

LABELS = 9  # along an axis of tokens, at most
LOGARITHMIC_FROM = 4.0  # largest over smallest value
FLAT = 0.05  # an axis shows at least this share of its values, so that noise does not look like a slope
STEP, STACK = 0.06, 0.3  # between marks that stand over each other, and all of them, at most: shares of the axis


def token_axis(axes: Any, lengths: Iterable[int]) -> None:
    """Make the axis below one of tokens, powers of two evenly spaced, with the lengths at its ticks."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ticks = sorted(set(lengths)) or [1]
    low, high = ticks[0], ticks[-1]
    margin = (high / low) ** 0.04 if high > low else 1.5
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    labelled = _apart(ticks, math.log2(high / low) / LABELS if high > low else 0.0)
    axes.set_xticks(ticks, [tokens(tick) if tick in labelled else "" for tick in ticks])


def _apart(ticks: Sequence[int], least: float) -> set[int]:
    """Return the ticks that have room for a label, the last among them."""
    kept = [ticks[-1]]
    for tick in reversed(ticks):
        if math.log2(kept[-1] / tick) >= least:
            kept.append(tick)
    return set(kept)


def tokens(length: int) -> str:
    """Return a number of tokens as axes show it: 32k is 32,768."""
    return f"{length // 1024}k" if length % 1024 == 0 and length else f"{length:,}"


def value_axis(axes: Any, values: Sequence[float], above: int = 0, below: int = 0) -> None:
    """Scale the axis at the left to positive values, with room for marks stacked `above` and `below` the lines.

    It is logarithmic where the largest is more than 4 times the smallest.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if not values:
        axes.set_yticks([])
        return
    low, high = min(values), max(values)
    logarithmic = high / low > LOGARITHMIC_FROM
    into: Callable[[float], float] = math.log if logarithmic else float
    start, stop = into(low), into(high)
    if not logarithmic:
        middle, half = (start + stop) / 2, max((stop - start) / 2, start * FLAT / 2)
        start, stop = middle - half, middle + half
    head, foot = (0.05 + _step(marks) * marks for marks in (above, below))
    unit = (stop - start) / (1 - head - foot)
    limits = start - foot * unit, stop + head * unit
    if logarithmic:
        axes.set_yscale("log", base=10)
        subs = (1, 2, 5) if high / low < 300 else (1,)
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=8))
        limits = math.exp(limits[0]), math.exp(limits[1])
    axes.set_ylim(*limits)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e6 else f"{value:.0e}"))
    axes.yaxis.set_minor_locator(NullLocator())


def edge_marks(axes: Any, marks: Iterable[tuple[float, str]], marker: str, top: bool) -> None:
    """Draw a mark at the top or bottom edge for each pair of tokens and colour, stacked where tokens are the same."""
    stacked: dict[float, int] = {}
    marks = list(marks)
    step = _step(highest_stack(place for place, _ in marks))
    for place, color in marks:
        count = stacked[place] = stacked.get(place, 0) + 1
        height = 1 - step * (count - 0.5) if top else step * (count - 0.5)
        form = {"marker": marker, "markersize": 6.5, "markeredgewidth": 2 if top else 0, "linestyle": "none"}
        axes.plot([place], [height], color=color, transform=axes.get_xaxis_transform(), clip_on=False, **form)


def _step(marks: int) -> float:
    return min(STEP, STACK / max(marks, 1))


def highest_stack(places: Iterable[float]) -> int:
    """Return how many marks stand over each other at most."""
    found = list(places)
    return max(map(found.count, found), default=0)


__all__ = ["edge_marks", "highest_stack", "token_axis", "tokens", "value_axis"]
