"""The rows of the matrix: made from what `worker.py` found, kept in results.json, and shown in the README."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
KEYS = ("python", "torch", "transformers", "huggingface_hub", "written with")
GROUPS = ("heads", "agree", "generate", "train", "save")
MARKED = re.compile(r"(<!-- matrix -->\n)(.*?)(<!-- /matrix -->)", re.DOTALL)

Row = dict[str, str]


def rows(found: dict[str, Any]) -> list[Row]:
    """Return one row for each version that wrote folders, from the FOUND.json of one environment."""
    writers: dict[str, list[dict[str, Any]]] = {}
    for name, checks in found["sources"].items():
        writers.setdefault(name.rpartition("-")[0], []).extend(checks)
    return [{**found["versions"], "written with": writer, **counts(checks)} for writer, checks in writers.items()]


def counts(checks: list[dict[str, Any]]) -> Row:
    """Return for each group how many of its checks passed, of how many."""
    passed = {group: [check["passed"] for check in checks if check["group"] == group] for group in GROUPS}
    return {group: f"{sum(each)} of {len(each)}" for group, each in passed.items()}


def failures(found: dict[str, Any]) -> list[str]:
    """Return a line for each check that failed; none at all is a failure, too."""
    lines = [
        f"{found['versions']['transformers']}, {name}: {check['group']}: {check['check']}: {check['found']} "
        f"(limit {check['limit']}) {check['error']}"
        for name, checks in found["sources"].items()
        for check in checks
        if not check["passed"]
    ]
    empty = [f"{name}: no check of {group}" for name, group in _unchecked(found)]
    return lines + empty


def _unchecked(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, group)
        for name, checks in found["sources"].items()
        for group in GROUPS
        if group not in {check["group"] for check in checks}
    ] or ([] if found["sources"] else [("all folders", "anything")])


def key(row: Row) -> tuple[Any, ...]:
    """Return what tells a row from the others, in an order in which 3.9 comes before 3.10."""
    return tuple(tuple(int(part) for part in re.findall(r"\d+", row[name])) for name in KEYS)


def recorded() -> list[Row]:
    """Return the rows of results.json."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def merged(new: list[Row]) -> list[Row]:
    """Return the recorded rows with `new` in the place of those with the same versions."""
    every = {key(row): row for row in [*recorded(), *new]}
    return [every[each] for each in sorted(every)]


def markdown(table: list[Row]) -> str:
    """Return the table of the README."""
    columns = (*KEYS, *GROUPS)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row[name] for name in columns) + " |" for row in table)]) + "\n"


def record(new: list[Row]) -> None:
    """Put `new` into results.json and the README."""
    table = merged(new)
    RESULTS.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(MARKED.sub(lambda match: match[1] + markdown(table) + match[3], text), encoding="utf-8")


def stale(new: list[Row]) -> list[Row]:
    """Return the rows that are recorded with other results."""
    known = {key(row): row for row in recorded()}
    return [row for row in new if known.get(key(row), row) != row]
