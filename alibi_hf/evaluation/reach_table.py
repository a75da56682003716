"""A reach as tables: on the terminal a line a length and a line a slope, on the page a line a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from alibi_hf.evaluation.reach_words import findings, name, percent, spread, tokens

if TYPE_CHECKING:
    from alibi_hf.evaluation.reach_report import HeadReach, LengthReach, Reach

HEADS = (
    "head",
    "slope",
    "mean distance",
    "by bias alone",
    "within 50 %",
    "within 90 %",
    "on the first token",
    "late queries",
    "on its own",
    "entropy, nats",
    "G, nats",
    "window",
    "left out",
    "by sdpa",
    "",
)
ROUNDING = ("head", "slope", "dtype", "slope x position", "slope x distance", "exp(bias) is 0 from")


def as_table(report: Reach) -> RenderableType:
    """Return what the terminal shows: the findings, lengths, and the heads of all layers by slope."""
    lines = [Text(f"* {line}", overflow="fold") for line in [*findings(report), *report.notes]]
    return Group(Text(report.path_or_id, style="bold"), *lines, _lengths(report), _slopes(report.longest))


def head_cells(head: HeadReach) -> list[str]:
    """Return the cells of one head, in the order of `HEADS`."""
    return [
        name(head),
        f"{head.slope:.4g}",
        tokens(head.mean_distance),
        tokens(head.bias_distance),
        str(head.distance_50),
        str(head.distance_90),
        percent(head.first_token),
        percent(head.late_first_token),
        percent(head.own_token),
        f"{head.entropy:.2f}",
        "" if head.gap is None else f"{head.gap:.1f}",
        str(head.window),
        percent(head.saved),
        percent(head.planned),
        "collapsed" if head.collapsed else "",
    ]


def rounding_cells(found: LengthReach) -> list[list[str]]:
    """Return the cells of what 16 bits leave of the bias, a row a head and dtype, in the order of `ROUNDING`."""
    return [
        [
            f"head {entry.head}",
            f"{entry.slope:.4g}",
            entry.dtype,
            str(entry.absolute_values),
            str(entry.relative_values),
            "never" if entry.zero_distance is None else str(entry.zero_distance),
        ]
        for entry in found.rounding
    ]


def _lengths(report: Reach) -> Table:
    table = _table("by length, mean over all heads", "tokens", "distance", "collapsed", "left out", "by sdpa", "time")
    for found in report.lengths:
        table.add_row(
            str(found.length),
            tokens(found.mean_distance),
            str(len(found.collapsed)),
            percent(found.saved),
            percent(found.planned),
            f"{found.seconds:.1f} s",
        )
    return table


def _slopes(found: LengthReach) -> Table:
    """A line a slope, from the steepest on: the same heads of all layers."""
    title = f"by slope, {found.length} tokens: all layers, smallest to largest"
    table = _table(title, "slope", "mean distance", "by bias", "within 90 %", "window", "late on first")
    groups: dict[float, list[HeadReach]] = {}
    for head in sorted(found.heads, key=lambda head: -head.slope):
        groups.setdefault(head.slope, []).append(head)
    for slope, heads in groups.items():
        table.add_row(
            f"{slope:.4g}",
            spread([head.mean_distance for head in heads], "{:.1f}"),
            tokens(heads[0].bias_distance),
            spread([head.distance_90 for head in heads]),
            spread([head.window for head in heads]),
            percent(max(head.late_first_token for head in heads)),
            style="red" if any(head.collapsed for head in heads) else None,
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


__all__ = ["HEADS", "ROUNDING", "as_table", "head_cells", "rounding_cells"]
