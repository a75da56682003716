"""The picture of `generate_long.py`: every figure over the text, what was written beside what is real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from metering import Run


def draw(
    path: Path, texts: dict[str, list[list[dict[str, float]]]], runs: Sequence[Run], segment: int, names: dict[str, str]
) -> None:
    """Draw the figures of texts and the costs of runs to `path`.

    Args:
        path: a .png file; its folder exists.
        texts: by kind: the figures of each segment of each text.
        runs: what generated; time and memory are drawn for each.
        segment: in tokens.
        names: of the figures, and what panels call them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    panels = figure.subplots(2, 4).flat
    for panel, (name, title) in zip(panels, names.items(), strict=False):
        for kind, rows in texts.items():
            values = torch.tensor([[figures[name] for figures in text] for text in rows], dtype=torch.float64)
            _band(panel, values, segment, kind)
        panel.set_title(title)
        panel.legend()
    time, memory = panels[-2:]
    for run in runs:
        ends = [segment * (index + 1) for index in range(len(run.costs))]
        time.plot(ends, [cost.seconds * 1000 for cost in run.costs], marker="o", label=run.name)
        memory.plot(ends, [cost.cache / 2**20 for cost in run.costs], marker="o", label=f"{run.name}, cache")
    for panel, title in ((time, "milliseconds a token"), (memory, "MiB")):
        panel.set_title(title)
        panel.set_ylim(bottom=0)
        panel.legend()
    for panel in panels:
        panel.set_xlabel("tokens")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def _band(panel: Any, values: torch.Tensor, segment: int, label: str) -> None:
    """Draw the mean over texts `[texts, segments]`, and its spread as a band."""
    ends = [segment * (index + 1) for index in range(values.shape[1])]
    mean, spread = values.mean(0), values.std(0, correction=min(1, len(values) - 1))
    panel.plot(ends, mean, marker="o", markersize=3, label=label)
    panel.fill_between(ends, mean - spread, mean + spread, alpha=0.2)
