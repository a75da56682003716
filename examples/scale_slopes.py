"""Divide the slopes of a trained model, without training: what does that do to its perplexity at each length?

    python examples/scale_slopes.py                        # the shipped models, trained at 256 tokens, up to 8,192
    python examples/scale_slopes.py --models PATH_OR_ID --factors 2 4 8 --lengths 2048 8192 --tokens 32768

`alibi_scaling` divides all slopes: every head looks farther back. By a factor, at every length; by `train_seq_len`, by
the length of the text over the training length, so that no distance costs more than it did in training (Cerebras' BTLM
and Jais have both; it is position interpolation for ALiBi). A model that reads past its training length as it is has
nothing to gain: it was trained with the slopes it has, and with others it reads worse, also inside its training length.
Do not switch it on for a model without measuring it; training at the new slopes mends most of it (`extend_context.py`).

Every model is read at every length by both protocols of `alibi-hf evaluate`. Non-overlapping windows gain with length
whatever a model does, since fewer tokens stand at the start of a window; sliding windows, where each predicted token
has at least half a window before it, show what the longer text is worth.

`--output` then holds scale_slopes.csv and scale_slopes.png (this one needs matplotlib: pip install 'alibi-hf[plots]').
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, HfArgumentParser

from alibi_hf import AlibiForCausalLM
from alibi_hf.evaluation import Reading, read_lengths
from alibi_trainer import print_table
from texts import as_stream, load_texts, sample_evenly

CHECKPOINTS = Path(__file__).parent / "checkpoints"
COLUMNS = ("model", "slopes", "length", "protocol", "tokens", "loss", "standard_error", "perplexity", "failure")

Readings = dict[str, dict[str, list[Reading]]]  # by model and by what was done to its slopes


@dataclass
class Options:
    """What is read, and where the results go."""

    models: list[str] = field(
        default_factory=lambda: [str(CHECKPOINTS / name) for name in ("sotu-bloom", "sotu-mpt")],
        metadata={"help": "Folders or Hub ids of ALiBi checkpoints of any family."},
    )
    text: str = field(default="sotu", metadata={"help": "What is held out of sotu, docstrings, a file or a folder."})
    factors: list[float] = field(default_factory=lambda: [2.0, 4.0], metadata={"help": "What slopes are divided by."})
    lengths: list[int] = field(
        default_factory=lambda: [256, 1024, 4096, 8192], metadata={"help": "Tokens of the windows."}
    )
    tokens: int = field(default=8192, metadata={"help": "How many are read, in pieces from all over the text."})
    output: str = field(default="build/scale-slopes", metadata={"help": "Folder of the results."})


def scalings(factors: Sequence[float], trained: int) -> dict[str, dict[str, Any] | None]:
    """Return what is compared, by name: `alibi_scaling` of the config."""
    by_factor = {f"divided by {factor:g}": {"type": "linear", "factor": factor} for factor in factors}
    return {"as trained": None, **by_factor, f"by length/{trained}": {"type": "linear", "train_seq_len": trained}}


def held_out_tokens(tokenizer: Any, options: Options) -> torch.Tensor:
    """Return the text that is read, int64 `[tokens]`, of whole windows of the longest length.

    Raises:
        ValueError: where the text is shorter than the longest length, or that one than `--tokens`.
    """
    longest = max(options.lengths)
    if options.tokens < longest:
        raise ValueError(f"--tokens {options.tokens} are fewer than a window of {longest}; give at least {longest}.")
    stream = as_stream(tokenizer, load_texts(options.text).held_out)
    if len(stream) < longest:
        raise ValueError(
            f"The held-out text has {len(stream)} tokens, fewer than a window of {longest}; give shorter --lengths."
        )
    return sample_evenly(stream, options.tokens, longest)


def measure(model: str, options: Options) -> dict[str, list[Reading]]:
    """Return the readings of one model with each scaling of its slopes.

    Raises:
        ValueError, OSError: no such checkpoint; a text, factor or length that cannot be read.
    """
    tokens = held_out_tokens(AutoTokenizer.from_pretrained(model), options)
    plain = AlibiForCausalLM.from_pretrained(model, alibi_scaling=None, dtype=torch.float32)
    found = {}
    for name, scaling in scalings(options.factors, plain.config.max_position_embeddings).items():
        scaled = AlibiForCausalLM.from_pretrained(model, alibi_scaling=scaling, dtype=torch.float32)
        found[name] = read_lengths(scaled, tokens, options.lengths)
    return found


def print_model(name: str, found: dict[str, list[Reading]]) -> None:
    """Print the perplexity of one model, one line for each scaling and protocol."""
    rows: dict[str, dict[int, float]] = {}
    for protocol in ("sliding", "non-overlapping"):
        for slopes, readings in found.items():
            own = [reading for reading in readings if reading.protocol == protocol]
            rows[f"{slopes}, {protocol}"] = {reading.length: perplexity_of(reading) for reading in own}
    print(f"\n{name}", end="")
    print_table(rows)


def perplexity_of(reading: Reading) -> float:
    """Return the perplexity, not a number where the model failed."""
    return math.nan if reading.perplexity is None else reading.perplexity


def write_table(readings: Readings, path: Path) -> None:
    """Write all readings as CSV, one a row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for model, found in readings.items():
            for slopes, own in found.items():
                for reading in own:
                    writer.writerow([model, slopes, *(getattr(reading, column) for column in COLUMNS[2:])])


def draw(readings: Readings, path: Path) -> None:
    """Draw perplexity over length, one panel a model; sliding windows are solid, the others dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(readings), 4), layout="constrained")
    panels = figure.subplots(1, len(readings), squeeze=False)[0]
    for panel, (model, found) in zip(panels, readings.items(), strict=True):
        for number, (slopes, own) in enumerate(found.items()):
            for protocol, style in (("sliding", "o-"), ("non-overlapping", "o--")):
                points = [(each.length, perplexity_of(each)) for each in own if each.protocol == protocol]
                label = slopes if protocol == "sliding" else None
                panel.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label)
        lengths = sorted({reading.length for own in found.values() for reading in own})
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
        panel.set_title(f"{model}: sliding, dashed non-overlapping", fontsize="medium")
        panel.set_xlabel("tokens of a window")
        panel.set_ylabel("held-out perplexity")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and return the exit status: 0 done, 2 bad input."""
    parser = HfArgumentParser(Options, description=(__doc__ or "").partition("\n")[0])
    (options,) = parser.parse_args_into_dataclasses(arguments)
    readings: Readings = {}
    try:
        if len({Path(model).name for model in options.models}) < len(options.models):
            raise ValueError(f"--models {' '.join(options.models)} would have the same name in tables; rename one.")
        for model in options.models:
            name = Path(model).name
            readings[name] = measure(model, options)
            print_model(name, readings[name])
        output = Path(options.output)
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"scale_slopes.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    write_table(readings, output / "scale_slopes.csv")
    if find_spec("matplotlib"):
        draw(readings, output / "scale_slopes.png")
    print(f"\nTable and picture: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
