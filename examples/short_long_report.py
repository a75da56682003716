"""What `train_short_test_long.py` found: sentences, table.md and perplexity.csv, all from `results.json` alone."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from alibi_hf.evaluation.report import PROTOCOLS
from position_encodings import ENCODINGS
from short_long_results import Results

Values = dict[int, list[float | None]]  # by length, one a seed; None where the model fails


def curves(results: Results, protocol: str) -> dict[str, Values]:
    """Return the perplexities by line of the table, length and seed, all lines of L before those of 2 L."""
    found: dict[str, Values] = {}
    trained = results.settings["length"]
    for length in sorted({run["length"] for run in results.runs}):
        for encoding in ENCODINGS.values():
            for title in encoding.readings:
                values = defaultdict(list)
                for row in _rows(results, title, length, protocol):
                    values[row["length"]].append(row["perplexity"])
                if values:
                    found[title if length == trained else f"{title}, trained at {length:,}"] = dict(values)
    return found


def _rows(results: Results, title: str, trained: int, protocol: str) -> Iterator[dict[str, Any]]:
    for run in results.runs:
        if run["length"] == trained:
            yield from (row for row in run["readings"] if (row["read_as"], row["protocol"]) == (title, protocol))


def middle(values: list[float | None]) -> float | None:
    """Return the mean over seeds; None where one of them fails."""
    found = [value for value in values if value is not None]
    return mean(found) if len(found) == len(values) else None


def with_spread(values: list[float | None]) -> str:
    """Return mean and standard deviation over seeds in words."""
    centre = middle(values)
    if centre is None:
        return "fails"
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{centre:.1f}{spread}"


def findings(results: Results) -> list[str]:
    """Return what the numbers say of the paper's claims, in sentences; nothing of what was not trained."""
    lines, length = curves(results, "non-overlapping"), results.settings["length"]
    flat = [sentence for protocol in PROTOCOLS for sentence in _flatness(curves(results, protocol), length, protocol)]
    return [*_claim(lines, length), *flat, *_inside(lines, length), *_costs(results)]


def _claim(lines: dict[str, Values], length: int) -> list[str]:
    """Say whether ALiBi at L does as well as sinusoidal positions at 2 L (within 1 %), and what these gained by 2 L."""
    ours, longer = (middle(lines.get(name, {}).get(2 * length, [None])) for name in ("ALiBi", _longer(length)))
    if ours is None or longer is None:
        return []
    verdict = "reproduced" if ours <= 1.01 * longer else "NOT reproduced"
    said = f"{ours:.1f} against {longer:.1f} with sinusoidal positions trained at {2 * length:,}"
    found = [f"ALiBi trained at {length:,}, read at {2 * length:,}: perplexity {said}. The paper's claim is {verdict}."]
    shorter = middle(lines.get("sinusoidal", {}).get(length, [None]))
    if shorter is not None and shorter < longer:
        found.append(
            f"Sinusoidal positions read worse trained at {2 * length:,} ({longer:.1f}) than at {length:,} "
            f"({shorter:.1f} there): this budget is too small for them, and the paper's margin is far smaller."
        )
    return found


def _longer(length: int) -> str:
    return f"sinusoidal, trained at {2 * length:,}"


def _flatness(lines: dict[str, Values], length: int, protocol: str) -> list[str]:
    found = []
    for name, values in lines.items():
        first, last = (middle(values.get(factor * length, [None])) for factor in (2, 16))
        if first is not None and last is not None and name != _longer(length):
            found.append(f"{name} {100 * (last / first - 1):+.1f} %")
    if not found:
        return []
    span = f"From {2 * length:,} to {16 * length:,} tokens, {protocol} windows"
    return [f"{span}, perplexity changes by: {', '.join(found)}."]


def _inside(lines: dict[str, Values], length: int) -> list[str]:
    ours, compared = middle(lines.get("ALiBi", {}).get(length, [None])), ("RoPE", "ALiBi + RoPE", "sinusoidal")
    others = {name: middle(values[length]) for name, values in lines.items() if name in compared}
    said = [f"{name} {value:.1f}" for name, value in others.items() if value is not None]
    if ours is None or not said:
        return []
    return [f"At the training length itself: ALiBi {ours:.1f}, {', '.join(said)}."]


