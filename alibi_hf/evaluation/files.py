"""The files of an evaluation: JSON and CSV for programs, a picture and a page for people. All say the same."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alibi_hf.compact import compact_json, finite
from alibi_hf.evaluation.page import as_page
from alibi_hf.evaluation.plot import plot_perplexity

if TYPE_CHECKING:
    from alibi_hf.evaluation.report import Evaluation

MODEL = ("positions", "trained_length", "model_class", "parameters", "dtype", "device", "vocabulary")
READING = (
    "protocol",
    "length",
    "stride",
    "perplexity",
    "loss",
    "standard_error",
    "bits_per_byte",
    "tokens",
    "windows",
    "seconds",
    "peak_bytes",
)
COLUMNS = ("model", *READING, *MODEL, "failure")
POSITIONS = ("model", "protocol", "length", "start", "stop", "loss", "tokens")


def write_files(report: Evaluation, directory: Path) -> Path:
    """Write all files of [`Evaluation.save`] to `directory`; returns the path of `evaluation.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "evaluation.json"
    path.write_text(compact_json(report.to_dict()), encoding="utf-8")
    _write_csv(directory / "evaluation.csv", COLUMNS, _readings(report))
    _write_csv(directory / "positions.csv", POSITIONS, _positions(report))
    (directory / "evaluation.html").write_text(as_page(report), encoding="utf-8")
    with suppress(ImportError):  # the page and the table say it
        plot_perplexity(report, directory / "evaluation.png")
    return path


def _readings(report: Evaluation) -> Iterator[list[Any]]:
    """One row a model, protocol and length; a model that could not be read at all has one row, with the reason."""
    for model in report.models:
        for reading in model.readings:
            yield [model.name, *_values(reading, READING), *_values(model, MODEL), reading.failure]
        if not model.readings:
            yield [model.name, *[None] * len(READING), *_values(model, MODEL), model.failure]


def _positions(report: Evaluation) -> Iterator[list[Any]]:
    """One row a span of positions of each reading that has spans."""
    for model in report.models:
        for reading in model.readings:
            for span in reading.spans:
                yield [model.name, reading.protocol, reading.length, *_values(span, POSITIONS[3:])]


def _values(of: Any, names: Sequence[str]) -> list[Any]:
    return [finite(getattr(of, name)) for name in names]


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[list[Any]]) -> None:
    """Write UTF-8 with one header line and "\\n" at the end of lines; what is None or not finite is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


__all__ = ["COLUMNS", "POSITIONS", "write_files"]
