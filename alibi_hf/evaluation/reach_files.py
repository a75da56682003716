"""The files of a reach: JSON and CSV for programs, a page and a picture for people. All say the same."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import logging

from alibi_hf.compact import compact_json
from alibi_hf.evaluation.reach_figures import draw_picture
from alibi_hf.evaluation.reach_page import as_page
from alibi_hf.evaluation.reach_report import HeadReach

if TYPE_CHECKING:
    from alibi_hf.evaluation.reach_report import Reach

COLUMNS = ("length", *(field.name for field in fields(HeadReach)))
logger = logging.get_logger(__name__)


def write_files(report: Reach, directory: Path) -> Path:
    """Write all files of [`Reach.save`] to `directory`; returns the path of `reach.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "reach.json"
    path.write_text(compact_json(report.to_dict()), encoding="utf-8")
    _write_csv(report, directory / "reach.csv")
    (directory / "reach.html").write_text(as_page(report), encoding="utf-8")
    if not draw_picture(report, directory / "reach.png"):
        logger.warning('reach.png was not drawn: it needs matplotlib, pip install "alibi-hf[plots]".')
    return path


def _write_csv(report: Reach, path: Path) -> None:
    """Write one row a length, layer and head; what is None is empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for found in report.lengths:
            writer.writerows([found.length, *vars(head).values()] for head in found.heads)


__all__ = ["COLUMNS", "write_files"]
