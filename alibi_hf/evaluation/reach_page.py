"""A reach as one page of HTML that needs nothing else: no network, no script, no file beside it.

What comes from the model and the text (names, paths) is escaped. The same reach gives the same bytes.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from alibi_hf.evaluation.bias_alone import KEYS
from alibi_hf.evaluation.reach_figures import draw_lines, draw_maps
from alibi_hf.evaluation.reach_table import HEADS, ROUNDING, head_cells, rounding_cells
from alibi_hf.evaluation.reach_words import HOW_TO_READ, findings, model_name, percent, tokens
from alibi_hf.pages import as_html, definitions, figure_grid, listed, section, table, unordered

if TYPE_CHECKING:
    from alibi_hf.evaluation.reach_report import Reach

LENGTHS = ("tokens", "mean distance", "collapsed heads", "left out", "by sdpa on CPU", "seconds", "peak MB")
OTHERS = "The heads at shorter lengths are in reach.csv and reach.json."


def as_page(report: Reach) -> str:
    """Return the page that `reach.html` holds."""
    found = report.longest
    lines = draw_lines(report)
    sections = [
        _header(report),
        section(f"Layers and heads, {found.length} tokens", figure_grid(draw_maps(found))),
        section("Distances and windows", figure_grid(lines)) if lines is None or lines else "",
        section("By length", table("By length", LENGTHS, _lengths(report), {})),
        section("How to read it", unordered(HOW_TO_READ)),
        _heads(report),
        _rounding(report),
        _plans(report),
        _about(report),
        section("Notes", unordered(report.notes)) if report.notes else "",
    ]
    return as_html(f"What the heads of {model_name(report)} look at", "".join(sections))


def _header(report: Reach) -> str:
    return f"""<header class="finding">
<h1>What the heads of {escape(model_name(report))} look at</h1>
{unordered(findings(report))}</header>
"""


def _lengths(report: Reach) -> list[list[str]]:
    return [
        [
            str(found.length),
            tokens(found.mean_distance),
            str(len(found.collapsed)),
            percent(found.saved),
            percent(found.planned),
            f"{found.seconds:.1f}",
            "" if found.peak_bytes is None else f"{found.peak_bytes / 1e6:.0f}",
        ]
        for found in report.lengths
    ]


def _heads(report: Reach) -> str:
    found = report.longest
    rows = table("Heads", HEADS, map(head_cells, found.heads), {"collapsed": "failed"})
    others = f'<p class="dim">{OTHERS}</p>\n' if len(report.lengths) > 1 else ""
    return section(f"Every head, {found.length} tokens", others + rows)


def _rounding(report: Reach) -> str:
    """What 16 bits leave of each head's bias, folded away."""
    found = report.longest
    keys = min(KEYS, found.length)
    words = (
        f"How many different values the bias of {keys} keys keeps when it is stored in 16 bits: of the last of "
        f"{found.length} keys as slope times position, of the nearest as slope times distance; and the distance from "
        f"which exp(bias) is zero. {keys} keys should have {keys} values; this package keeps the bias in float32."
    )
    body = table("Bias in 16 bits", ROUNDING, rounding_cells(found), {})
    folded = f"<details>\n<summary>{len(found.rounding)} rows</summary>\n{body}</details>\n"
    return section("The bias in 16 bits", f'<p class="dim">{escape(words)}</p>\n{folded}')


def _plans(report: Reach) -> str:
    plans = [f"layer {layer}: {plan}" for layer, plan in enumerate(report.longest.plans)]
    return section(f"What sdpa plans on CPU, {report.longest.length} tokens", unordered(plans))


def _about(report: Reach) -> str:
    rows = {
        "Model": report.path_or_id,
        "Revision": report.revision or "",
        **{name.replace("_", " ").capitalize(): str(value) for name, value in report.model.items()},
        "Computed in": f"{report.dtype} on {report.device}",
        "Text": "; ".join(f"{file['name']} ({file['bytes']} bytes, sha256 {file['sha256']})" for file in report.text),
        "Machine": listed(report.machine),
        "Versions": listed(report.versions),
        "Command": report.command,
        "Time": f"{report.seconds:.0f} s",
    }
    return section("What was measured", definitions(rows))


__all__ = ["as_page"]
