"""The figures of a verification's page; they need matplotlib."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import floor, isfinite, log10
from typing import TYPE_CHECKING

from alibi_hf.pages.figures import LIMIT, OURS, UPSTREAM, Figure, as_svg, drawing, logarithmic, panel, whole_numbers
from alibi_hf.verification.render import share_of_limit

if TYPE_CHECKING:
    from alibi_hf.verification.report import BiasSample, Check, Verification

LEAST = 1e-10  # a logarithmic axis has no zero: what is smaller is drawn here
MARKERS = 500  # of upstream's bias, at most


def draw(report: Verification) -> dict[str, list[Figure]] | None:
    """Return the figures under their headings; None where matplotlib is not installed."""
    with drawing() as able:
        if not able:
            return None
        return {
            "Error by layer": _errors(_worst_of_each_layer(report.checks), "layer", lambda check: check.layer),
            "Error by length": _errors(
                [check for check in report.checks if _is_whole(check)],
                "tokens in the row",
                lambda check: check.length,
            ),
            "Bias of each head against upstream's": _bias(report.bias, _bias_limit(report)) if report.bias else [],
        }


def _worst_of_each_layer(checks: Sequence[Check]) -> list[Check]:
    """Return, of the lengths that a layer was checked at, the one that is nearest to its limit or beyond it."""
    worst: dict[tuple[str, str, int | None], Check] = {}
    for check in checks:
        key = (check.name, check.dtype, check.layer)
        if key[2] is not None and (key not in worst or share_of_limit(check) > share_of_limit(worst[key])):
            worst[key] = check
    return list(worst.values())


def _is_whole(check: Check) -> bool:
    """True for the logits of whole rows, which are run at several lengths."""
    return check.name == "logits" or re.match(r"logits, \w+ bias$", check.name) is not None


def _bias_limit(report: Verification) -> float | None:
    limits = [check.limit for check in report.checks if check.name == "bias, against upstream's"]
    return limits[0] if limits else None


def _errors(checks: Sequence[Check], axis: str, place: Callable[[Check], int | None]) -> list[Figure]:
    """Return one figure for each name and dtype: our error, upstream's and the limit over `place`."""
    kinds: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        kinds.setdefault((check.name, check.dtype), []).append(check)
    return [_error_lines(f"{name}, {dtype}", group, axis, place) for (name, dtype), group in kinds.items()]


def _error_lines(title: str, checks: list[Check], axis: str, place: Callable[[Check], int | None]) -> Figure:
    figure, axes = panel(title)
    checks = sorted(checks, key=lambda check: place(check) or 0)
    marks = {"upstream": (UPSTREAM, "s--"), "limit": (LIMIT, ":"), "ours": (OURS, "o-")}
    drawn = []
    for side, (color, form) in marks.items():
        points = [(place(check), getattr(check, side)) for check in checks]
        known = [(x, max(y, LEAST)) for x, y in points if y is not None and isfinite(y)]
        if known:
            axes.plot(*zip(*known, strict=True), form, color=color, label=side, markersize=4)
            drawn += [y for _, y in known]
    logarithmic(axes.set_yscale, axes.yaxis, 10, "{:.0e}")
    axes.set_ylim(*_decades(drawn))
    if axis == "layer":
        whole_numbers(axes.xaxis)
    else:
        logarithmic(axes.set_xscale, axes.xaxis, 2, "{:g}")
        axes.set_xticks(sorted({check.length for check in checks}))
    axes.set_xlabel(axis)
    axes.set_ylabel("error, as gated")
    if drawn:
        axes.legend(frameon=False, fontsize=9)
    lost = sum(check.ours is not None and not isfinite(check.ours) for check in checks)
    failed = sum(not check.passed for check in checks)
    caption = f"Our error and upstream's against float64, with the limit for ours. {len(checks)} points, "
    caption += "all within the limit." if not failed else f"{failed} outside the limit."
    caption += " Of several lengths, the one nearest to its limit." if axis == "layer" else ""
    caption += f" {lost} of ours are not finite and cannot be drawn." if lost else ""
    return Figure(as_svg(figure, title, caption), caption)


def _decades(values: list[float]) -> tuple[float, float]:
    """Return whole powers of ten around the values, so that the axis always has numbers."""
    low, high = min(values, default=LEAST), max(values, default=1.0)
    return 10.0 ** floor(log10(low)), 10.0 ** (floor(log10(high)) + 1)


def _bias(sample: BiasSample, limit: float | None) -> list[Figure]:
    return [_bias_lines(sample), _bias_differences(sample, limit)]


def _bias_lines(sample: BiasSample) -> Figure:
    """Minus the bias over the distance, a line for each of our heads under upstream's points."""
    title = f"bias of the last of {sample.length} tokens"
    figure, axes = panel(title)
    every = max(1, len(sample.ours) * len(sample.distances) // MARKERS)
    for head, (ours, theirs) in enumerate(zip(sample.ours, sample.upstream, strict=True)):
        names = ("ours", "upstream") if head == 0 else (None, None)
        axes.plot(sample.distances, [-value for value in ours], "-", color=OURS, linewidth=1, label=names[0])
        points = {"markevery": every, "markersize": 4, "fillstyle": "none", "label": names[1]}
        axes.plot(sample.distances, [-value for value in theirs], "o", color=UPSTREAM, **points)
    last = [-head[-1] for head in sample.ours]
    for head in sorted({last.index(max(last)), last.index(min(last))}):
        at = (sample.distances[-1], last[head])
        axes.annotate(f"head {head}", at, xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    logarithmic(axes.set_xscale, axes.xaxis, 2, "{:g}")
    logarithmic(axes.set_yscale, axes.yaxis, 10, "{:g}")
    axes.set_xlabel("tokens between query and key")
    axes.set_ylabel("minus the bias")
    axes.legend(frameon=False, fontsize=9)
    caption = f"What each of {len(sample.ours)} heads takes off the score of a key: our lines, upstream's circles."
    if any(value == 0 for head in sample.upstream for value in head):
        caption += " There is no circle where upstream's rounding makes two keys the same."
    return Figure(as_svg(figure, title, caption), caption)


def _bias_differences(sample: BiasSample, limit: float | None) -> Figure:
    """The largest difference of each head, relative to its largest bias."""
    title = "largest difference of each head"
    figure, axes = panel(title)
    differences = [_difference(*head) for head in zip(sample.ours, sample.upstream, strict=True)]
    points = [max(value, LEAST) if isfinite(value) else 1.0 for value in differences]
    axes.plot(range(len(points)), points, "o", color=OURS, markersize=4)
    if limit is not None:
        axes.axhline(limit, color=LIMIT, linestyle=":", label="limit")
        axes.legend(frameon=False, fontsize=9)
    logarithmic(axes.set_yscale, axes.yaxis, 10, "{:.0e}")
    axes.set_ylim(LEAST / 2, 2 * max(1e-5, *points))
    whole_numbers(axes.xaxis)
    axes.set_xlabel("head")
    axes.set_ylabel("relative to the largest bias")
    same = sum(value == 0 for value in differences)
    caption = f"{same} of {len(points)} heads agree in every bit and are drawn at {LEAST:.0e}"
    caption += "." if limit is not None else "; upstream rounds its bias, so that there is no limit."
    return Figure(as_svg(figure, title, caption), caption)


def _difference(ours: list[float], theirs: list[float]) -> float:
    largest = max(abs(value) for value in theirs)
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / (largest or 1.0)


__all__ = ["draw"]
