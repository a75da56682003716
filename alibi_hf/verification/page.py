"""A verification as one page of HTML that needs nothing else: no network, no script, no file beside it.

What comes from a checkpoint (names, notes, paths) is escaped. The same verification gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from alibi_hf.verification.page_figures import Figure, draw
from alibi_hf.verification.render import COLUMNS, HOW_TO_READ, check_cells, control_cells

if TYPE_CHECKING:
    from alibi_hf.verification.report import Check, Verification

# Nothing may be fetched and nothing may run, whatever a checkpoint's names hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
NO_FIGURES = 'The figures need matplotlib: <code>pip install "alibi-hf[plots]"</code>, then verify again.'
GOOD = ("ok", "caught", "shown")


def as_page(report: Verification) -> str:
    """Return the page that `verification.html` holds."""
    title = f"{report.verdict.capitalize()}: {report.output}"
    style = (files("alibi_hf.verification") / "page.css").read_text(encoding="utf-8")
    sections = [_verdict(report), _subjects(report), _figures(draw(report)), _table(report), _notes(report)]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{"".join(sections)}</main>
</body>
</html>
"""


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
{"" if report.proved else _list(wrong)}</header>
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
        "Versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    }
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in rows.items() if value)
    return f"<section>\n<h2>What was compared with what</h2>\n<dl>\n{pairs}</dl>\n</section>\n"


def _figures(groups: dict[str, list[Figure]] | None) -> str:
    if groups is None:
        return f'<section>\n<h2>Figures</h2>\n<p class="dim">{NO_FIGURES}</p>\n</section>\n'
    return "".join(
        f'<section>\n<h2>{escape(heading)}</h2>\n<div class="figures">\n{"".join(map(_figure, figures))}</div>\n'
        f"</section>\n"
        for heading, figures in groups.items()
        if figures
    )


def _figure(figure: Figure) -> str:
    return f"<figure>\n{figure.svg}<figcaption>{escape(figure.caption)}</figcaption>\n</figure>\n"


def _table(report: Verification) -> str:
    """Every check and every negative control, and how to read them; single layers fold away."""
    whole = [check_cells(check) for check in report.checks if check.layer is None]
    layers = [check_cells(check) for check in report.checks if check.layer is not None]
    controls = [control_cells(control) for control in report.negative_controls]
    how = escape(" ".join(HOW_TO_READ.replace("*", "").replace("`", "").split()))
    folded = f"<details>\n<summary>{len(layers)} checks of single layers</summary>\n{_rows(layers)}</details>\n"
    return f"""<section>
<h2>Every check</h2>
<p class="dim">{how}</p>
{_rows(whole + controls)}{folded if layers else ""}</section>
"""


def _rows(cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{name or "result"}</th>' for name in COLUMNS)
    return f"""<div class="table" tabindex="0" role="region" aria-label="Checks">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{"".join(map(_row, cells))}</tbody>
</table>
</div>
"""


def _row(cells: Sequence[str]) -> str:
    *values, mark = cells
    body = "".join(f"<td>{escape(value)}</td>" for value in values)
    return f'<tr>{body}<td class="{"ok" if mark in GOOD else "failed"}">{escape(mark)}</td></tr>\n'


def _notes(report: Verification) -> str:
    noted = [check for check in report.checks if check.note]
    notes = [*report.notes]
    for note in dict.fromkeys(check.note for check in noted):
        notes += [f"{what}: {note}" for what in _grouped([check for check in noted if check.note == note])]
    return f"<section>\n<h2>Notes</h2>\n{_list(notes)}</section>\n" if notes else ""


def _grouped(checks: Iterable[Check]) -> list[str]:
    """Return one line for all checks of one name and dtype, with their lengths."""
    lengths: dict[str, list[int]] = {}
    for check in checks:
        lengths.setdefault(f"{check.name}, {check.dtype}", []).append(check.length)
    return [name + (f", {', '.join(map(str, found))} tokens" if any(found) else "") for name, found in lengths.items()]


def _list(lines: Iterable[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n"


__all__ = ["as_page"]
