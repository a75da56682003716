"""Whole models: prefill, training step, decoding and peak memory, beside upstream's class with the same weights.

    python -m benchmarks.model                                   # about a quarter of an hour on two cores
    python -m benchmarks.model --models bloom --tasks decode --contexts 4096 --dtypes fp32
    python -m benchmarks.model --full --device cuda

Upstream's classes have eager attention only. A training step is forward, loss and backward, without an optimizer, which
is the same on both sides. Decoding reads one token at a time against a cache of the given context.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from alibi_hf import AlibiError
from benchmarks.memory import ChildDiedError, in_fresh_process, peak_bytes
from benchmarks.options import DTYPES, default_threads, make_parser, settings, settle
from benchmarks.plot import draw
from benchmarks.report import Report, make_console, result_path
from benchmarks.subjects import CONTENDERS, SIZES, UPSTREAM, Subject, filled_cache, load_subject, write_checkpoint
from benchmarks.timing import interleave, threads
from benchmarks.truth import relative_error

TASKS = ("decode", "prefill", "train")
TOKENS = 8  # decoded in one call
ROOM = 1024  # tokens that decoding may add while it is measured
TRAINING_COST = 4  # times a prefill, at least; foretells whether a training step is too slow to be measured
DEFAULT = {"lengths": [1024], "contexts": [128, 1024, 4096], "memory": True, "slowest": 20.0}
FULL = {"lengths": [1024, 2048], "slowest": math.inf}

Case = tuple[str, int]  # task and length


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run the command; returns what it has written."""
    options = parse(arguments)
    path = options.output or result_path("model", options.device)
    report, console = Report.start("model", settings(options), options.device), make_console()
    for family in options.models:
        with tempfile.TemporaryDirectory(prefix="alibi-benchmark-") as name:
            folder = write_checkpoint(family, options.size, max(options.lengths + options.contexts) + ROOM, Path(name))
            for dtype in options.dtypes:
                measure(family, folder, dtype, options, report)
                console.print(table(family, dtype, report))
                report.save(path)
    report.print_end(path, console)
    if options.plot:
        draw(report.to_dict(), options.plot)
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line, all filled in."""
    parser = make_parser("model", __doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(UPSTREAM), default=list(UPSTREAM))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of prefill and training (default: 1024)")
    parser.add_argument("--contexts", nargs="+", type=int, help="tokens in the cache (default: 128 1024 4096)")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--size", choices=list(SIZES), default="110m")
    parser.add_argument("--slowest", type=float, help="leave out what takes more seconds a call (default: 20)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, help="measure peak memory (default: yes)")
    options = parser.parse_args(arguments)
    options.contenders.sort(key=list(CONTENDERS).index)  # upstream first: ratios are formed against the first
    every = default_threads(options.device)
    settle(options, {**DEFAULT, "threads": every[:1]}, {**FULL, "threads": every})
    return options


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield what is measured: tasks with their lengths, the short ones first."""
    for task in (task for task in TASKS if task in options.tasks):
        for length in sorted(options.contexts if task == "decode" else options.lengths):
            yield task, length


def measure(family: str, folder: Path, dtype: str, options: argparse.Namespace, report: Report) -> None:
    """Add the times and the memory of one model in one dtype to the report."""
    about = {"model": family, "size": options.size, "dtype": dtype}
    subjects = []
    for contender in options.contenders:
        try:
            subjects.append(load_subject(family, contender, folder, DTYPES[dtype], options.device))
        except AlibiError as error:
            report.left_out.append({**about, "contender": contender, "reason": str(error)})
    run: list[tuple[str, Case]] = []
    for case in cases(options):
        chosen = []
        for subject in subjects:
            named = {**about, "task": case[0], "length": case[1], "contender": subject.name}
            expected = expected_seconds(named, report)
            if expected > options.slowest:
                reason = f"would take about {expected:.0f} s a call, --slowest is {options.slowest:g}"
                report.left_out.append({**named, "reason": reason})
            else:
                chosen.append(subject)
        measure_case(about, case, chosen, options, report)
        run += [(subject.name, case) for subject in chosen if case[0] != "decode"]
    if options.memory:
        measure_memory(about, folder, run, options, report)


