"""The norms that decide how far a provable window reaches, of every layer and head of the shipped checkpoints.

    python -m benchmarks.norms
    python -m benchmarks.norms --length 4096 --dtype bf16

R is the largest score that the norms of queries and keys allow: max|q| max|k| / sqrt(head_dim), in nats. G <= 2R takes
the place of 2R in the package's own bound (`alibi_hf/model/window_alibi.py`), and decides the windows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from alibi_hf.families._truth import true_slopes
from alibi_hf.model.window_alibi import default_eps, head_gaps, windows_of_gap
from benchmarks.inputs import CHECKPOINTS, score_bound, trained_layers
from benchmarks.options import DTYPES, dtype_name, settings
from benchmarks.plot import draw
from benchmarks.report import Report, make_console, result_path


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run the command; returns what it has written."""
    options = parse(arguments)
    path = options.output or result_path("norms", "cpu")
    report, console = Report.start("norms", settings(options), "cpu"), make_console()
    for folder in options.checkpoints:
        for layer, states in enumerate(trained_layers(folder, options.length)):
            report.results += describe_layer(folder.name, layer, states, DTYPES[options.dtype])
        console.print(table(folder.name, options.length, report))
    report.save(path)
    console.print(f"Results: {path}")
    if options.plot:
        draw(report.to_dict(), options.plot)
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.norms", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoints", nargs="+", type=Path, default=list(CHECKPOINTS), help="folders")
    parser.add_argument("--length", type=int, default=1024, help="tokens of text (default: %(default)s)")
    parser.add_argument("--dtype", type=dtype_name, default="bfloat16", help="whose rounding is eps (default: bf16)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/, by machine)")
    parser.add_argument("--plot", type=Path, help="also draw the reach of each head; needs the extra `plots`")
    return parser.parse_args(arguments)


def describe_layer(
    checkpoint: str, layer: int, states: tuple[torch.Tensor, torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Return one row a head: slope, R, G, its window, and the share of causal pairs it keeps."""
    query, key, _ = (part.to(dtype) for part in states)
    slopes, norms = true_slopes(query.shape[1]), score_bound(query, key)
    eps = default_eps(dtype, gradients=False)
    gaps = head_gaps(query, key, slopes.float(), query.shape[3] ** -0.5)
    windows = windows_of_gap(gaps, slopes.float(), eps).clamp(max=query.shape[2])
    rows = []
    for head, (slope, norm) in enumerate(zip(slopes.tolist(), norms.tolist(), strict=True)):
        rows.append(
            {
                "checkpoint": checkpoint,
                "layer": layer,
                "head": head,
                "tokens": query.shape[2],
                "slope": slope,
                "R": norm,
                "G": float(gaps[head]),
                "window": int(windows[head]),
                "share": share_kept(int(windows[head]), query.shape[2]),
            }
        )
    return rows


def share_kept(window: int, length: int) -> float:
    """Return the share of causal pairs whose distance is at most `window`."""
    distances = min(window, length - 1) + 1
    return distances * (2 * length - distances + 1) / (length * (length + 1))


def table(checkpoint: str, length: int, report: Report) -> Table:
    """Return R, G and the kept share of a checkpoint: a row a layer, its heads from the steepest on."""
    rows = [row for row in report.results if row["checkpoint"] == checkpoint]
    shown = Table(
        title=f"{checkpoint}, {length} tokens",
        title_justify="left",
        caption="R, G in nats, by head from the steepest; kept: share of causal pairs in the windows",
        caption_justify="left",
    )
    for name in ("layer", "R", "G", "kept"):
        shown.add_column(name, justify="right" if name in ("layer", "kept") else "left")
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = sorted((row for row in rows if row["layer"] == layer), key=lambda row: -row["slope"])
        shown.add_row(
            str(layer),
            " ".join(f"{row['R']:.1f}" for row in own),
            " ".join(f"{row['G']:.1f}" for row in own),
            f"{sum(row['share'] for row in own) / len(own):.2f}",
        )
    return shown


if __name__ == "__main__":
    main()
