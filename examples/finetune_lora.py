"""Fine-tune an ALiBi checkpoint of any family with LoRA, merge, and send the result back to the upstream layout.

    python examples/finetune_lora.py
    python examples/finetune_lora.py --model mosaicml/mpt-7b --text my-folder --length 4096 --bf16 --rank 32 \\
        --target_modules all-linear --gradient_checkpointing --export_to llm-foundry --output_dir build/mine

Only the adapter is trained, on documents packed in one row that do not see each other. `--output_dir` then holds

    adapter/   what PEFT loads on top of the checkpoint
    merged/    the whole model with its code: loads with `trust_remote_code=True`
    exported/  the same weights in the layout that `--export_to` names; by default the one the checkpoint came in

and the script shows that the three compute the same: the merged model beside the adapted one, and Transformers' own
class (`BloomForCausalLM` for a BLOOM) on the exported folder beside the merged model. All arguments of
`TrainingArguments` are accepted (`--help` lists them).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    HfArgumentParser,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
)

from alibi_hf import AlibiError, AlibiForCausalLM, export
from alibi_hf.checkpoints.export import TARGETS
from alibi_hf.evaluation.perplexity import perplexity
from texts import as_documents, as_stream, load_texts

LOADED_BY_TRANSFORMERS = ("bloom", "mpt", "falcon")
DEFAULTS = {
    "output_dir": "build/lora",
    "max_steps": 60,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # below 1: a share of all steps
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass
class ScriptArguments:
    """What is adapted to what; the rest is in `TrainingArguments`."""

    model: str = field(
        default=str(Path(__file__).parent / "checkpoints" / "sotu-bloom"),
        metadata={"help": "Folder or Hub id of an ALiBi checkpoint of any family."},
    )
    text: str = field(
        default="sotu",
        metadata={"help": "sotu, a text file, a folder of .txt, a .jsonl/.csv/.parquet file, or a dataset's name."},
    )
    column: str = field(default="text", metadata={"help": "Where a dataset keeps its text."})
    length: int = field(default=512, metadata={"help": "Longer documents are cut in pieces of so many tokens."})
    eval_tokens: int = field(default=16384, metadata={"help": "How many held-out tokens perplexity is measured on."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the checkpoint's weights; the adapter is float32.", "choices": ["float32", "bfloat16"]},
    )
    rank: int = field(default=16, metadata={"help": "Rank of the adapter; alpha is twice that."})
    target_modules: list[str] = field(
        default_factory=list, metadata={"help": "Modules to adapt, or all-linear; q_proj and v_proj if not given."}
    )
    dora: bool = field(default=False, metadata={"help": "Adapt direction and magnitude apart (DoRA)."})
    export_to: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(TARGETS)}; none: no export.", "choices": [*TARGETS, "none"]}
    )

    def lora(self) -> LoraConfig:
        """Return the adapter's configuration; without target modules, PEFT's default for this model type."""
        modules: Any = self.target_modules or None
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules="all-linear" if modules == ["all-linear"] else modules,
            use_dora=self.dora,
        )


def build_trainer(script: ScriptArguments, training: TrainingArguments, tokenizer: Any, texts: list[str]) -> Trainer:
    """Return the Trainer of a model with a new adapter, on packed documents."""
    documents = as_documents(tokenizer, texts, script.length)
    base = AlibiForCausalLM.from_pretrained(script.model, dtype=getattr(torch, script.dtype))
    return Trainer(
        model=get_peft_model(base, script.lora()),
        args=training,
        train_dataset=[{"input_ids": ids} for ids in documents],
        data_collator=DataCollatorWithFlattening(),  # one row a batch: position_ids restart at each document
        processing_class=tokenizer,
    )


def sample_windows(script: ScriptArguments, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return windows of `--length` tokens from all over the held-out texts, `[tokens]`."""
    stream = as_stream(tokenizer, texts)
    if not 2 <= script.length <= len(stream):
        raise ValueError(f"--length {script.length} must be 2 to {len(stream)}, the tokens of the held-out text.")
    windows = stream[: len(stream) // script.length * script.length].view(-1, script.length)
    return windows[:: max(1, windows.numel() // script.eval_tokens)].flatten()


def find_target(script: ScriptArguments) -> str | None:
    """Return the layout to export to: the one asked for, else the one that the checkpoint is in, if that is one."""
    if script.export_to is not None:
        return None if script.export_to == "none" else script.export_to
    family = PreTrainedConfig.get_config_dict(script.model)[0].get("model_type")
    return family if family in TARGETS else None


@torch.no_grad()
def difference(one: Any, other: Any, tokens: torch.Tensor) -> float:
    """Return the largest difference of the logits of two models on `tokens`, over the largest logit."""
    found, expected = (model.eval()(tokens[None].to(model.device)).logits.float().cpu() for model in (one, other))
    return ((found - expected).abs().max() / expected.abs().max()).item()


def save(model: PeftModel, tokenizer: Any, output: Path, target: str | None, tokens: torch.Tensor) -> dict[str, float]:
    """Write adapter, merged model and export; return how far the logits of each are from those before it.

    Args:
        target: what to export to, or None.
        tokens: `[tokens]`, what the logits are compared on; MPT's own class reads no more than it was trained on.

    Raises:
        AlibiError: where the merged model cannot be exported to `target`; adapter and merged model are written then.
    """
    model.save_pretrained(output / "adapter", save_embedding_layers=False)  # the vocabulary is the checkpoint's
    adapted = copy.deepcopy(model)
    merged = model.merge_and_unload()
    merged.config.use_cache = True  # Trainer turned it off
    merged.save_pretrained(output / "merged")
    tokenizer.save_pretrained(output / "merged")
    found = {"merged, beside the adapted model": difference(merged, adapted, tokens)}
    if target is not None:
        export(output / "merged", output / "exported", target, overwrite=True)
    if target in LOADED_BY_TRANSFORMERS:
        upstream = AutoModelForCausalLM.from_pretrained(output / "exported", dtype=merged.dtype)
        found[f"exported, in {type(upstream).__name__}"] = difference(upstream.to(merged.device), merged, tokens)
    return found


def print_table(before: float, after: float, differences: dict[str, float]) -> None:
    """Print the figures of the run."""
    print(f"\n{'held-out perplexity, the checkpoint':48}{before:10.2f}")
    print(f"{'held-out perplexity, with the adapter':48}{after:10.2f}")
    for name, value in differences.items():
        print(f"{'logits, ' + name:48}{value:10.1e} of the largest")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and return the exit status: 0 done, 1 not exported, 2 bad input."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=__doc__.partition("\n")[0])
    parser.set_defaults(**DEFAULTS)
    script, training = parser.parse_args_into_dataclasses(arguments)
    try:
        target = find_target(script)
        tokenizer = AutoTokenizer.from_pretrained(script.model)
        texts = load_texts(script.text, script.column)
        tokens = sample_windows(script, tokenizer, texts.held_out)
        trainer = build_trainer(script, training, tokenizer, texts.train)
    except (ValueError, OSError) as error:
        print(f"finetune_lora.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    trainer.model.print_trainable_parameters()
    before = perplexity(trainer.model, tokens, script.length)  # the new adapter changes nothing yet
    trainer.train()
    if not trainer.is_world_process_zero():
        return 0
    after = perplexity(trainer.model, tokens, script.length)
    window = tokens[: min(script.length, trainer.model.config.max_position_embeddings)]
    try:
        differences = save(trainer.model, tokenizer, Path(training.output_dir), target, window)
    except AlibiError as error:
        print(f"finetune_lora.py: adapter and merged model are saved, not exported: {error}", file=sys.stderr)
        return 1
    print_table(before, after, differences)
    if target is None:
        print("Not exported: name a layout with --export_to.")
    print(f"Saved in {training.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
