"""Converting and proving a checkpoint that is much larger than the memory: `python -m benchmarks.conversion`.

Makes a synthetic BLOOM checkpoint in shards, converts it with one worker and with several beside `cp` of the same
bytes (in turn, from files that are not in the page cache, written through to the disk), and verifies the last
conversion layer by layer. Private memory (RssAnon) is sampled in each process; cached files are no part of it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.checkpoints.writer import Entry, ShardWriter, write_json
from alibi_hf.families.bloom import _build
from alibi_hf.verification import LAYERWISE, verify
from benchmarks.memory import in_fresh_process, peak_private
from benchmarks.report import Report, make_console, result_path

MB, GB = 10**6, 10**9
WIDTH, HEADS, VOCABULARY, LENGTH = 2048, 16, 32768, 32
COPY = "cp"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark, print the table and write the JSON file."""
    options = parse(arguments)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "folder")}
    report = Report.start("conversion", settings, "cpu")
    path = options.output or result_path("conversion", "cpu")
    folder = Path(tempfile.mkdtemp(prefix="conversion-", dir=options.folder))
    try:
        layers = layers_for(options.gigabytes * GB)
        source = make_checkpoint(folder / "source", layers, options.shard_mb * MB)
        report.settings |= {"width": WIDTH, "heads": HEADS, "vocabulary": VOCABULARY, "layers": layers}
        measure(report, source, options.workers, options.rounds)
        report.save(path)
        report.results.append(verified(source, folder / "out"))
        report.save(path)
    finally:
        shutil.rmtree(folder)
    make_console().print(table(report, options.limit_mb * MB))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.conversion", description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the checkpoint in bfloat16 (default: 4)")
    parser.add_argument("--shard-mb", type=int, default=500, help="of its shards (default: %(default)s)")
    parser.add_argument("--limit-mb", type=int, default=1000, help="private memory to stay within (default: 1000)")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="to convert with (default: 1 2)")
    parser.add_argument("--rounds", type=int, default=1, help="of copying and converting (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; needs twice the checkpoint's size")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/, by machine)")
    return parser.parse_args(arguments)


def raw_config(layers: int) -> dict[str, Any]:
    """Return the config.json of the synthetic checkpoint."""
    return {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "n_layer": layers,
        "n_head": HEADS,
        "seq_length": LENGTH // 2,
    }


def layers_for(size: float) -> int:
    """Return how many layers make a bfloat16 checkpoint of about `size` bytes."""
    return max(1, round((size / 2 - VOCABULARY * WIDTH) / (12 * WIDTH**2)))


def make_checkpoint(folder: Path, layers: int, shard: int) -> Path:
    """Write a BLOOM checkpoint with random bfloat16 weights, one tensor at a time, and return its folder."""
    names = _build(raw_config(layers), torch.bfloat16).state_dict()
    names.pop("lm_head.weight")  # tied
    entries = [Entry(name, tuple(value.shape), value.dtype) for name, value in names.items()]
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {**raw_config(layers), "torch_dtype": "bfloat16"})
    writer, generator = ShardWriter(folder, entries, shard), torch.Generator().manual_seed(0)
    for entry in entries:
        values = torch.randn(entry.shape, generator=generator, dtype=torch.float32)
        values *= 0.1 if len(entry.shape) == 1 else entry.shape[1] ** -0.5
        values += 1.0 if entry.name.endswith("norm.weight") or entry.name.endswith("ln_f.weight") else 0.0
        writer.add(entry.name, values.to(entry.dtype))
    writer.finish()
    return folder


def measure(report: Report, source: Path, workers: list[int], rounds: int) -> None:
    """Copy and convert in turn; the last output stays beside the source as "out"."""
    out = source.with_name("out")
    size = sum(path.stat().st_size for path in source.iterdir())
    contenders: dict[str, Callable[[], dict[str, Any]]] = {COPY: lambda: copied(source, out)}
    for number in workers:
        contenders[f"convert, {number} workers"] = lambda number=number: in_fresh_process(  # type: ignore[misc]
            converted, source, out, number
        )
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            shutil.rmtree(out, ignore_errors=True)
            forget(source)
            samples[name].append(call())
    for name, runs in samples.items():
        seconds = [run["seconds"] for run in runs]
        ratios = [one / other["seconds"] for one, other in zip(seconds, samples[COPY], strict=True)]
        report.results.append(
            {
                "step": name,
                "bytes": size,
                "seconds": median(seconds),
                "rounds": seconds,
                "mb_per_second": size / MB / median(seconds),
                "times_cp": median(ratios),
                "peak_private_bytes": max(run.get("peak") or 0 for run in runs) or None,
            }
        )


def copied(source: Path, out: Path) -> dict[str, Any]:
    """Copy the folder by `cp` and write it through to the disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, out], check=True)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - started}


def converted(source: Path, out: Path, workers: int) -> dict[str, Any]:
    """Convert in this process; seconds, and peak of the private memory."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    _, peak = peak_private(lambda: convert(source, out, verify=False, workers=workers, max_shard_size="500MB"))
    return {"seconds": time.perf_counter() - started, "peak": peak}


def verified(source: Path, out: Path) -> dict[str, Any]:
    """Verify layer by layer in a process of its own, and return the row of the report."""
    return in_fresh_process(_verified, source, out)


def _verified(source: Path, out: Path) -> dict[str, Any]:
    started = time.perf_counter()
    report, peak = peak_private(lambda: verify(source, out, only=LAYERWISE, lengths=[LENGTH]))
    checkpoint = Checkpoint.open(source)
    return {
        "step": "verify, layer by layer",
        "bytes": sum(path.stat().st_size for path in source.iterdir()),
        "seconds": time.perf_counter() - started,
        "verdict": report.verdict,
        "checks": len(report.checks),
        "float64_model_bytes": 8 * checkpoint.parameters,
        "peak_private_bytes": peak,
    }


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache, where the system can."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(report: Report, limit: int) -> Table:
    """Return one line a step, and whether private memory stayed within `limit` bytes."""
    size = report.results[0]["bytes"]
    peaks = [row["peak_private_bytes"] for row in report.results if row["peak_private_bytes"]]
    within = "within" if max(peaks, default=0) <= limit else "MORE THAN"
    shown = Table(
        title=f"BLOOM layout, {report.settings['layers']} layers, {size / GB:.1f} GB",
        caption=f"private memory: {within} the limit of {limit / MB:.0f} MB; times cp: in the same round, median",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("step", "seconds", "MB/s", "times cp", "private memory, MB"):
        shown.add_column(name, justify="left" if name == "step" else "right")
    for row in report.results:
        speed, times = (row.get(name) for name in ("mb_per_second", "times_cp"))
        shown.add_row(
            row["step"] + (f": {row['verdict']}" if "verdict" in row else ""),
            f"{row['seconds']:.1f}",
            f"{speed:.0f}" if speed else "",
            f"{times:.2f}" if times else "",
            f"{row['peak_private_bytes'] / MB:.0f}" if row["peak_private_bytes"] else "",
        )
    return shown


if __name__ == "__main__":
    main()
