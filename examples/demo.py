"""The main job on two real checkpoints, offline: inspect, convert, verify, load without this package, write long text.

    make demo        (or: python examples/demo.py, where the package is installed)

`checkpoints/sotu-bloom` and `checkpoints/sotu-mpt` are small models trained with Transformers' own BLOOM and MPT
classes on texts of 256 tokens. Each becomes a folder in `build/demo/` that loads with torch and transformers alone.
Exit status: 0 if both are proved and write past their training length, 1 if not, 2 if a checkpoint cannot be read.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Set before the imports that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads are slower on models this small

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging

import alibi_hf

EXAMPLES = Path(__file__).resolve().parent
CHECKPOINTS = [EXAMPLES / "checkpoints" / name for name in ("sotu-bloom", "sotu-mpt")]
OUTPUT = EXAMPLES.parent / "build" / "demo"
TOKENS = 512  # twice the training length


@dataclass
class Outcome:
    """What the four steps gave for one checkpoint."""

    inspection: alibi_hf.Inspection
    verification: alibi_hf.Verification
    report: Path
    written: dict
    seconds: float

    @property
    def passed(self) -> bool:
        """True if parity is proved and the text is longer than what the model was trained on."""
        return self.verification.proved and self.written["tokens"] > self.written["trained"]


def run(source: Path, progress: Progress) -> Outcome:
    """Take one checkpoint through all steps; its bar moves on with each."""
    output = OUTPUT / source.name
    started = time.monotonic()
    task = progress.add_task("", total=3)

    def show(step: int, what: str, done: int = 0, total: int = 1) -> None:
        progress.update(task, completed=step + done / total, description=f"{source.name}: {what}")

    show(0, "inspect")
    inspection = alibi_hf.inspect_checkpoint(source)
    conversion = alibi_hf.convert(
        source, output, progress=lambda what, *at: show(1, f"convert and verify, {what}", *at)
    )
    show(2, "generate without alibi_hf")
    written = generate_elsewhere(output)
    show(3, "done")
    seconds = time.monotonic() - started
    return Outcome(inspection, conversion.verification, output / "verification.html", written, seconds)


def generate_elsewhere(folder: Path) -> dict:
    """Generate in a new process in which `import alibi_hf` raises, with a module cache of its own."""
    script = EXAMPLES / "generate_without_package.py"
    environment = os.environ | {"HF_MODULES_CACHE": str(OUTPUT / "modules")}
    command = [sys.executable, str(script), str(folder), str(TOKENS)]
    process = subprocess.run(command, env=environment, cwd=OUTPUT, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{folder} does not load without alibi_hf:\n{process.stderr}")
    return json.loads(process.stdout)


def as_table(outcomes: list[Outcome]) -> Table:
    """Return the closing table, one column a checkpoint."""
    table = Table("", *(source.name for source in CHECKPOINTS))

    def row(name: str, *cells: str) -> None:
        table.add_row(f"[bold]{name}", *cells, end_section=True)

    row("upstream class", *(outcome.verification.reference["class"].rpartition(".")[2] for outcome in outcomes))
    row("parameters", *(f"{outcome.inspection.parameters:,}" for outcome in outcomes))
    row("parity", *(verdict(outcome.verification) for outcome in outcomes))
    row("loaded without alibi_hf", *(outcome.written["loaded"].rpartition(".")[2] for outcome in outcomes))
    row("tokens written", *("{tokens} (trained on {trained})".format(**outcome.written) for outcome in outcomes))
    row("how the text ends", *(ending(outcome.written["text"]) for outcome in outcomes))
    row("seconds", *(f"{outcome.seconds:.0f}" for outcome in outcomes))
    return table


def ending(text: str, words: int = 40) -> str:
    """Return the last words of a text, safe to print as markup."""
    return "... " + escape(" ".join(text.split()[-words:]))


def verdict(verification: alibi_hf.Verification) -> str:
    """Return the verdict with what it rests on: checks that have a limit, and conversions made wrong on purpose."""
    passed = [check.passed for check in verification.checks if check.limit is not None]
    caught = [control.caught for control in verification.negative_controls]
    return (
        f"[{'green' if verification.proved else 'red'}]{verification.verdict}[/]\n"
        f"{sum(passed)} of {len(passed)} checks passed\n"
        f"{sum(caught)} of {len(caught)} wrong ones caught"
    )


def main() -> int:
    """Run everything and return the exit status."""
    console = Console()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    bar = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*bar, console=console) as progress:
            outcomes = [run(source, progress) for source in CHECKPOINTS]
    except alibi_hf.AlibiError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 2
    except RuntimeError as error:
        console.print(error, style="red", markup=False)
        return 1
    console.print(as_table(outcomes))
    for outcome in outcomes:
        console.print(f"Report: {outcome.report}", markup=False, soft_wrap=True)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
