"""Fine-tune one of the heads on a small labelled task: classification, token classification, question answering.

    python examples/finetune_heads.py --task classification        # in which half century was this spoken?
    python examples/finetune_heads.py --task tokens                # names, sums of money and years
    python examples/finetune_heads.py --task question-answering    # When? How much? What share?
    python examples/finetune_heads.py --task classification --model bigscience/bloom-560m --data reviews.csv

`--model` is a checkpoint of any family as it was published; `--data` a table with the columns that `tasks.py` names.
What is printed: the held-out figures before and after, beside a baseline that reads nothing but single words. What is
left in `--output_dir` loads with `trust_remote_code=True` where this package is not installed. A few minutes on a CPU;
all settings of `TrainingArguments` can be given.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from alibi_hf import AlibiForQuestionAnswering, AlibiForSequenceClassification, AlibiForTokenClassification
from encoding import AnswerCollator, encode, find_labels
from resuming import checkpoint_to_resume
from scores import FIGURES, baseline, choose, scorer
from tasks import Row, load_rows

HEADS: dict[str, tuple[Any, Any]] = {  # model and collator
    "classification": (AlibiForSequenceClassification, DataCollatorWithPadding),
    "tokens": (AlibiForTokenClassification, DataCollatorForTokenClassification),
    "question-answering": (AlibiForQuestionAnswering, AnswerCollator),
}
DEFAULTS = {
    "output_dir": "build/heads",
    "max_steps": 150,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 15,
    "weight_decay": 0.01,
    "logging_steps": 25,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class ScriptArguments:
    """What to train on what; everything else is Trainer's."""

    task: Literal["classification", "tokens", "question-answering"] = field(metadata={"help": "which head"})
    model: str = field(
        default=str(Path(__file__).parent / "checkpoints" / "sotu-bloom"),
        metadata={"help": "a checkpoint of any family: folder or Hub id"},
    )
    data: str = field(default="sotu", metadata={"help": "sotu, a .csv, .json, .jsonl or .parquet file, or a dataset"})
    held_out: str | None = field(default=None, metadata={"help": "likewise; without it, every tenth row of --data"})
    length: int = field(default=256, metadata={"help": "tokens of a row; texts are cut here"})
    padding_side: Literal["left", "right"] = field(default="right", metadata={"help": "changes no figure"})


@dataclass
class Prepared:
    """What is to be trained: rows and inputs are pairs, to train on and held out."""

    model: Any
    tokenizer: Any
    labels: list[str]
    rows: tuple[list[Row], list[Row]]
    inputs: tuple[Any, Any]


def prepare(script: ScriptArguments) -> Prepared:
    """Read rows, tokenizer and checkpoint; every bad input is found here, before anything is trained or written."""
    if script.length < 1:
        raise ValueError(f"--length {script.length} leaves nothing to read; give at least 1.")
    rows = load_rows(script.task, script.data, script.held_out)
    labels = find_labels(rows[0])
    tokenizer = AutoTokenizer.from_pretrained(script.model, padding_side=script.padding_side)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, held_out = (encode(script.task, part, tokenizer, script.length, labels) for part in rows)
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model = HEADS[script.task][0].from_pretrained(
        script.model, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id, **(named if labels else {})
    )
    return Prepared(model, tokenizer, labels, rows, (train, held_out))


def train(task: str, prepared: Prepared, training: TrainingArguments, checkpoint: str | None) -> tuple[dict, dict]:
    """Train, from a checkpoint if there is one, and save; return the held-out figures before and after."""
    trainer = Trainer(
        prepared.model,
        training,
        train_dataset=prepared.inputs[0],
        eval_dataset=prepared.inputs[1],
        data_collator=HEADS[task][1](prepared.tokenizer),
        processing_class=prepared.tokenizer,
        compute_metrics=scorer(task, prepared.labels),
        preprocess_logits_for_metrics=choose,
    )
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate()
    trainer.save_model()
    return before, after


def report(task: str, rows: int, before: dict, after: dict, reference: float) -> str:
    """Return the closing table."""
    name = FIGURES[task]
    lines = [
        (f"{rows} held-out rows", "before", "after", "baseline"),
        (name, f"{before[f'eval_{name}']:.3f}", f"{after[f'eval_{name}']:.3f}", f"{reference:.3f}"),
        ("loss", f"{before['eval_loss']:.3f}", f"{after['eval_loss']:.3f}", ""),
    ]
    return "\n".join(f"{first:<20}" + "".join(f"{cell:>10}" for cell in rest) for first, *rest in lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments, train, and print the closing table; a bad input ends with one line and status 2."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=(__doc__ or "").partition("\n")[0])
    parser.set_defaults(**DEFAULTS)
    try:
        script, training = parser.parse_args_into_dataclasses(arguments)
        checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir)
        set_seed(training.seed)
        prepared = prepare(script)
    except (ValueError, OSError) as error:
        print(f"finetune_heads.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    before, after = train(script.task, prepared, training, checkpoint)
    print(report(script.task, len(prepared.rows[1]), before, after, baseline(script.task, *prepared.rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
