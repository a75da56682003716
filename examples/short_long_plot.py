"""The picture of `train_short_test_long.py`: perplexity by length of every encoding, and the claim of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from short_long_report import curves, middle
from short_long_results import Results

# Okabe and Ito's colours, which the colour-blind tell apart; a dash and a marker each.
STYLES = {
    "ALiBi": ("#0072B2", "-", "o"),
    "ALiBi + RoPE": ("#009E73", "-", "s"),
    "RoPE": ("#D55E00", "-", "^"),
    "RoPE, read with dynamic NTK": ("#D55E00", ":", "v"),
    "RoPE, read with YaRN": ("#D55E00", "--", "D"),
    "sinusoidal": ("#CC79A7", "-", "P"),
    "sinusoidal at 2 L": ("#CC79A7", "--", "X"),
    "no positions": ("#777777", "-", "."),
}


def draw(results: Results, path: Path) -> None:
    """Draw all of it; bands and dots are the seeds."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, centre, right = figure.subplots(1, 3, width_ratios=[4, 4, 3])
    centre.sharey(left)
    length = results.settings["length"]
    for axes, protocol in ((left, "non-overlapping"), (centre, "sliding")):
        _draw_lines(axes, curves(results, protocol), length)
        axes.set_title(f"{protocol} windows")
    left.set_ylabel("held-out perplexity")
    _draw_claim(right, results)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def _style(name: str) -> tuple[str, str, str]:
    return STYLES["sinusoidal at 2 L" if "trained at" in name else name]


def _draw_lines(axes: Any, lines: dict[str, dict[int, list[float | None]]], length: int) -> None:
    lengths = sorted({each for values in lines.values() for each in values})
    for name, values in lines.items():
        colour, dash, marker = _style(name)
        read = {at: found for at, found in sorted(values.items()) if middle(found) is not None}
        centre, label = [middle(found) for found in read.values()], name if read else f"{name} (fails)"
        axes.plot(list(read), centre, dash, color=colour, marker=marker, ms=5, label=label)
        low, high = ([end(found) for found in read.values()] for end in (min, max))
        axes.fill_between(list(read), low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    if any(len(line.get_xdata()) for line in axes.lines):
        axes.set_yscale("log")
    axes.axvline(length, color="#444444", linestyle=":", linewidth=1)
    axes.annotate("trained at", (length, 1), (-4, -4), ("data", "axes fraction"), "offset points", ha="right", va="top")
    axes.set_xticks(lengths, [f"{each:,}" for each in lengths])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_xlabel("tokens read at once")
    axes.grid(alpha=0.3, which="both")


def _draw_claim(axes: Any, results: Results) -> None:
    """Draw the perplexity at 2 L of ALiBi and of sinusoidal positions, a dot a seed, and what a step costs."""
    length, lines = results.settings["length"], curves(results, "non-overlapping")
    trained = {"ALiBi": ("alibi", length), "sinusoidal": ("sinusoidal", length)}
    trained[f"sinusoidal, trained at {2 * length:,}"] = ("sinusoidal", 2 * length)
    shown = [name for name in trained if name in lines]
    for height, name in enumerate(reversed(shown)):
        found = [value for value in lines[name][2 * length] if value is not None]
        colour, _, marker = _style(name)
        axes.plot(found, [height] * len(found), marker, color=colour, ms=9, alpha=0.7, linestyle="none")
        said = f"{name.partition(',')[0]}, trained at {trained[name][1]:,}{_cost(results, *trained[name])}"
        axes.annotate(said, (0.03, height + 0.13), xycoords=("axes fraction", "data"))
    axes.set_ylim(-0.4, len(shown) - 0.4)
    axes.set_yticks([])
    axes.margins(x=0.15)
    axes.set_xlabel("held-out perplexity")
    axes.set_title(f"the claim: all read at {2 * length:,} tokens")
    axes.grid(alpha=0.3, axis="x")


def _cost(results: Results, encoding: str, length: int) -> str:
    for cost in results.step_costs:
        if (cost["encoding"], cost["length"]) == (encoding, length):  # the first: as it was trained
            return f"\n{1e3 * cost['seconds']:.0f} ms and {cost['peak_bytes'] / 1e6:.1f} MB a step"
    return ""