def _costs(results: Results) -> list[str]:
    said = []
    for attention in dict.fromkeys(cost["attention"] for cost in results.step_costs):
        costs = [cost for cost in results.step_costs if cost["attention"] == attention]
        (ours,) = (cost for cost in costs if cost["encoding"] == "alibi")
        theirs = max(costs, key=lambda cost: cost["length"])
        seconds, memory = (100 * (ours[name] / theirs[name] - 1) for name in ("seconds", "peak_bytes"))
        said.append(
            f"A training step of as many tokens ({attention}): ALiBi at {ours['length']:,} takes {round(seconds):+d} % "
            f"time and {round(memory):+d} % memory against sinusoidal positions at {theirs['length']:,}."
        )
    return said


def write_report(results: Results, output: Path) -> None:
    """Write perplexity.csv, table.md, and train_short_test_long.png where matplotlib is installed."""
    _write_csv(results, output / "perplexity.csv")
    (output / "table.md").write_text("\n".join(_markdown(results)) + "\n", encoding="utf-8")
    if find_spec("matplotlib"):
        from short_long_plot import draw

        draw(results, output / "train_short_test_long.png")


def _write_csv(results: Results, path: Path) -> None:
    names = ["read_as", "protocol", "length", "perplexity", "loss", "standard_error", "tokens", "failure"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["encoding", "trained_length", "seed", *names])
        for run in results.runs:
            for row in run["readings"]:
                writer.writerow([run["encoding"], run["length"], run["seed"], *(row[name] for name in names)])


def _markdown(results: Results) -> Iterator[str]:
    settings, seeds = results.settings, sorted({run["seed"] for run in results.runs})
    yield f"# Trained at {settings['length']:,} tokens, read at up to {settings['length'] * settings['longest']:,}"
    yield ""
    yield from (f"* {sentence}" for sentence in findings(results))
    for protocol in PROTOCOLS:
        yield f"\nHeld-out perplexity, {protocol} windows; mean ± standard deviation over seeds {_joined(seeds)}:\n"
        yield from _perplexities(results, protocol)
    yield "\nWhat training costs:\n"
    yield from _training(results)
    yield "\nOne step, forward and backward, timed in turn after all trainings:\n"
    yield from _steps(results)
    yield f"\nSettings: {_listed(settings)}.\n\nVersions: {_listed(results.versions)}.\n"
    yield f"Machine: {_listed(results.machine)}. On CPU, time is the processor's own; memory is that of all tensors but"
    yield "weights and optimizer."


def _perplexities(results: Results, protocol: str) -> Iterator[str]:
    lines = curves(results, protocol)
    lengths = sorted({length for values in lines.values() for length in values})
    yield from _head(["encoding", *(f"{length:,}" for length in lengths)])
    for name, values in lines.items():
        yield _line([name, *(with_spread(values[length]) for length in lengths)])


def _training(results: Results) -> Iterator[str]:
    yield from _head(["encoding", "trained at", "parameters", "s a step", "MB a step", "training loss"])
    for key in dict.fromkeys((run["encoding"], run["length"]) for run in results.runs):
        runs = [run for run in results.runs if (run["encoding"], run["length"]) == key]
        step = "cpu_seconds_per_step" if results.settings["device"] == "cpu" else "seconds_per_step"
        seconds, memory = (mean(run[name] for run in runs) for name in (step, "peak_bytes_of_step"))
        loss = middle([run["mean_training_loss"] for run in runs])
        figures = [f"{seconds:.3f}", f"{memory / 1e6:.1f}", "fails" if loss is None else f"{loss:.3f}"]
        yield _line([ENCODINGS[key[0]].title, f"{key[1]:,}", f"{runs[0]['parameters']:,}", *figures])


def _steps(results: Results) -> Iterator[str]:
    yield from _head(["encoding", "tokens a row", "attention", "ms", "MB"])
    for cost in results.step_costs:
        figures = [f"{1e3 * cost['seconds']:.1f}", f"{cost['peak_bytes'] / 1e6:.1f}"]
        yield _line([ENCODINGS[cost["encoding"]].title, f"{cost['length']:,}", cost["attention"], *figures])


def _head(names: list[str]) -> list[str]:
    return [_line(names), _line(["---", *["---:"] * (len(names) - 1)])]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _joined(values: list[int]) -> str:
    return ", ".join(str(value) for value in values)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
