"""Attention alone: time, memory and error of every core, over lengths, heads, head sizes and dtypes.

    python -m benchmarks.attention                      # about a quarter of an hour on two cores
    python -m benchmarks.attention --lengths 1024 --heads 16 --head-dim 64 --dtypes bf16 --threads 2
    python -m benchmarks.attention --inputs trained     # queries, keys and values of the shipped checkpoints
    python -m benchmarks.attention --full --device cuda

Each case is timed in interleaved rounds; the error against float64 is measured once, on the same inputs.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.table import Table

from benchmarks.contenders import CONTENDERS, Core
from benchmarks.inputs import Problem, make_problem, normal_problem, trained_problems
from benchmarks.memory import ChildDiedError, in_fresh_process, peak_bytes
from benchmarks.options import DTYPES, make_parser, settings, settle
from benchmarks.plot import draw
from benchmarks.report import Report, make_console, result_path
from benchmarks.timing import interleave, threads
from benchmarks.truth import errors, make_truth

DEFAULT = {"lengths": [1024, 4096], "heads": [16], "head_dim": [64], "memory": False, "slowest": 20.0}
FULL = {
    "lengths": [512, 1024, 2048, 4096, 8192, 16384, 32768],
    "heads": [12, 16, 32],
    "head_dim": [64, 128],
    "memory": True,
    "slowest": math.inf,
}
WARM_LENGTH = 64
PASSES = ("forward", "forward+backward")


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run the command; returns what it has written."""
    options = parse(arguments)
    words = [] if options.inputs == "normal" else [options.inputs]
    path = options.output or result_path("attention", options.device, *words)
    report, console = Report.start("attention", settings(options), options.device), make_console()
    for problem in problems(options):
        measure(problem, options, report)
        if _of(problem, report.results):
            console.print(table(problem, report))
        console.print(left_out(problem, report), style="dim")
        report.save(path)
    console.print(f"Results: {path}")
    if options.plot:
        draw(report.to_dict(), options.plot)
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line, all filled in."""
    parser = make_parser("attention", __doc__.split("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--heads", nargs="+", type=int, help="ignored for trained inputs, which have their own")
    parser.add_argument("--head-dim", nargs="+", type=int, help="likewise")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--inputs", choices=("normal", "trained"), default="normal")
    parser.add_argument("--slowest", type=float, help="leave out what takes more seconds a call (default: 20)")
    parser.add_argument("--memory", action="store_true", default=None, help="measure peak memory too")
    options = parser.parse_args(arguments)
    settle(options, DEFAULT, FULL)
    return options


def problems(options: argparse.Namespace) -> Iterator[Problem]:
    """Yield what is measured, the short ones first."""
    for length in sorted(options.lengths):
        for dtype in (DTYPES[name] for name in options.dtypes):
            if options.inputs == "trained":
                yield from trained_problems(length, dtype, options.device)
                continue
            for heads in options.heads:
                for head_dim in options.head_dim:
                    yield normal_problem(length, heads, head_dim, dtype, options.device)


def measure(problem: Problem, options: argparse.Namespace, report: Report) -> None:
    """Add the errors, times and memory of one problem to the report."""
    if options.device.startswith("cuda"):
        torch._dynamo.reset()  # every shape is compiled afresh: none runs on a kernel for lengths that vary
    plan = make_plan(problem, options, report)
    passes = {name: [p for (p, _), names in plan.items() if name in names] for name in options.contenders}
    cores = {name: CONTENDERS[name].prepare(problem) for name in options.contenders if passes[name]}
    found = measure_errors(problem, cores, [name for name in cores if PASSES[1] in passes[name]])
    memory = measure_memory(problem, {name: passes[name] for name in cores}, options) if options.memory else {}
    for (name, count), contenders in plan.items():
        calls = {each: functools.partial(RUNS[name], cores[each], problem.grad) for each in contenders}
        with threads(count):
            timings = interleave(calls, options.repeats, options.seconds, options.device) if calls else {}
        for contender, timing in timings.items():
            report.results.append(
                {
                    **problem.describe(),
                    "pass": name,
                    "threads": count,
                    "contender": contender,
                    **timing.to_dict(),
                    "ratio_to": contenders[0],
                    "error": _errors_of(found[contender], name),
                    "peak_bytes": memory.get((contender, name)),
                }
            )


def make_plan(problem: Problem, options: argparse.Namespace, report: Report) -> dict[tuple[str, int], list[str]]:
    """Return the contenders to run by pass and number of threads; those left out go to the report."""
    plan: dict[tuple[str, int], list[str]] = {}
    for name in options.passes:
        for count in options.threads:
            plan[name, count] = []
            for contender in options.contenders:
                case = {**problem.describe(), "pass": name, "threads": count, "contender": contender}
                reason = CONTENDERS[contender].left_out(problem, backward=name == PASSES[1])
                reason = reason or too_slow(case, options.slowest, report)
                if reason is None:
                    plan[name, count].append(contender)
                else:
                    report.left_out.append({**case, "reason": reason})
    return plan


def too_slow(case: dict[str, Any], slowest: float, report: Report) -> str | None:
    """Return why a case is left out that takes more than `slowest` seconds a call, as shorter inputs foretell."""
    same = {key: value for key, value in case.items() if key not in ("length", "inputs")}
    shorter = [row for row in report.results if row.items() >= same.items()]
    expected = max((row["median_ms"] / 1e3 * (case["length"] / row["length"]) ** 2 for row in shorter), default=0.0)
    if expected <= slowest:
        return None
    words = f"{case['pass']} with threads={case['threads']}"
    return f"{words} would take about {expected:.0f} s a call, --slowest is {slowest:g}"


def run_forward(core: Core, grad: torch.Tensor) -> torch.Tensor:
    """Attend once; returns the output `[1, heads, length, head_dim]`."""
    with torch.no_grad():
        return core.attend(*core.inputs)


def run_backward(core: Core, grad: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """Attend and go back with `grad`; returns the output and the gradients of the core's inputs."""
    inputs = [states.detach().requires_grad_() for states in core.inputs]
    output = core.attend(*inputs)
    return output.detach(), torch.autograd.grad(output, inputs, grad)


