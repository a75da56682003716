"""An evaluation as a table on the terminal, and the cells of its readings."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from alibi_hf.evaluation.findings import (
    all_notes,
    finding,
    finite_perplexity,
    headline,
    number,
    of_protocol,
    shortened,
    telling,
    tokenizers_differ,
    why_none,
)
from alibi_hf.evaluation.plot import PANELS
from alibi_hf.pages.figures import drawing

if TYPE_CHECKING:
    from alibi_hf.evaluation.report import Evaluation, ModelEvaluation, Protocol, Reading

    Cell = Callable[[ModelEvaluation, int], str]

COLUMNS = (
    "model",
    "protocol",
    "length",
    "stride",
    "perplexity",
    "± standard error",
    "loss, nats",
    "bits a byte",
    "tokens",
    "windows",
    "seconds",
    "peak MB",
    "result",
)
ACROSS = 4  # models side by side on a terminal
NO_PICTURE = 'matplotlib is not installed, so there is no evaluation.png: pip install "alibi-hf[plots]".'
TOKENIZERS = "The models have different tokenizers: compare their bits a byte, not their perplexities."


def as_table(report: Evaluation) -> RenderableType:
    """Return a table a protocol, a column a model, over what was found and what a reader has to know."""
    shown: dict[str, Cell] = {f"perplexity, {PANELS[p]}": partial(_perplexity_at, protocol=p) for p in PANELS}
    if tokenizers_differ(report):
        shown["bits a byte"] = _bits_at
    read = [model for model in report.models if model.readings]
    groups = [read[start : start + ACROSS] for start in range(0, len(read), ACROSS)]
    tables: list[RenderableType] = []
    for title, cell in shown.items():
        tables += [Text(f"\n{title}"), *(_table(cell, models) for models in groups)]
    lines = [finding(model) for model in report.models] + [TOKENIZERS] * tokenizers_differ(report)
    lines += all_notes(report)
    with drawing() as able:
        lines += [] if able else [NO_PICTURE]
    return Group(Text(headline(report), style="bold"), *tables, *(Text(f"* {line}") for line in lines))


def _table(cell: Cell, models: list[ModelEvaluation]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("length", justify="right")
    for model in models:
        table.add_column(Text(shortened(model.name)), justify="right", overflow="fold", max_width=15)
    for length in sorted({reading.length for model in models for reading in model.readings}):
        cells = [cell(model, length) for model in models]
        table.add_row(f"{length:,}", *(Text(found, style="red" if found == "fails" else "") for found in cells))
    return table


def _perplexity_at(model: ModelEvaluation, length: int, protocol: Protocol) -> str:
    return next((perplexity(r) for r in of_protocol(model, protocol) if r.length == length), "")


def _bits_at(model: ModelEvaluation, length: int) -> str:
    return next((bits(reading) or "fails" for reading in telling(model) if reading.length == length), "")


def reading_cells(model: ModelEvaluation, reading: Reading) -> list[str]:
    """Return the cells of one reading, in the order of `COLUMNS`."""
    found, error = finite_perplexity(reading), reading.standard_error
    return [
        model.name,
        reading.protocol,
        f"{reading.length:,}",
        f"{reading.stride:,}",
        perplexity(reading),
        "" if found is None or error is None else number(found * error),
        f"{reading.loss:.4f}" if reading.loss is not None and math.isfinite(reading.loss) else "",
        bits(reading),
        f"{reading.tokens:,}",
        f"{reading.windows:,}",
        f"{reading.seconds:,.1f}",
        "" if reading.peak_bytes is None else f"{reading.peak_bytes / 1e6:,.0f}",
        "fails" if why_none(reading) else "ok",
    ]


def perplexity(reading: Reading | None) -> str:
    """Return the perplexity of a reading, "fails" where it has none, nothing where there is no reading."""
    return "" if reading is None else number(reading.perplexity) or "fails"


def bits(reading: Reading) -> str:
    """Return the bits a byte of a reading."""
    return "" if not math.isfinite(reading.bits_per_byte or math.nan) else f"{reading.bits_per_byte:.4f}"


__all__ = ["COLUMNS", "NO_PICTURE", "TOKENIZERS", "as_table", "bits", "perplexity", "reading_cells"]
