"""Train on at a longer length, with the slopes as they are and with slopes divided by the factor of the lengths.

    python examples/extend_context.py
    python examples/extend_context.py --model build/finetuned --length 4096 --csv extended.csv

ALiBi reads past its training length anyway; training there makes it use what it reads. Interpolation (`alibi_scaling`)
divides each slope by new length / old length, so that distances look as they did in training: it hurts until the model
was trained on with it. Without arguments `checkpoints/sotu-bloom` goes from 256 to 1,024 tokens, twice from the same
weights on the same rows; perplexity on held-out documents is measured at 256 to 4,096 tokens before and after.
`--output_dir` then holds `as-they-were/` and `scaled/`, which load with `trust_remote_code=True`.

The factor is fixed, {"type": "linear", "factor": new / old}: scaling by "train_seq_len" would follow the length of each
document of a packed row, and few of them are as long as the row.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments

import finetune_trainer
from alibi_trainer import evaluations, print_table
from finetune_trainer import Data, build_trainer, check_steps, load_data, load_model, train

DEFAULTS = {
    **finetune_trainer.DEFAULTS,
    "output_dir": "build/extended",
    "text": "sotu",  # what the models in checkpoints/ were trained on: only the length is new
    "eval_tokens": 8192,
    "max_steps": 40,
    "learning_rate": 3e-4,
    "eval_strategy": "no",  # before and after are measured in any case
    "save_strategy": "no",
    "enable_jit_checkpoint": False,
}


@dataclass
class ScriptArguments(finetune_trainer.ScriptArguments):
    """What is trained on what; the rest is in `TrainingArguments`."""

    length: int = field(default=1024, metadata={"help": "The new training length, in tokens."})
    eval_lengths: list[int] = field(
        default_factory=lambda: [256, 512, 1024, 2048, 4096], metadata={"help": "Lengths to measure perplexity at."}
    )
    csv: str | None = field(default=None, metadata={"help": "A file for the table."})


def factor_of(config: Any, length: int) -> float:
    """Return new length / old length.

    Raises:
        ValueError: where that is no extension, or the slopes are scaled already.
    """
    if config.alibi_scaling is not None:
        raise ValueError(f"This model has alibi_scaling={config.alibi_scaling} already; take the one it came from.")
    if length <= config.max_position_embeddings:
        raise ValueError(
            f"A length of {length} tokens does not extend a model trained at {config.max_position_embeddings} "
            "(max_position_embeddings); give a longer --length."
        )
    return length / config.max_position_embeddings


def extend(
    script: ScriptArguments, training: TrainingArguments, tokenizer: Any, data: Data, factor: float | None
) -> dict[str, dict[int, float]]:
    """Train on once, slopes divided by `factor` if given; return the rows: perplexity by length before and after."""
    model = load_model(script)
    if factor is not None:
        model.config.alibi_scaling = {"type": "linear", "factor": factor}
    training = copy(training)
    training.output_dir = str(Path(training.output_dir) / ("as-they-were" if factor is None else "scaled"))
    trainer = build_trainer(model, tokenizer, data, script, training)
    train(trainer)
    found = evaluations(trainer.state)
    slopes = "as they were" if factor is None else f"divided by {factor:g}"
    return {f"{slopes}, {f'after {step} steps' if step else 'before'}": found[step] for step in sorted(found)}


def write_csv(path: Path, rows: dict[str, dict[int, float]]) -> None:
    """Write the table, one line a row and length."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slopes", "tokens", "perplexity"])
        writer.writerows([name, length, value] for name, values in rows.items() for length, value in values.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and return the exit status: 0 done, 2 bad input."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=__doc__.partition("\n")[0])
    parser.set_defaults(**DEFAULTS)
    try:
        script, training = parser.parse_args_into_dataclasses(arguments)
        if training.resume_from_checkpoint is not None:
            raise ValueError("Two short runs are not resumed; start again without --resume_from_checkpoint.")
        check_steps(training)
        factor = factor_of(load_model(script).config, script.length)
        tokenizer = AutoTokenizer.from_pretrained(script.model)
        data = load_data(script, tokenizer)
        if script.csv:
            Path(script.csv).parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"extend_context.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    rows = {
        **extend(script, training, tokenizer, data, None),
        **extend(script, training, tokenizer, data, factor),
    }
    print_table(rows)
    if script.csv:
        write_csv(Path(script.csv), rows)
    print(f"Saved in {training.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
