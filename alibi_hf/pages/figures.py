"""Figures as SVG that takes its colours from the page's style sheet; needs matplotlib.

Text stays text, nothing holds a date, and names inside the SVG come from fixed salts: the same numbers give the same
bytes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from io import StringIO
from typing import Any

# Colours that stand for variables of page.css: matplotlib draws with the one, the page shows the other.
INK, DIM, LINE, OURS, UPSTREAM, LIMIT = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
SERIES = tuple(f"#0102{16 + number:02x}" for number in range(8))  # of lines that stand for one model each
VARIABLES = {INK: "ink", DIM: "dim", LINE: "line", OURS: "ours", UPSTREAM: "upstream", LIMIT: "limit"}
VARIABLES |= {color: f"series-{number}" for number, color in enumerate(SERIES, 1)}
MARKERS = "osDvP*<h"  # one a colour: nobody has to tell lines apart by colour alone
DASHES = ("-", "--", "-.", ":")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "alibi-hf",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.color": INK,
    "text.parse_math": False,  # names hold what they like
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
def drawing(picture: bool = False) -> Iterator[bool]:
    """Give matplotlib this style inside the block; False, and no style, where it is not installed.

    Args:
        picture: True for a picture that is a file of its own, in the colours of the page when it is light.
    """
    try:
        import matplotlib.style
    except ImportError:
        yield False
        return
    style = {name: light(value) for name, value in STYLE.items()} if picture else STYLE
    with matplotlib.style.context(style, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names hold any sign; a box stands for it
        yield True


def light(value: Any) -> Any:
    """Return what page.css shows in light mode for a colour of this module; any other value as it is."""
    return _light_colors()[VARIABLES[value]] if value in VARIABLES else value


@cache
def _light_colors() -> dict[str, str]:
    css = (files("alibi_hf.pages") / "page.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--([\w-]+): (#\w{6})", css.partition("@media")[0]))


def line_style(number: int, picture: bool = False) -> dict[str, Any]:
    """Return how matplotlib draws the line of model `number`, from 0: colours repeat after 8, with other dashes.

    Earlier lines are wider, and still show where a later one covers them. `picture` is that of `drawing`.
    """
    of_8 = number % len(SERIES)
    return {
        "color": light(SERIES[of_8]) if picture else SERIES[of_8],
        "marker": MARKERS[of_8],
        "linestyle": DASHES[(number + number // len(SERIES)) % len(DASHES)],
        "linewidth": 2.6 - 0.2 * of_8,
        "markersize": 7.0 - 0.5 * of_8,
    }


def swatch(number: int) -> str:
    """Return the line of model `number` as a small SVG element, for a key."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(0.6, 0.22))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], **line_style(number))
    return as_svg(figure, f"line {number + 1}", "As in the figures.")


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
    width, height = (72 * inches for inches in figure.get_size_inches())
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}" '
    opening += 'xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