RUNS: dict[str, Callable[..., Any]] = dict(zip(PASSES, (run_forward, run_backward), strict=True))


def measure_errors(
    problem: Problem, cores: dict[str, Core], backward: Sequence[str]
) -> dict[str, dict[str, Any] | None]:
    """Return the errors against float64 of each contender, of the gradients too for those named in `backward`.

    A contender without ALiBi computes another thing: None.
    """
    judged = [name for name in cores if CONTENDERS[name].alibi]
    found: dict[str, dict[str, Any] | None] = dict.fromkeys(cores)
    truth = make_truth(problem, bool(backward)) if judged else None
    for name in judged:
        assert truth is not None
        if name in backward:
            output, gradients = run_backward(cores[name], truth.grad)
            found[name] = errors(truth, output, cores[name].split(gradients))
        else:
            found[name] = errors(truth, run_forward(cores[name], truth.grad), None)
    return found


def _errors_of(found: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    if found is None or name == PASSES[1]:
        return found
    return {"output": found["output"]}


def measure_memory(
    problem: Problem, passes: dict[str, list[str]], options: argparse.Namespace
) -> dict[tuple[str, str], int]:
    """Return the peak memory by contender and pass, in bytes over the inputs; on CPU from a new process each."""
    found: dict[tuple[str, str], int] = {}
    for contender, names in passes.items():
        names = list(dict.fromkeys(names))
        case = (problem.describe(), contender, names, options.device, max(options.threads))
        try:
            on_cuda = options.device.startswith("cuda")
            peaks = core_peaks(*case) if on_cuda else in_fresh_process(core_peaks, *case)
        except ChildDiedError:
            continue
        found |= {(contender, name): peak for name, peak in peaks.items() if peak is not None}
    return found


def core_peaks(
    description: dict[str, Any], contender: str, passes: Sequence[str], device: str, thread_count: int
) -> dict[str, int | None]:
    """Return by how many bytes memory rises in each pass, after a short problem has loaded the kernels."""
    torch.set_num_threads(thread_count)
    peaks = {}
    for each in ({**description, "inputs": "normal", "length": WARM_LENGTH}, description):
        problem = make_problem(**each, device=device)
        core = CONTENDERS[contender].prepare(problem)
        for name in passes:
            peaks[name] = peak_bytes(functools.partial(RUNS[name], core, problem.grad), device)
    return peaks


def table(problem: Problem, report: Report) -> Table:
    """Return the times and errors of one problem as a table."""
    rows = _of(problem, report.results)
    title = ", ".join(f"{key} {value}" for key, value in problem.describe().items())
    caption = f"ms a call: median ± IQR (times {rows[0]['ratio_to']}); error: root mean square over the truth's"
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    shown.add_column("contender", no_wrap=True)
    columns = list(dict.fromkeys((row["pass"], row["threads"]) for row in rows))
    for name, count in columns:
        shown.add_column(f"{name}\n{count} thread{'s' if count > 1 else ''}", justify="right", no_wrap=True)
    for name in ("error\noutput", "error\ngradients"):
        shown.add_column(name, justify="right", no_wrap=True)
    for contender in dict.fromkeys(row["contender"] for row in rows):
        own = {(row["pass"], row["threads"]): row for row in rows if row["contender"] == contender}
        cells = [_time_cell(own.get(column)) for column in columns]
        shown.add_row(contender, *cells, *_error_cells(list(own.values())[-1]["error"]))
    return shown


def _time_cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['median_ms']:.2f} ±{row['iqr_ms']:.2f} ({row['ratio']:.2f})"


def left_out(problem: Problem, report: Report) -> str:
    """Return a line that says which contenders were not run on `problem`, and why."""
    reasons: dict[str, list[str]] = {}
    for row in _of(problem, report.left_out):
        names = reasons.setdefault(row["reason"], [])
        names += [] if row["contender"] in names else [row["contender"]]
    lines = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return f"Left out: {'; '.join(lines)}." if lines else ""


def _of(problem: Problem, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.items() >= problem.describe().items()]


def _error_cells(found: dict[str, dict[str, float]] | None) -> tuple[str, str]:
    if found is None:
        return "no ALiBi", ""
    gradients = [found[name]["rms"] for name in ("dq", "dk", "dv") if name in found]
    return f"{found['output']['rms']:.1e}", f"{max(gradients):.1e}" if gradients else ""


if __name__ == "__main__":
    main()
