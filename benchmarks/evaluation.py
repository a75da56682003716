"""Evaluation of a long window beside the prefill of the same tokens: time, and memory at the peak.

    python -m benchmarks.evaluation                            # 32k tokens of a 110M model; half an hour a thread
    python -m benchmarks.evaluation --lengths 4096 --repeats 3
    python -m benchmarks.evaluation --device cuda --dtypes bf16

Prefill reads all tokens and makes the logits of the last; evaluation makes the loss of every token, as `alibi-hf
evaluate` does. Logits of all tokens at once would be 4 GB at 32k tokens and a vocabulary of 32000.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from alibi_hf.evaluation.losses import LossReader
from alibi_hf.evaluation.peak import measure_peak
from benchmarks.memory import ChildDiedError, in_fresh_process
from benchmarks.options import DTYPES, default_threads, make_parser, settings, settle
from benchmarks.report import Report, make_console, result_path
from benchmarks.subjects import SIZES, UPSTREAM, Subject, load_subject, write_checkpoint
from benchmarks.timing import interleave, threads

WAYS = ("prefill", "evaluation")  # the first is what ratios are formed against


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run the command; returns what it has written."""
    options = parse(arguments)
    path = options.output or result_path("evaluation", options.device)
    report, console = Report.start("evaluation", settings(options), options.device), make_console()
    for family in options.models:
        with tempfile.TemporaryDirectory(prefix="alibi-benchmark-") as name:
            folder = write_checkpoint(family, options.size, max(options.lengths), Path(name))
            for dtype in options.dtypes:
                for length in sorted(options.lengths):
                    measure(family, folder, dtype, length, options, report)
                    report.save(path)
    console.print(table(report))
    report.print_end(path, console)
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line, all filled in."""
    parser = make_parser("evaluation", __doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(UPSTREAM), default=["bloom"])
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of a window (default: 32768)")
    parser.add_argument("--size", choices=list(SIZES), default="110m")
    options = parser.parse_args(arguments)
    every = default_threads(options.device)
    default = {"lengths": [32768], "dtypes": ["float32"], "threads": every[:1]}
    settle(options, default, {"lengths": [4096, 16384, 32768], "threads": every})
    return options


def measure(family: str, folder: Path, dtype: str, length: int, options: argparse.Namespace, report: Report) -> None:
    """Add time and memory of both ways to the report."""
    subject = load_subject(family, "ours", folder, DTYPES[dtype], options.device)
    for count in options.threads:
        with threads(count):
            calls = make_calls(subject, length)
            timings = interleave(calls, options.repeats, options.seconds, options.device)
        for way, timing in timings.items():
            about = {"model": family, "size": options.size, "dtype": dtype, "length": length, "threads": count}
            peak = measured_peak(family, folder, dtype, length, way, options.device, count, report)
            row = {**about, "way": way, **timing.to_dict(), "peak_bytes": peak}
            report.results.append({**row, "tokens_per_second": length / timing.median_ms * 1e3})


def make_calls(subject: Subject, length: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what is timed, by way."""
    vocab = subject.model.config.vocab_size
    ids = torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(0)).to(subject.device)
    reader = LossReader(subject.model, ids[0].cpu())
    return {"prefill": functools.partial(prefill, subject.model, ids), "evaluation": lambda: reader.losses(ids, 1)}


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Read all tokens without a cache; returns the last logits, `[1, 1, vocab]`."""
    return model(ids, use_cache=False, logits_to_keep=1).logits


def measured_peak(
    family: str, folder: Path, dtype: str, length: int, way: str, device: str, count: int, report: Report
) -> int | None:
    """Return the most memory of the process, weights and libraries included; on a GPU that of its tensors."""
    task = (family, folder, dtype, length, way, device, count)
    try:
        return peak(*task) if device.startswith("cuda") else in_fresh_process(peak, *task)
    except ChildDiedError as error:
        report.left_out.append({"model": family, "length": length, "way": way, "reason": f"peak memory: {error}"})
        return None


def peak(family: str, folder: Path, dtype: str, length: int, way: str, device: str, count: int) -> int | None:
    """Return the peak of one call in this process."""
    torch.set_num_threads(count)
    call = make_calls(load_subject(family, "ours", folder, DTYPES[dtype], device), length)[way]
    with measure_peak(torch.device(device)) as found:
        call()
    return found.bytes


def table(report: Report) -> Table:
    """Return all results as a table."""
    shown = Table(title="evaluation beside prefill", title_justify="left", caption="seconds a window: median ± IQR")
    for name in ("model", "dtype", "tokens", "threads", "way", "s", "tokens/s", "times prefill", "peak MB"):
        shown.add_column(name, justify="left" if name in ("model", "dtype", "way") else "right", no_wrap=True)
    for row in report.results:
        shown.add_row(
            row["model"],
            row["dtype"],
            str(row["length"]),
            str(row["threads"]),
            row["way"],
            f"{row['median_ms'] / 1e3:.2f} ±{row['iqr_ms'] / 1e3:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio']:.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
        )
    return shown


if __name__ == "__main__":
    main()
