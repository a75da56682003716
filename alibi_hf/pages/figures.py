"""Figures as SVG that takes its colours from the page's style sheet; needs matplotlib.

Text stays text, nothing holds a date, and names inside the SVG come from fixed salts: the same numbers give the same
bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

# Colours that stand for variables of page.css: matplotlib draws with the one, the page shows the other.
INK, DIM, LINE, OURS, UPSTREAM, LIMIT = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
VARIABLES = {INK: "ink", DIM: "dim", LINE: "line", OURS: "ours", UPSTREAM: "upstream", LIMIT: "limit"}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": DIM,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINE,
    "xtick.color": DIM,
    "ytick.color": DIM,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
}
SIZE = (4.6, 3.2)  # inches; the page scales it to the width there is
METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@dataclass(frozen=True)
class Figure:
    """One SVG element, and what it shows in words."""

    svg: str
    caption: str


@contextmanager
def drawing() -> Iterator[bool]:
    """Give matplotlib this style inside the block; False, and no style, where it is not installed."""
    try:
        import matplotlib.style
    except ImportError:
        yield False
        return
    with matplotlib.style.context(STYLE, after_reset=True):
        yield True


def panel(title: str) -> tuple[Any, Any]:
    """Return a figure with no background, and its one panel."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=SIZE)
    figure.subplots_adjust(left=0.16, right=0.88, bottom=0.16, top=0.9)
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.set_title(title, parse_math=False)
    return figure, axes


def logarithmic(scale: Callable[..., None], axis: Any, base: int, form: str) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks and none between them."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    scale("log", base=base)
    axis.set_major_formatter(FuncFormatter(lambda value, _: form.format(value)))
    axis.set_minor_formatter(NullFormatter())


def whole_numbers(axis: Any) -> None:
    """Give an axis ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def as_svg(figure: Any, title: str, caption: str) -> str:
    """Return the figure as an SVG element for the middle of a page: labelled, without ids that nothing refers to."""
    import matplotlib

    buffer = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata=METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    for color, name in VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    label = escape(f"{title}. {caption}")
    opening = f'<svg viewBox="0 0 {SIZE[0] * 72:g} {SIZE[1] * 72:g}" role="img" aria-label="{label}" '
    opening += 'xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
