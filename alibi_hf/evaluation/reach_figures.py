"""The figures of a reach: heat maps, which need nothing, and lines, which need matplotlib; and the picture of both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from alibi_hf.evaluation.reach_maps import HeadMap, head_maps
from alibi_hf.evaluation.reach_report import LEAST
from alibi_hf.evaluation.reach_words import model_name
from alibi_hf.pages import Figure, heat_map
from alibi_hf.pages.figures import (
    INK,
    LIMIT,
    LINE,
    OURS,
    UPSTREAM,
    as_svg,
    drawing,
    light,
    logarithmic,
    panel,
    whole_numbers,
)
from alibi_hf.pages.heat_map import plain

if TYPE_CHECKING:
    from alibi_hf.evaluation.reach_report import LengthReach, Reach

PICTURE = (10.0, 7.0)  # inches
MOST = 12  # layers and heads whose numbers stand in the picture


def draw_maps(found: LengthReach) -> list[Figure]:
    """Return the heat maps of a length."""
    return [
        heat_map(
            shown.title,
            shown.caption,
            shown.rows(found),
            shown.names(found),
            shown.digits(found),
            ("layer", "head"),
            shown.limits(found),
            shown.logarithmic,
        )
        for shown in head_maps(found)
    ]


def draw_lines(report: Reach) -> list[Figure] | None:
    """Return distance against slope, and what windows leave out by length; None where matplotlib is not installed."""
    with drawing() as able:
        if not able:
            return None
        sloped = any(head.slope > 0 for head in report.longest.heads)
        figures = [_by_slope(report.longest)] if sloped else []
        return figures + ([_distances(report), _shares(report)] if len(report.lengths) > 1 else [])


def _by_slope(found: LengthReach) -> Figure:
    title = f"mean distance against slope, {found.length} tokens"
    figure, axes = panel(title)
    heads = sorted((head for head in found.heads if head.slope > 0), key=lambda head: head.slope)
    slopes = [head.slope for head in heads]
    axes.plot(slopes, [max(head.bias_distance, LEAST) for head in heads], "-", color=LIMIT, label="by bias alone")
    distances = [max(head.mean_distance, LEAST) for head in heads]
    axes.plot(slopes, distances, "o", color=OURS, markersize=4, fillstyle="none", label="a head of a layer")
    logarithmic(axes.set_xscale, axes.xaxis, 2, "{:.4g}")
    logarithmic(axes.set_yscale, axes.yaxis, 10, "{:g}")
    axes.set_xlabel("slope")
    axes.set_ylabel("tokens")
    axes.legend(frameon=False, fontsize=9)
    caption = "On the line a head attends as far as it would if all keys were alike to it; above, farther."
    left = len(found.heads) - len(heads)
    caption += f" {left} heads without a slope are not drawn." if left else ""
    return Figure(as_svg(figure, title, caption), caption)


def _distances(report: Reach) -> Figure:
    """Mean distance by length, a line a head that stands for all layers."""
    title = "mean distance by length"
    figure, axes = panel(title)
    lengths = [found.length for found in report.lengths]
    numbers = sorted({head.head for head in report.longest.heads})
    for number in numbers:
        own = [[head.mean_distance for head in found.heads if head.head == number] for found in report.lengths]
        axes.plot(lengths, [max(sum(each) / len(each), LEAST) for each in own], "o-", color=OURS, markersize=3)
    logarithmic(axes.set_yscale, axes.yaxis, 10, "{:g}")
    _lengths(axes, lengths)
    axes.set_ylabel("tokens")
    caption = f"{len(numbers)} heads, the mean over the layers of each. A flat line has all the text that it reaches."
    return Figure(as_svg(figure, title, caption), caption)


def _shares(report: Reach) -> Figure:
    """What windows leave out by length: ideally, and as sdpa plans it."""
    title = "pairs of query and key that windows leave out"
    figure, axes = panel(title)
    lengths = [found.length for found in report.lengths]
    lines = {"each head its own window": (OURS, "o-", "saved"), "as sdpa reads on CPU": (UPSTREAM, "s--", "planned")}
    for label, (color, form, attribute) in lines.items():
        shares = [100 * getattr(found, attribute) for found in report.lengths]
        axes.plot(lengths, shares, form, color=color, markersize=4, label=label)
    axes.set_ylim(0, 100)
    _lengths(axes, lengths)
    axes.set_ylabel("% of all causal pairs")
    axes.legend(frameon=False, fontsize=9)
    caption = (
        "Windows do not grow with the text, so that they leave out more and more of it. Short texts are read whole."
    )
    return Figure(as_svg(figure, title, caption), caption)


def _lengths(axes: Any, lengths: list[int]) -> None:
    logarithmic(axes.set_xscale, axes.xaxis, 2, "{:g}")
    axes.set_xticks(lengths)
    axes.set_xlabel("tokens of text")


def draw_picture(report: Reach, path: Path) -> bool:
    """Draw the heat maps of the longest length to a PNG file; False where matplotlib is not installed."""
    with drawing(picture=True) as able:
        if not able:
            return False
        from matplotlib.figure import Figure as Canvas

        found = report.longest
        figure = Canvas(figsize=PICTURE, layout="constrained")
        for axes, shown in zip(figure.subplots(2, 2).flat, head_maps(found), strict=True):
            _draw_map(figure, axes, shown, found)
        figure.suptitle(f"{model_name(report)}, {found.length} tokens, {report.dtype}")
        figure.savefig(path, dpi=120, metadata={"Software": None})
        return True


def _draw_map(figure: Any, axes: Any, shown: HeadMap, found: LengthReach) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    low, high = shown.limits(found)
    high = high if high > low else 1.01 * low + 1e-9
    norm = (LogNorm if shown.logarithmic else Normalize)(low, high)
    colors = LinearSegmentedColormap.from_list("reach", [light(LINE), light(OURS)])
    rows, digits = shown.rows(found), shown.digits(found)
    image = axes.imshow(rows, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes)
    steps = [step / 4 for step in range(5)]
    marks = [low * (high / low) ** step if shown.logarithmic else low + (high - low) * step for step in steps]
    bar.set_ticks(marks, labels=[plain(mark) for mark in marks])
    bar.ax.minorticks_off()
    if len(rows) <= MOST and len(rows[0]) <= MOST:
        for layer, line in enumerate(rows):
            for head, value in enumerate(line):
                color = light(INK) if norm(value) < 0.5 else "white"
                axes.text(head, layer, digits[layer][head], ha="center", va="center", fontsize=7, color=color)
    axes.set_title(shown.title)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.grid(False)
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)


__all__ = ["draw_lines", "draw_maps", "draw_picture"]
