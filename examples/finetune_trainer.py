"""Fine-tune an ALiBi checkpoint of any family with Trainer, on packed documents that do not see each other.

    python examples/finetune_trainer.py
    python examples/finetune_trainer.py --model bigscience/bloom-560m --text my-folder --length 2048 --bf16 \\
        --gradient_checkpointing --gradient_accumulation_steps 8 --output_dir build/mine
    python examples/finetune_trainer.py --resume_from_checkpoint true      # after Ctrl-C, SIGTERM or a crash

Without arguments it trains `checkpoints/sotu-bloom`, which knows speeches in pieces of 256 tokens, at 512 tokens on the
docstrings of Python's own library, for half an epoch, a few minutes on two cores. Perplexity on held-out
documents is measured at each of `--eval_lengths`, before, while and after training. All arguments of
`TrainingArguments` are accepted (`--help` lists them). `--output_dir` then holds weights, tokenizer and code: it loads
with `trust_remote_code=True`. `python examples/plot_loss.py build/finetuned loss.png` draws the run.
Needs the extra `train`: pip install 'alibi-hf[train]'.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, HfArgumentParser, TrainingArguments

from alibi_hf import AlibiForCausalLM
from alibi_hf.evaluation import check_lengths
from alibi_trainer import AlibiTrainer, evaluations, print_evaluations
from packing import PackedCollator, pack
from resuming import checkpoint_to_resume, saving_on_interrupt
from sharding import distributed_config, save_whole
from texts import as_documents, as_stream, load_texts, sample_evenly

DTYPES = ("float32", "bfloat16", "float16")
DEFAULTS = {
    "output_dir": "build/finetuned",
    "num_train_epochs": 0.5,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # below 1: a share of all steps, here and in the next
    "eval_steps": 0.25,
    "save_steps": 0.25,
    "eval_strategy": "steps",
    "eval_on_start": True,
    "logging_steps": 5,
    "save_total_limit": 2,
    "enable_jit_checkpoint": True,
    "report_to": "none",
    "remove_unused_columns": False,  # the collator reads seq_lengths
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class ScriptArguments:
    """What is trained on what; the rest is in `TrainingArguments`."""

    model: str = field(
        default=str(Path(__file__).parent / "checkpoints" / "sotu-bloom"),
        metadata={"help": "Folder or Hub id of an ALiBi checkpoint of any family."},
    )
    text: str = field(
        default="docstrings",
        metadata={"help": "docstrings, sotu, a text file, a folder of .txt, a .jsonl/.csv/.parquet file, a dataset."},
    )
    column: str = field(default="text", metadata={"help": "Where a dataset keeps its text."})
    length: int = field(default=512, metadata={"help": "Tokens of a packed row; a longer document is cut in pieces."})
    eval_lengths: list[int] = field(
        default_factory=lambda: [256, 512, 1024], metadata={"help": "Lengths to measure perplexity at."}
    )
    eval_tokens: int = field(default=4096, metadata={"help": "How many held-out tokens each evaluation reads."})
    dtype: str = field(
        default="float32", metadata={"help": "Of the weights; --bf16 computes in bfloat16 and keeps them in float32."}
    )


@dataclass(frozen=True)
class Data:
    """What is read: packed rows to train on, packed rows for the evaluation loss, and one text for perplexity."""

    train: Dataset
    held_out: Dataset
    eval_tokens: torch.Tensor


def load_model(script: ScriptArguments) -> AlibiForCausalLM:
    """Load the checkpoint, in upstream's layout or ours.

    Raises:
        ValueError, OSError: no such dtype; no such folder; an unknown family.
    """
    if script.dtype not in DTYPES:
        raise ValueError(f"--dtype {script.dtype} is none of {', '.join(DTYPES)}.")
    dtype, sharded = getattr(torch, script.dtype), distributed_config(script.model)
    return AlibiForCausalLM.from_pretrained(script.model, dtype=dtype, distributed_config=sharded)


def load_data(script: ScriptArguments, tokenizer: Any) -> Data:
    """Tokenise and pack the text.

    Raises:
        ValueError, OSError: no such text; an empty document; lengths that the held-out part cannot be read in.
    """
    texts = load_texts(script.text, script.column)
    stream = as_stream(tokenizer, texts.held_out)
    check_lengths(stream, script.eval_lengths)  # before the rest is tokenised
    held_out = pack(as_documents(tokenizer, texts.held_out), script.length).shuffle(seed=0)
    return Data(
        train=pack(as_documents(tokenizer, texts.train), script.length),
        held_out=held_out.select(range(min(len(held_out), max(1, script.eval_tokens // script.length)))),
        eval_tokens=sample_evenly(stream, script.eval_tokens, max(script.eval_lengths)),
    )


def check_steps(training: TrainingArguments) -> None:
    """Raise ValueError where no step would be taken."""
    if training.max_steps == 0:
        raise ValueError("--max_steps 0 trains nothing; give at least 1, or --num_train_epochs.")


def build_trainer(
    model: AlibiForCausalLM, tokenizer: Any, data: Data, script: ScriptArguments, training: TrainingArguments
) -> AlibiTrainer:
    """Return the Trainer; the training length that the model tells becomes at least `script.length`.

    Raises:
        ValueError: no steps to take; those of `AlibiTrainer`.
    """
    check_steps(training)
    trainer = AlibiTrainer(
        model,
        training,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=PackedCollator(),
        processing_class=tokenizer,
        eval_tokens=data.eval_tokens,
        eval_lengths=script.eval_lengths,
    )
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, script.length)
    tokenizer.model_max_length = max(tokenizer.model_max_length, script.length)
    return trainer


def train(trainer: AlibiTrainer, checkpoint: str | None = None) -> bool:
    """Train and save; return False if a signal stopped it, with a checkpoint to go on from."""
    trainer.args.eval_on_start &= checkpoint is None  # it is in the history of the checkpoint
    with saving_on_interrupt() if trainer.args.enable_jit_checkpoint else nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.global_step < trainer.state.max_steps:
        return False
    if trainer.state.global_step not in evaluations(trainer.state):
        trainer.evaluate()
    save_whole(trainer)
    trainer.save_state()
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and return the exit status: 0 trained and saved, 1 stopped by a signal, 2 bad input."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=__doc__.partition("\n")[0])
    parser.set_defaults(**DEFAULTS)
    try:
        script, training = parser.parse_args_into_dataclasses(arguments)
        checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir)
        model, tokenizer = load_model(script), AutoTokenizer.from_pretrained(script.model)
        trainer = build_trainer(model, tokenizer, load_data(script, tokenizer), script, training)
    except (ValueError, OSError) as error:
        print(f"finetune_trainer.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finished = train(trainer, checkpoint)
    if not trainer.is_world_process_zero():
        return 0
    if not finished:
        print(f"Stopped. Go on with --output_dir {training.output_dir} --resume_from_checkpoint true.", file=sys.stderr)
        return 1
    print_evaluations(trainer.state)
    print(f"Saved in {training.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
