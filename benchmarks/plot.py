"""Pictures of a result: `python -m benchmarks.plot RESULT.json PICTURE.png`; needs the extra `plots`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FLOOR = "sdpa-no-alibi"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the content of a result file of a benchmark to `path`.

    Raises:
        SystemExit: where matplotlib is missing.
        ValueError: for a result of another benchmark.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit('Drawing needs matplotlib: pip install "alibi-hf[plots]".') from error
    drawings: dict[str, Callable[[Any, list[Row]], None]] = {
        "attention": _attention,
        "model": _model,
        "training": _training,
    }
    if report["benchmark"] not in drawings:
        raise ValueError(f"{report['benchmark']!r} results have no picture; only {', '.join(drawings)} have one.")
    figure = Figure(layout="constrained")
    drawings[report["benchmark"]](figure, report["results"])
    versions = report["versions"]
    figure.suptitle(f"{report['machine']['name']}, torch {versions['torch']}, {report['started'][:10]}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _attention(figure: Any, rows: list[Row]) -> None:
    """Time over length, a panel for each dtype, shape and number of threads (down) and pass (across)."""
    groups = _distinct(rows, "inputs", "dtype", "heads", "head_dim", "threads")
    if any(row["inputs"] != "normal" for row in rows):  # the layer, and so the name, may change with the length
        groups = _distinct(rows, "dtype", "heads", "head_dim", "threads")
    passes = _distinct(rows, "pass")
    figure.set_size_inches(5.5 * len(passes), 3.2 * len(groups))
    panels = figure.subplots(len(groups), len(passes), squeeze=False)
    for group, line in zip(groups, panels, strict=True):
        for name, panel in zip(passes, line, strict=True):
            _lines(panel, [row for row in rows if _matches(row, {**group, **name})])
            panel.set_title(f"{name['pass']}, {_words(group)}", fontsize=8)
    panels[0, 0].legend(fontsize=7)


def _lines(panel: Any, rows: list[Row]) -> None:
    for contender in _distinct(rows, "contender"):
        own = sorted((row for row in rows if _matches(row, contender)), key=lambda row: row["length"])
        style = {"linestyle": "--", "color": "black"} if contender["contender"] == FLOOR else {"marker": "o"}
        panel.plot([r["length"] for r in own], [r["median_ms"] for r in own], label=contender["contender"], **style)
    lengths = sorted({row["length"] for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(lengths, [str(length) for length in lengths], fontsize=7)
    panel.set_xlabel("tokens", fontsize=8)
    panel.set_ylabel("ms", fontsize=8)
    panel.grid(alpha=0.3)


def _model(figure: Any, rows: list[Row]) -> None:
    """How many times faster than upstream, a panel for each model and number of threads."""
    groups = _distinct(rows, "model", "threads")
    figure.set_size_inches(9, 3.2 * len(groups))
    panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
    for group, panel in zip(groups, panels, strict=True):
        own = [row for row in rows if _matches(row, group) and row["contender"] != "upstream"]
        _bars(panel, own)
        panel.set_title(_words(group), fontsize=9)
    panels[0].legend(fontsize=7)


def _bars(panel: Any, rows: list[Row]) -> None:
    cases, contenders = _distinct(rows, "task", "dtype", "length"), _distinct(rows, "contender")
    width = 0.8 / max(1, len(contenders))
    for number, contender in enumerate(contenders):
        speedups = [
            next((row["times_faster"] or 0.0 for row in rows if _matches(row, {**case, **contender})), 0.0)
            for case in cases
        ]
        places = [place + number * width for place in range(len(cases))]
        panel.bar(places, speedups, width, label=contender["contender"])
    labels = ["\n".join(str(value) for value in case.values()) for case in cases]
    panel.set_xticks(range(len(cases)), labels, fontsize=7)
    panel.axhline(1.0, color="black", linewidth=0.8)
    panel.set_ylabel("times faster than upstream", fontsize=8)


def _training(figure: Any, rows: list[Row]) -> None:
    """Tokens a second and peak memory of a training step, a line of panels for each model and dtype."""
    groups = _distinct(rows, "model", "dtype", "threads")
    figure.set_size_inches(11, 3.2 * len(groups))
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for group, (speed, memory) in zip(groups, panels, strict=True):
        own = [row for row in rows if _matches(row, group)]
        labels = [f"{row['contender']}, {row['way']}, {row['tokens']}" for row in own]
        peaks = [(row["peak_bytes"] or 0) / 2**20 for row in own]
        for panel, values in ((speed, [row["tokens_per_second"] for row in own]), (memory, peaks)):
            panel.barh(
                labels, values, color=["tab:gray" if row["contender"] == "upstream" else "tab:blue" for row in own]
            )
            panel.invert_yaxis()
            panel.tick_params(labelsize=7)
        speed.set_title(f"{_words(group)}: tokens a second", fontsize=9)
        memory.set_title("peak memory of a step, MiB", fontsize=9)


def _distinct(rows: list[Row], *keys: str) -> list[Row]:
    found = []
    for row in rows:
        part = {key: row[key] for key in keys}
        if part not in found:
            found.append(part)
    return found


def _matches(row: Row, part: Row) -> bool:
    return all(row[key] == value for key, value in part.items())


def _words(part: Row) -> str:
    return ", ".join(str(value) if isinstance(value, str) else f"{key} {value}" for key, value in part.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the result file that the command line names."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) != 2:
        raise SystemExit("Usage: python -m benchmarks.plot RESULT.json PICTURE.png")
    draw(json.loads(Path(given[0]).read_text(encoding="utf-8")), Path(given[1]))


if __name__ == "__main__":
    main()
