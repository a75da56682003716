"""Generate far past the training length, and see whether the text stays what it was: its quality, time and memory.

    python examples/generate_long.py                                 # 8,192 tokens, trained on 256; a few minutes
    python examples/generate_long.py --upstream True                 # beside Transformers' own class
    python examples/generate_long.py --model my-model --judge another-model --text my-texts/ --prompt "Once upon a time"

Several continuations of one prompt are sampled at once. For each segment of 1,024 tokens, and for real held-out text at
the same place, it tells how much repeats itself (`repetition.py`), what a second model makes of it (`judge.py`), and
what a token cost. `OUTPUT_DIR` holds quality.csv, cost.csv, generate_long.png and the texts. Exit status: 0 done, 1 the
model failed on the way, 2 bad input. `--upstream` shows where Transformers' class fails, as MPT does past its length.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads are slower on models this small

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, HfArgumentParser, set_seed
from transformers.utils import logging

from judge import Judge, load
from metering import Run, generate
from plot_generation import draw
from repetition import compression, distinct, earlier_runs, seen_before
from texts import load_texts, sample_evenly

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
GRAM = 4  # tokens of the n-grams that are counted
MIB = 2**20
QUALITY = {  # the figures of a segment, and what tables call them
    "distinct": f"distinct {GRAM}-grams",
    "seen_before": "seen before",
    "longest_run": "longest repeat",
    "compression": "zlib ratio",
    "perplexity": "judge's perplexity",
    "bits_per_byte": "bits per byte",
}
Figures = dict[str, float]  # by the keys of QUALITY
TABLE: dict[str, Any] = {"box": None, "title_justify": "left", "padding": (0, 1, 0, 0)}


@dataclass
class ScriptArguments:
    """What continues what, how far, and who judges it."""

    model: str = field(default=str(CHECKPOINTS / "sotu-bloom"), metadata={"help": "folder or Hub id"})
    judge: str = field(default=str(CHECKPOINTS / "sotu-mpt"), metadata={"help": "the second model: folder or Hub id"})
    text: str = field(default="sotu", metadata={"help": "real text: sotu, docstrings, a text file, a folder of them"})
    prompt: str = field(default="My fellow citizens, the state of our Union", metadata={"help": "what is continued"})
    tokens: int = field(default=8192, metadata={"help": "length of each text, prompt included"})
    segment: int = field(default=1024, metadata={"help": "tokens of a segment"})
    continuations: int = field(default=2, metadata={"help": "how many texts are sampled at once"})
    top_p: float = field(default=0.9, metadata={"help": "sampling: the share of probability that is kept"})
    temperature: float = field(default=1.0, metadata={"help": "sampling: what logits are divided by"})
    seed: int = field(default=0, metadata={"help": "of sampling"})
    judge_window: int | None = field(default=None, metadata={"help": "tokens; the judge's training length"})
    upstream: bool = field(default=False, metadata={"help": "run Transformers' own class on the same weights too"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    output_dir: str = field(default="build/generated", metadata={"help": "where tables, picture and texts go"})


def quality(rows: torch.Tensor, tokenizer: Any, judge: Judge, segment: int) -> list[list[Figures]]:
    """Return the figures of each segment of each text `[texts, tokens]`, named as in QUALITY."""
    figures = []
    for row in rows.tolist():
        runs = earlier_runs(row)
        places = [slice(start, start + segment) for start in range(0, len(row), segment)]
        pieces = [tokenizer.decode(row[place], skip_special_tokens=True) for place in places]
        figures.append(
            [
                {
                    "distinct": distinct(row[place], GRAM),
                    "seen_before": seen_before(runs[place], GRAM),
                    "longest_run": max(runs[place]),
                    "compression": compression(piece),
                    "perplexity": verdict.perplexity,
                    "bits_per_byte": verdict.bits_per_byte,
                }
                for place, piece, verdict in zip(places, pieces, judge.read(pieces), strict=True)
            ]
        )
    return figures


def mean_and_spread(texts: Sequence[Sequence[Figures]], segment: int, figure: str) -> tuple[float, float]:
    """Return the mean of a figure of one segment over texts, and its standard deviation (0 for one text)."""
    values = [text[segment][figure] for text in texts]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def quality_table(texts: dict[str, list[list[Figures]]], script: ScriptArguments) -> Table:
    """Return mean and spread of each figure by segment, what was written above what is real."""
    table = Table(title="quality: mean and standard deviation over texts", **TABLE)
    for heading in ("tokens", "text", *QUALITY.values()):
        table.add_column(heading.replace(" ", "\n", 1), justify="right")
    for index, place in enumerate(segment_names(script)):
        for kind, rows in texts.items():
            cells = [mean_and_spread(rows, index, name) for name in QUALITY]
            shown = [f"{number(mean)}±{number(spread)}" for mean, spread in cells]
            table.add_row(place if kind == "written" else "", kind, *shown)
    return table


def cost_table(runs: Sequence[Run], script: ScriptArguments) -> Table:
    """Return time and memory by segment, a group of columns a class."""
    table = Table(title=f"cost: a token of all {script.continuations} texts together", **TABLE)
    for heading in ("tokens", *(text for run in runs for text in (f"{run.name}\nms a token", "\ncache MiB"))):
        table.add_column(heading, justify="right")
    table.add_column("process\nMiB", justify="right")
    for index, place in enumerate(segment_names(script)):
        cells: list[str] = []
        for run in runs:
            if index < len(run.costs):
                cost = run.costs[index]
                cells += [f"{cost.seconds * 1000:.1f}", f"{cost.cache / MIB:.1f}"]
            else:
                cells += ["fails", ""]
        table.add_row(place, *cells, f"{runs[0].costs[index].memory / MIB:.1f}")
    return table


def segment_names(script: ScriptArguments) -> list[str]:
    """Return "to 1,024" and so on."""
    return [f"to {stop:,}" for stop in range(script.segment, script.tokens + 1, script.segment)]


def number(value: float) -> str:
    """Return about three digits of `value`, and no exponent."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write one table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def save(
    output: Path, texts: dict[str, list[list[Figures]]], runs: Sequence[Run], tokenizer: Any, script: ScriptArguments
) -> None:
    """Write quality.csv, cost.csv, the continuations, and the picture where matplotlib is installed."""
    numbered = [(kind, row, text) for kind, rows in texts.items() for row, text in enumerate(rows)]
    write_csv(
        output / "quality.csv",
        ["text", "row", "start", "stop", *QUALITY],
        [
            [kind, row, index * script.segment, (index + 1) * script.segment, *figures.values()]
            for kind, row, text in numbered
            for index, figures in enumerate(text)
        ],
    )
    write_csv(
        output / "cost.csv",
        ["class", "start", "stop", "seconds", "cache_bytes", "memory_bytes"],
        [
            [run.name, index * script.segment, (index + 1) * script.segment, *astuple(cost)]
            for run in runs
            for index, cost in enumerate(run.costs)
        ],
    )
    for row, text in enumerate(tokenizer.batch_decode(runs[0].tokens, skip_special_tokens=True)):
        (output / f"text-{row}.txt").write_text(text, encoding="utf-8")
    if find_spec("matplotlib"):
        draw(output / "generate_long.png", texts, runs, script.segment, QUALITY)


