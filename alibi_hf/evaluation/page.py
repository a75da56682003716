"""An evaluation as one page of HTML that needs nothing else: no network, no script, no file beside it.

What comes from models and texts (names, paths, errors) is escaped. The same evaluation gives the same bytes.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from alibi_hf.evaluation.findings import (
    WITHIN,
    all_notes,
    failures,
    finding,
    headline,
    holds_to,
    of_protocol,
    telling,
    tokenizers_differ,
)
from alibi_hf.evaluation.page_figures import draw, swatches
from alibi_hf.evaluation.plot import PANELS, label
from alibi_hf.evaluation.table import COLUMNS, NO_PICTURE, TOKENIZERS, perplexity, reading_cells
from alibi_hf.pages import Figure, as_html, definitions, figure_grid, key, listed, section, table, unordered

if TYPE_CHECKING:
    from alibi_hf.evaluation.report import Evaluation, ModelEvaluation, Protocol

FILES = 8  # of the text that are named; evaluation.json names all
HOW_TO_READ = (
    "What non-overlapping windows gain as they grow is mostly that a smaller share of their tokens has little context "
    "(the early-token curse). The sliding window shows use of context: where it is flat past the training length, the "
    "model reads on and gains nothing from what is farther away.",
    "The standard error is over windows. All lengths read the same text: it says how far another text may lie, not how "
    "far two lengths do.",
)


def as_page(report: Evaluation) -> str:
    """Return the page that `evaluation.html` holds."""
    figures = draw(report)
    sections = [_header(report), _figures(report, figures), _by_length(report), _failures(report), _models(report)]
    return as_html(headline(report), "".join([*sections, _readings(report), _about(report), _notes(report)]))


def _header(report: Evaluation) -> str:
    """What was found, a line a model."""
    lines = [finding(model).rstrip(".") + "." for model in report.models] + [TOKENIZERS] * tokenizers_differ(report)
    protocols = {reading.protocol for model in report.models for reading in telling(model)}
    how = " and ".join(PANELS[protocol] for protocol in PANELS if protocol in protocols)
    rule = f"A model holds to a length if no perplexity up to there is more than {WITHIN:.0%} above its best before it"
    return f"""<header class="finding">
<h1>{escape(headline(report))}</h1>
{unordered(lines)}<p class="dim">{rule.replace("%", " %")}{f" ({how})" if how else ""}.</p>
</header>
"""


def _figures(report: Evaluation, groups: dict[str, list[Figure]] | None) -> str:
    if groups is None:
        return section("Figures", f'{figure_grid(None)}<p class="dim">{escape(NO_PICTURE)}</p>\n')
    pairs = zip(swatches(report), report.models, strict=True)
    names = key((swatch, label(model, whole=True)) for swatch, model in pairs)
    drawn = "".join(section(heading, figure_grid(figures)) for heading, figures in groups.items() if figures)
    return f"<div>\n{names}{drawn}</div>\n" if drawn else ""


def _by_length(report: Evaluation) -> str:
    """Perplexity, a line a model and protocol, a column a length."""
    lengths = sorted({reading.length for model in report.models for reading in model.readings})
    if not lengths:
        return ""
    columns = ["model", "protocol", "holds to", *(f"{length:,}" for length in lengths)]
    pairs = [(model, protocol) for model in report.models for protocol in PANELS if of_protocol(model, protocol)]
    rows = [_row(model, protocol, lengths) for model, protocol in pairs]
    return section("Perplexity by length", table("Perplexity by length", columns, rows, {}))


def _row(model: ModelEvaluation, protocol: Protocol, lengths: list[int]) -> list[str]:
    readings = of_protocol(model, protocol)
    held, found = holds_to(readings), {reading.length: reading for reading in readings}
    return [model.name, protocol, f"{held:,}" if held else "none", *(perplexity(found.get(n)) for n in lengths)]


def _failures(report: Evaluation) -> str:
    lines = [f"{model.name} {line}" for model in report.models for line in failures(model)]
    return section("What fails, and why", unordered(lines)) if lines else ""


def _models(report: Evaluation) -> str:
    columns = (
        "model",
        "positions",
        "trained at",
        "class",
        "parameters",
        "dtype",
        "device",
        "vocabulary",
        "text, tokens",
    )
    rows = [
        (
            m.name,
            m.positions,
            f"{m.trained_length:,}" if m.trained_length else "not said",
            m.model_class,
            f"{m.parameters:,}",
            m.dtype,
            m.device,
            f"{m.vocabulary:,}",
            f"{m.tokens:,}",
        )
        for m in report.models
    ]
    return section("Models", table("Models", columns, rows, {}))


def _readings(report: Evaluation) -> str:
    """Every figure of every reading, folded."""
    rows = [reading_cells(model, reading) for model in report.models for reading in model.readings]
    if not rows:
        return ""
    whole = table("Every reading", COLUMNS, rows, {"ok": "ok", "fails": "failed"})
    return section("Every reading", f"<details>\n<summary>{len(rows)} readings</summary>\n{whole}</details>\n")


def _about(report: Evaluation) -> str:
    """What was read, where and how."""
    loaded = [(m.name, m.path_or_id + (f" at {m.revision}" if m.revision else "")) for m in report.models]
    more = len(report.text) - FILES
    rows = {
        "Text": "; ".join(map(_of_file, report.text[:FILES])) + (f"; {more} more files" if more > 0 else ""),
        "Models": "; ".join(f"{name}: {where}" for name, where in loaded),
        "Lengths": ", ".join(f"{length:,}" for length in report.lengths),
        "Machine": listed(report.machine),
        "Versions": listed(report.versions),
        "Command": report.command,
        "Time": f"{report.seconds:,.0f} s",
    }
    return section("What was read, and how", definitions(rows))


def _of_file(file: dict[str, Any]) -> str:
    known = {name: f"{value:,}" if isinstance(value, int) else value for name, value in file.items() if name != "name"}
    return f"{file['name']} ({', '.join(f'{name} {value}' for name, value in known.items())})"


def _notes(report: Evaluation) -> str:
    return section("Notes", unordered([*all_notes(report), *HOW_TO_READ]))


__all__ = ["as_page"]
