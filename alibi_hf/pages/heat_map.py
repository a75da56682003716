"""A heat map as SVG: a square a number, the larger the stronger its colour; a pointer that rests on it shows more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .figures import Figure

WIDTH = 331  # as wide as the other figures, in the unit of their text
LEFT, TOP, BOTTOM, LEGEND = 34, 22, 34, 64
MAX_HEIGHT = 18  # of a row
ROOM = (22, 12)  # width and height that digits need
TICKS = 12  # numbers along an axis, at most


def heat_map(
    title: str,
    caption: str,
    values: Sequence[Sequence[float]],
    names: Sequence[Sequence[str]],
    digits: Sequence[Sequence[str]],
    axes: tuple[str, str],
    limits: tuple[float, float],
    logarithmic: bool = False,
) -> Figure:
    """Return a figure of `values`, a list a row.

    Args:
        names: what is shown for each value where the pointer rests; digits: inside its square, if there is room.
        axes: what rows and columns are, both counted from 0.
        limits: the values of the weakest and of the strongest colour; what is beyond is drawn like them.
        logarithmic: shade by the logarithm.
    """
    rows, columns = len(values), len(values[0])
    width = (WIDTH - LEFT - LEGEND) / columns
    height = max(2.0, min(MAX_HEIGHT, width, 300 / rows))
    readable = width >= ROOM[0] and height >= ROOM[1]
    cells = [
        _cell(
            (LEFT + column * width, TOP + row * height, width, height),
            _shade(value, limits, logarithmic),
            names[row][column],
            digits[row][column] if readable else "",
        )
        for row, line in enumerate(values)
        for column, value in enumerate(line)
    ]
    bottom = TOP + rows * height
    parts = [
        _text(0, 11, title, "ink", 10),
        *(_text(LEFT - 4, TOP + (row + 0.5) * height + 3, str(row), "dim", 8, "end") for row in _ticks(rows, height)),
        *(
            _text(LEFT + (column + 0.5) * width, bottom + 10, str(column), "dim", 8, "middle")
            for column in _ticks(columns, width)
        ),
        _text(LEFT + columns * width / 2, bottom + 24, axes[1], "dim", 9, "middle"),
        f'<g transform="translate(8 {TOP + rows * height / 2:.2f}) rotate(-90)">'
        + _text(0, 0, axes[0], "dim", 9, "middle")
        + "</g>",
        *_legend(limits, logarithmic),
        *cells,
    ]
    total = max(bottom, TOP + 72) + BOTTOM
    label = escape(f"{title}. {caption}")
    svg = f'<svg viewBox="0 0 {WIDTH} {total:.0f}" role="img" aria-label="{label}">\n' + "\n".join(parts) + "\n</svg>\n"
    return Figure(svg, caption)


def plain(value: float) -> str:
    """Return a number with three digits, or all of a larger one."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cell(place: tuple[float, float, float, float], shade: float, name: str, digits: str) -> str:
    """Return one square with its name and its digits; `place` is x, y, width and height."""
    x, y, width, height = place
    square = (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="var(--ours)" '
        f'fill-opacity="{shade:.3f}"/>'
    )
    color = "ink" if shade < 0.5 else "paper"
    inside = _text(x + width / 2, y + height / 2 + 2.5, digits, color, 7, "middle") if digits else ""
    return f"<g><title>{escape(name)}</title>{square}{inside}</g>"


def _shade(value: float, limits: tuple[float, float], logarithmic: bool) -> float:
    """Return the opacity of a value, from 0.04 to 1."""
    low, high = limits
    if logarithmic:
        value, low, high = (math.log(max(each, 1e-9)) for each in (value, low, high))
    share = (value - low) / (high - low) if high > low else 0.5
    return 0.04 + 0.96 * min(1.0, max(0.0, share))


def _ticks(count: int, size: float) -> range:
    """Return which of `count` places, each of `size`, have a number: not more than there is room for."""
    return range(0, count, max(1, math.ceil(count / TICKS), math.ceil(12 / size)))


def _legend(limits: tuple[float, float], logarithmic: bool) -> list[str]:
    """Return five squares from the largest value to the smallest, each with its number."""
    low, high = limits
    parts = []
    for step in range(5):
        share = 1 - step / 4
        value = low * (high / low) ** share if logarithmic else low + (high - low) * share
        y = TOP + step * 14
        opacity = _shade(value, limits, logarithmic)
        parts.append(
            f'<rect x="{WIDTH - LEGEND + 12}" y="{y}" width="12" height="12" fill="var(--ours)" '
            f'fill-opacity="{opacity:.3f}"/>' + _text(WIDTH - LEGEND + 28, y + 9, plain(value), "dim", 8)
        )
    return parts


def _text(x: float, y: float, text: str, color: str, size: int, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.2f}" y="{y:.2f}" font-size="{size}" font-family="sans-serif" text-anchor="{anchor}" '
        f'fill="var(--{color})">{escape(text)}</text>'
    )


__all__ = ["heat_map", "plain"]