def check(script: ScriptArguments) -> None:
    """Refuse settings that can give no result, before anything is loaded.

    Raises:
        ValueError: naming the setting.
    """
    if script.segment < 2 * GRAM:
        raise ValueError(f"--segment {script.segment} is too short for {GRAM}-grams; give at least {2 * GRAM}.")
    if script.tokens < script.segment or script.tokens % script.segment:
        raise ValueError(f"--tokens {script.tokens} is no multiple of --segment {script.segment}; change one of them.")
    if script.continuations < 1:
        raise ValueError(f"--continuations {script.continuations} writes nothing; give at least 1.")
    if not 0 <= script.seed < 2**32:
        raise ValueError(f"--seed {script.seed} must be at least 0 and below 2**32.")
    if not 0 < script.top_p <= 1:
        raise ValueError(f"--top_p {script.top_p} is not between 0 and 1.")
    if not 0 < script.temperature < math.inf:
        raise ValueError(f"--temperature {script.temperature} must be positive and finite.")
    try:
        torch.empty(0, device=script.device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without CUDA
        raise ValueError(f"--device {script.device} cannot be used: {error}") from error


def real_rows(tokenizer: Any, script: ScriptArguments) -> torch.Tensor:
    """Return as many stretches of held-out text as there are continuations, or as fit, `[rows, tokens]`.

    Raises:
        ValueError: where the held-out text is shorter than one; a prompt without tokens, or not shorter than a segment.
        OSError: where there is no such text.
    """
    prompt = len(tokenizer(script.prompt)["input_ids"])
    if not 0 < prompt < script.segment:
        raise ValueError(
            f"--prompt has {prompt} tokens; give one of at least 1 and fewer than --segment {script.segment}."
        )
    held_out = "\n\n".join(load_texts(script.text).held_out)
    ids = torch.tensor(tokenizer(held_out, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < script.tokens:
        raise ValueError(
            f"{len(ids)} tokens of --text are held out, fewer than --tokens {script.tokens}; give a longer text."
        )
    return sample_evenly(ids, script.continuations * script.tokens, script.tokens).view(-1, script.tokens)


def write(model: Any, tokenizer: Any, script: ScriptArguments) -> Run:
    """Sample the continuations, from the same seed whatever the model."""
    set_seed(script.seed)
    prompt = tokenizer([script.prompt] * script.continuations, return_tensors="pt", return_token_type_ids=False)
    sampling = {"do_sample": True, "top_p": script.top_p, "temperature": script.temperature, "top_k": 0}
    return generate(model.to(script.device), prompt, script.tokens, script.segment, **sampling)


def run(script: ScriptArguments) -> int:
    """Generate, judge, print and save; return the exit status, as `main` does.

    Raises:
        ValueError, OSError: for bad input, before anything is generated.
    """
    check(script)
    model, tokenizer = load(script.model)
    judge = Judge(*load(script.judge), script.judge_window)
    rows = real_rows(tokenizer, script)
    upstream = AutoModelForCausalLM.from_pretrained(script.model, dtype=torch.float32) if script.upstream else None
    Path(script.output_dir).mkdir(parents=True, exist_ok=True)
    runs = [write(each, tokenizer, script) for each in (model, upstream) if each is not None]
    for other in runs[1:]:
        if other.failure:
            print(other.failure)
    if runs[0].tokens is None:
        print(f"generate_long.py: {runs[0].failure}", file=sys.stderr)
        return 1
    texts = {
        name: quality(each, tokenizer, judge, script.segment)
        for name, each in (("written", runs[0].tokens), ("real", rows))
    }
    console = Console()
    console.print(quality_table(texts, script), cost_table(runs, script))
    save(Path(script.output_dir), texts, runs, tokenizer, script)
    print(f"Saved in {script.output_dir}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and return the exit status: 0 done, 1 the model failed on the way, 2 bad input."""
    parser = HfArgumentParser(ScriptArguments, description=(__doc__ or "").partition("\n")[0])
    logging.set_verbosity_error()
    try:
        return run(*parser.parse_args_into_dataclasses(arguments))
    except (ValueError, OSError) as error:
        print(f"generate_long.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