def measure_case(
    about: dict[str, Any], case: Case, subjects: list[Subject], options: argparse.Namespace, report: Report
) -> None:
    """Time one task at one length for all subjects in turn."""
    task, length = case
    with torch.no_grad():
        logits = {subject.name: make_call(subject, case)() for subject in subjects if task != "train"}
    for count in options.threads:
        calls = {subject.name: make_call(subject, case) for subject in subjects}
        with threads(count):
            timings = interleave(calls, options.repeats, options.seconds, options.device) if calls else {}
        for contender, timing in timings.items():
            row = {**about, "task": task, "length": length, "threads": count, "contender": contender}
            compared = "upstream" in logits
            unlike = relative_error(logits[contender], logits["upstream"].double())["rms"] if compared else None
            row |= timing.to_dict()
            row["tokens_per_second"] = (TOKENS if task == "decode" else length) / timing.median_ms * 1e3
            row["times_faster"] = 1 / timing.ratio if "upstream" in timings else None
            report.results.append({**row, "unlike_upstream": unlike, "peak_bytes": None})


def make_call(subject: Subject, case: Case) -> Callable[[], torch.Tensor]:
    """Return what is timed: it gives the last logits, or after a training step the loss."""
    task, length = case
    ids = torch.randint(0, subject.model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(subject.device)
    if task == "decode":
        return functools.partial(decode, subject.model, ids[:, :1], filled_cache(subject, length))
    return functools.partial({"prefill": prefill, "train": train}[task], subject.model, ids)


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Read all tokens into a new cache; returns the last logits, `[1, vocab]`."""
    return model.eval()(ids, use_cache=True, logits_to_keep=1).logits[:, -1]


@torch.no_grad()
def decode(model: Any, token: torch.Tensor, cache: Any) -> torch.Tensor:
    """Read `TOKENS` tokens one by one, always the same, so that all models have the same work; the last logits."""
    model.eval()
    for _ in range(TOKENS):
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]


def train(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Compute the loss and all gradients, and drop them; returns the loss."""
    loss = model.train()(ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def expected_seconds(about: dict[str, Any], report: Report) -> float:
    """Return how long a call will take, as calls on shorter inputs, or the prefill before training, foretell."""
    task, length = about["task"], about["length"]
    if task == "decode":
        return 0.0
    same = {key: value for key, value in about.items() if key not in ("task", "length")}
    known = [row for row in report.results if row.items() >= same.items() and row["task"] in ("prefill", task)]
    return max(
        (
            row["median_ms"] / 1e3 * (length / row["length"]) * (TRAINING_COST if row["task"] != task else 1)
            for row in known
        ),
        default=0.0,
    )


def measure_memory(
    about: dict[str, Any], folder: Path, run: list[tuple[str, Case]], options: argparse.Namespace, report: Report
) -> None:
    """Add the peak memory of prefill and training over the weights; on CPU a process for each contender."""
    for contender in dict.fromkeys(name for name, _ in run):
        own = [case for name, case in run if name == contender]
        task = (about["model"], contender, folder, about["dtype"], own, options.device, max(options.threads))
        try:
            on_cuda = options.device.startswith("cuda")
            peaks = model_peaks(*task) if on_cuda else in_fresh_process(model_peaks, *task)
        except ChildDiedError as error:
            report.left_out.append({**about, "contender": contender, "reason": f"peak memory: {error}"})
            continue
        for row in report.results:
            if row.items() >= {**about, "contender": contender}.items():
                row["peak_bytes"] = peaks.get((row["task"], row["length"]))


def model_peaks(
    family: str, contender: str, folder: Path, dtype: str, own: list[Case], device: str, thread_count: int
) -> dict[Case, int | None]:
    """Return by how many bytes memory rises in each case, after a short one has loaded the kernels."""
    torch.set_num_threads(thread_count)
    subject = load_subject(family, contender, folder, DTYPES[dtype], device)
    for task in dict.fromkeys(task for task, _ in own):
        make_call(subject, (task, 16))()
    return {case: peak_bytes(make_call(subject, case), device) for case in own}


def table(family: str, dtype: str, report: Report) -> Table:
    """Return the results of one model in one dtype as a table."""
    rows = [row for row in report.results if row["model"] == family and row["dtype"] == dtype]
    shown = Table(
        title=f"{family}, {dtype}",
        title_justify="left",
        caption="ms a call: median ± IQR; unlike: root mean square of the logits' difference over upstream's",
        caption_justify="left",
    )
    for name in ("task", "tokens", "threads", "contender", "ms", "tokens/s", "times faster", "peak MiB", "unlike"):
        shown.add_column(name, justify="left" if name in ("task", "contender") else "right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row["task"],
            str(row["length"]),
            str(row["threads"]),
            row["contender"],
            f"{row['median_ms']:.1f} ±{row['iqr_ms']:.1f}",
            f"{row['tokens_per_second']:.1f}",
            "" if row["times_faster"] is None else f"{row['times_faster']:.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
            "" if row["unlike_upstream"] is None else f"{row['unlike_upstream']:.1e}",
        )
    return shown


if __name__ == "__main__":
    main()
