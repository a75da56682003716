"""A verification as a table on the terminal and as a page of Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from alibi_hf.verification.report import Check, Control, Verification

COLUMNS = ("check", "dtype", "tokens", "ours", "upstream", "limit", "KL", "argmax", "")
ON_TERMINAL = (0, 1, 2, 3, 4, 5, 8)  # the columns that fit in 80 characters
DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
HOW_TO_READ = """\
*ours* and *upstream* are errors against the truth in the figure that is gated: the largest one in float32, the root
mean square in 16 bits and for gradients (the largest of millions of roundings is luck). `verification.json` has both.
For bias, tensors and tokens they are relative errors or the number of what differs. A line without a limit is shown and
not gated. *KL* (nats, mean over positions) and *argmax* (share of positions that agree) are ours against the truth."""


def as_table(report: Verification) -> Table:
    """Return one line a check and one a negative control (a wrong conversion), under a title that says the verdict."""
    reference = report.reference
    title = f"{report.verdict}: {report.output} against {reference['class']} ({reference['attn_implementation']})"
    table = Table(title=title, title_justify="left", title_style="bold green" if report.proved else "bold red")
    table.box, table.pad_edge = box.SIMPLE_HEAD, False
    for column in ON_TERMINAL:
        table.add_column(COLUMNS[column], justify="left" if COLUMNS[column] in ("check", "dtype", "") else "right")
    checks = [(check_cells(check), check.passed) for check in telling(report.checks)]
    controls = [(control_cells(control), control.caught) for control in report.negative_controls]
    for cells, passed in checks + controls:
        cells[1] = DTYPES.get(cells[1], cells[1])
        table.add_row(*(cells[column] for column in ON_TERMINAL), style=None if passed else "red")
    return table


def telling(checks: Sequence[Check]) -> list[Check]:
    """Return the checks that a terminal shows: of those of single layers what failed, and the nearest to its limit."""
    nearest: dict[tuple[str, str, int], Check] = {}
    for check in checks:
        key = (check.name, check.dtype, check.length)
        if check.layer is not None and (key not in nearest or share_of_limit(check) > share_of_limit(nearest[key])):
            nearest[key] = check
    shown = {id(check) for check in nearest.values()}
    return [check for check in checks if check.layer is None or not check.passed or id(check) in shown]


def share_of_limit(check: Check) -> float:
    """Return the error as a share of its limit; infinite for one that is no number."""
    share = (check.ours or 0.0) / (check.limit or 1.0)
    return share if math.isfinite(share) else math.inf


def check_cells(check: Check) -> list[str]:
    """Return the cells of one check, in the order of `COLUMNS`."""
    ours = check.detail.get("ours", {})
    mark = "shown" if check.passed and check.limit is None else "ok" if check.passed else "FAILED"
    return [
        check.name if check.layer is None else f"{check.name} [{check.layer}]",
        check.dtype,
        str(check.length) if check.length else "",
        number(check.ours),
        number(check.upstream),
        number(check.limit),
        number(ours.get("kl")),
        share(ours.get("argmax")),
        mark,
    ]


def control_cells(control: Control) -> list[str]:
    """Return the cells of one negative control, in the order of `COLUMNS`."""
    mark = "caught" if control.caught else "NOT CAUGHT"
    error, limit = number(control.error), number(control.limit)
    return [f"wrong: {control.name}", "float32", "", error, "", limit, "", "", mark]


def as_markdown(report: Verification) -> str:
    """Return the page that `verification.md` holds."""
    lines = [
        f"# {report.verdict.capitalize()}: {report.output}",
        "",
        f"Converted from `{report.source}` (family {report.family}), compared in {report.seconds:.0f} s.",
        "",
        *(f"* {name}: {value}" for name, value in report.reference.items()),
        f"* text: {report.text}",
        f"* versions: {', '.join(f'{name} {value}' for name, value in report.versions.items())}",
        *(f"* {note}" for note in report.notes),
        "",
        HOW_TO_READ,
        "",
        _row(COLUMNS),
        "|" + "---|" * len(COLUMNS),
        *(_row(check_cells(check)) for check in report.checks),
        *(_row(control_cells(control)) for control in report.negative_controls),
        "",
    ]
    notes = [
        f"* **{check.name}**, {check.dtype}, {check.length} tokens: {check.note}"
        for check in report.checks
        if check.note
    ]
    return "\n".join(lines + (["## Notes", "", *notes, ""] if notes else []))


def _row(cells: Iterable[str]) -> str:
    """Return a line of a Markdown table; a bar inside a cell would end it."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def number(value: float | None) -> str:
    """Return a number as a table shows it: nothing for None, whole numbers whole, else two digits and an exponent."""
    if value is None:
        return ""
    whole = math.isfinite(value) and value == int(value) and abs(value) < 1e6
    return str(int(value)) if whole else f"{value:.1e}"


def share(value: float | None) -> str:
    """Return a share as a percentage, never rounded up to 100."""
    if value is None:
        return ""
    return "100 %" if value == 1 else f"{min(value, 0.9999):.2%}".replace("%", " %")
