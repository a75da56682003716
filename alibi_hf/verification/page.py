"""A verification as one page of HTML that needs nothing else: no network, no script, no file beside it.

What comes from a checkpoint (names, notes, paths) is escaped. The same verification gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from alibi_hf.pages import Figure, as_html, definitions, figure_grid, listed, section, table, unordered
from alibi_hf.verification.page_figures import draw
from alibi_hf.verification.render import COLUMNS, HOW_TO_READ, check_cells, control_cells

if TYPE_CHECKING:
    from alibi_hf.verification.report import Check, Verification

GOOD = ("ok", "caught", "shown")


def as_page(report: Verification) -> str:
    """Return the page that `verification.html` holds."""
    sections = [_verdict(report), _subjects(report), _figures(draw(report)), _table(report), _notes(report)]
    return as_html(f"{report.verdict.capitalize()}: {report.output}", "".join(sections))


def _verdict(report: Verification) -> str:
    """The verdict and, where it is bad, everything that made it so."""
    wrong = [f"{what}: failed" for what in _grouped([check for check in report.checks if not check.passed])]
    wrong += [f"wrong on purpose and not caught: {c.name}" for c in report.negative_controls if not c.caught]
    if not report.negative_controls:
        wrong.append("no conversion that is wrong on purpose was held against it")
    if not report.checks:
        wrong.append("nothing was checked")
    if not wrong and not report.proved:
        wrong.append("not everything that a proof needs was checked; see the notes")
    reference = report.reference
    counts = f"{len(report.checks)} checks, {len(report.negative_controls)} conversions that are wrong on purpose"
    return f"""<header class="verdict{"" if report.proved else " failed"}">
<h1><strong>{report.verdict.capitalize()}</strong>: {escape(report.output)}</h1>
<p>Held against <code>{escape(report.source)}</code> (family {escape(report.family)}) as
<code>{escape(reference["class"])}</code> computes it: {counts}, {report.seconds:.0f} s.</p>
{"" if report.proved else unordered(wrong)}</header>
"""


def _subjects(report: Verification) -> str:
    """What was compared with what, and with which versions."""
    reference = report.reference
    rows = {
        "Source": report.source,
        "Output": report.output,
        "Reference": f"{reference['class']}, {reference['attn_implementation']} attention",
        **({"Why this one": reference["reason"]} if "reason" in reference else {}),
        "Truth": reference.get("truth", ""),
        "Weights": reference.get("weights", ""),
        **({"Length": reference["length"]} if "length" in reference else {}),
        "Text": report.text,
        "Versions": listed(report.versions),
    }
    return section("What was compared with what", definitions(rows))


def _figures(groups: dict[str, list[Figure]] | None) -> str:
    if groups is None:
        return section("Figures", figure_grid(None))
    return "".join(section(heading, figure_grid(figures)) for heading, figures in groups.items() if figures)


def _table(report: Verification) -> str:
    """Every check and every negative control, and how to read them; single layers fold away."""
    whole = [check_cells(check) for check in report.checks if check.layer is None]
    layers = [check_cells(check) for check in report.checks if check.layer is not None]
    controls = [control_cells(control) for control in report.negative_controls]
    how = escape(" ".join(HOW_TO_READ.replace("*", "").replace("`", "").split()))
    folded = f"<details>\n<summary>{len(layers)} checks of single layers</summary>\n{_rows(layers)}</details>\n"
    return section("Every check", f'<p class="dim">{how}</p>\n{_rows(whole + controls)}{folded if layers else ""}')


def _rows(cells: Sequence[Sequence[str]]) -> str:
    columns = [name or "result" for name in COLUMNS]
    marks = {row[-1]: "ok" if row[-1] in GOOD else "failed" for row in cells}
    return table("Checks", columns, cells, marks)


def _notes(report: Verification) -> str:
    noted = [check for check in report.checks if check.note]
    notes = [*report.notes]
    for note in dict.fromkeys(check.note for check in noted):
        notes += [f"{what}: {note}" for what in _grouped([check for check in noted if check.note == note])]
    return section("Notes", unordered(notes)) if notes else ""


def _grouped(checks: Iterable[Check]) -> list[str]:
    """Return one line for all checks of one name and dtype, with their lengths."""
    lengths: dict[str, list[int]] = {}
    for check in checks:
        lengths.setdefault(f"{check.name}, {check.dtype}", []).append(check.length)
    return [name + (f", {', '.join(map(str, found))} tokens" if any(found) else "") for name, found in lengths.items()]


__all__ = ["as_page"]
