"""Perplexity against length as a picture; needs matplotlib.

from alibi_hf.evaluation.plot import plot_perplexity
plot_perplexity(report, "perplexity.png")  # or .svg, .pdf: whatever matplotlib writes
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten, wrap
from typing import TYPE_CHECKING, Any

from alibi_hf.evaluation.axes import edge_marks, highest_stack, token_axis, tokens, value_axis
from alibi_hf.evaluation.findings import failures, finite_perplexity, headline, of_protocol, shortened
from alibi_hf.pages.figures import drawing, line_style

if TYPE_CHECKING:
    from alibi_hf.evaluation.report import Evaluation, ModelEvaluation, Protocol

PANELS: dict[Protocol, str] = {"non-overlapping": "non-overlapping windows", "sliding": "sliding window"}
TRAINED = "a triangle below stands at the length a model was trained at"
FAILED = "a cross above at a length where it has no perplexity"
WIDTH, PANEL_HEIGHT, LINE = 11.0, 3.6, 0.2  # inches
CHARACTERS = 170  # in a line of text as wide as the picture
REASON = 3 * CHARACTERS  # of a failure, at most


def plot_perplexity(report: Evaluation, path: str | os.PathLike) -> None:
    """Draw both protocols side by side on the same axes, a line a model; why a model fails stands below.

    The same numbers and versions give the same bytes. What was at `path` is replaced.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    with drawing(picture=True) as able:
        if not able:
            raise ImportError('pictures need matplotlib: pip install "alibi-hf[plots]"')
        figure = _picture(report)
        figure.savefig(Path(path), dpi=150, facecolor="white", metadata=_undated(Path(path)))


def _picture(report: Evaluation) -> Any:
    from matplotlib.figure import Figure

    notes = _below(report)
    columns = 2 if max((len(label(model)) for model in report.models), default=0) < 70 else 1
    rows = math.ceil(len(report.models) / columns)
    under = 0.55 + LINE * (rows + len(notes) + 0.5)
    height = PANEL_HEIGHT + 0.6 + under
    figure = Figure(figsize=(WIDTH, height))
    panels = figure.subplots(1, len(PANELS), sharey=True)
    figure.subplots_adjust(left=0.075, right=0.985, wspace=0.06, top=1 - 0.75 / height, bottom=under / height)
    figure.text(0.012, 1 - 0.3 / height, shorten(headline(report), 110, placeholder=" ..."), fontsize=12, va="center")
    for axes, (protocol, title) in zip(panels, PANELS.items(), strict=True):
        axes.set_title(title)
        draw_perplexity(axes, report, protocol, picture=True)
    panels[0].set_ylabel("perplexity")
    lines = [_handle(number) for number in range(len(report.models))]
    place = {"loc": "upper left", "bbox_to_anchor": (0.006, (under - 0.5) / height), "borderaxespad": 0.3}
    names = [label(model) for model in report.models]
    figure.legend(lines, names, ncols=columns, frameon=False, fontsize=9, handlelength=3.5, labelspacing=0.35, **place)
    figure.text(0.012, 0.08 / height, "\n".join(notes), fontsize=8.5, va="bottom", linespacing=1.4)
    return figure


def _handle(number: int) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **line_style(number, picture=True))


def draw_perplexity(axes: Any, report: Evaluation, protocol: Protocol, picture: bool = False) -> None:
    """Draw one protocol to a panel whose axes are those of all protocols.

    Args:
        axes: of matplotlib.
        picture: True for a file of its own, False for a figure of a page; see `drawing`.
    """
    trained, failed = [], []
    lengths = _lengths(report)
    for place, model in enumerate(report.models):
        style = line_style(place, picture)
        draw_line(axes, [(r.length, finite_perplexity(r)) for r in of_protocol(model, protocol)], style)
        failed += [(r.length, style["color"]) for r in of_protocol(model, protocol) if finite_perplexity(r) is None]
        trained += [(length, style["color"]) for length in _trained_within(model, lengths)]
    token_axis(axes, lengths)
    readings = [reading for model in report.models for reading in model.readings]
    values = [found for reading in readings if (found := finite_perplexity(reading)) is not None]
    above = max((highest_stack(_lost(report, each)) for each in PANELS), default=0)
    value_axis(axes, values, above, highest_stack(place for place, _ in trained))
    edge_marks(axes, failed, "x", top=True)
    edge_marks(axes, trained, "^", top=False)
    axes.set_xlabel("tokens in a window (1k is 1,024)")


def _lengths(report: Evaluation) -> set[int]:
    return {reading.length for model in report.models for reading in model.readings}


def _trained_within(model: ModelEvaluation, lengths: set[int]) -> list[int]:
    """The training length, where the axis has a place for it."""
    known = model.trained_length
    return [known] if known and lengths and min(lengths) <= known <= max(lengths) else []


def marks_in_words(report: Evaluation, protocols: Iterable[Protocol]) -> str:
    """Return a sentence on the marks that panels of these protocols have; nothing where they have none."""
    trained = any(_trained_within(model, _lengths(report)) for model in report.models)
    failed = any(_lost(report, protocol) for protocol in protocols)
    said = "; ".join([TRAINED] * trained + [FAILED] * failed)
    return f"{said[0].upper()}{said[1:]}." if said else ""


def _lost(report: Evaluation, protocol: Protocol) -> list[float]:
    readings = [reading for model in report.models for reading in of_protocol(model, protocol)]
    return [reading.length for reading in readings if finite_perplexity(reading) is None]


def draw_line(axes: Any, points: Iterable[tuple[float, float | None]], style: dict[str, Any]) -> None:
    """Draw a line that breaks where there is no value."""
    places = [(x, math.nan if y is None else y) for x, y in points]
    if places:
        axes.plot(*zip(*places, strict=True), **style)


def label(model: ModelEvaluation, whole: bool = False) -> str:
    """Return what a key calls a model: its name, shortened unless `whole`, its positions and its training length."""
    name = model.name if whole else shortened(model.name)
    known = [model.positions, f"trained at {tokens(model.trained_length)}" if model.trained_length else ""]
    return ", ".join(filter(None, [name, *known])) + (": fails" if model.failure else "")


def _below(report: Evaluation) -> list[str]:
    """The lines under the key: what the marks mean, and why what fails does."""
    failed = [f"{shortened(model.name)} {line}" for model in report.models for line in failures(model)]
    lines = [line for line in [marks_in_words(report, PANELS)] if line]
    for reason in failed:
        lines += wrap(shorten(reason, REASON, placeholder=" ..."), CHARACTERS, subsequent_indent="    ")
    return lines


def _undated(path: Path) -> dict[str, Any] | None:
    return {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(path.suffix[1:].lower())


__all__ = ["PANELS", "draw_line", "draw_perplexity", "label", "marks_in_words", "plot_perplexity"]
