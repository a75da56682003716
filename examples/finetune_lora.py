"""Fine-tune an ALiBi checkpoint of any family with LoRA, merge, and send the result back to the upstream layout.

    python examples/finetune_lora.py
    python examples/finetune_lora.py --model mosaicml/mpt-7b --text my-folder --length 4096 --bf16 --rank 32 \\
        --target_modules all-linear --gradient_checkpointing --export_to llm-foundry --output_dir build/mine
    python examples/finetune_lora.py --resume_from_checkpoint true         # after Ctrl-C, SIGTERM or a crash

Packed documents, perplexity while training and resuming are those of `finetune_trainer.py`; only an adapter is trained.
`--output_dir` then holds the adapter for PEFT, and

    merged/    the whole model with its code: loads with `trust_remote_code=True`
    exported/  the same weights in the layout that `--export_to` names; by default the one the checkpoint came in

and the script shows that they compute the same: the merged model beside the adapted one, and Transformers' own class
(`BloomForCausalLM` for a BLOOM) on the exported folder beside the merged model.
Needs the extra `train`: pip install 'alibi-hf[train]'.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedConfig, TrainingArguments

import finetune_trainer
from alibi_hf import AlibiError, export
from alibi_hf.checkpoints.export import TARGETS
from alibi_trainer import AlibiTrainer, print_evaluations
from finetune_trainer import build_trainer, load_data, load_model, train
from resuming import checkpoint_to_resume

LOADED_BY_TRANSFORMERS = ("bloom", "mpt", "falcon")
DEFAULTS = {**finetune_trainer.DEFAULTS, "output_dir": "build/lora", "learning_rate": 5e-3}


@dataclass
class ScriptArguments(finetune_trainer.ScriptArguments):
    """What is adapted to what, and how; the rest is in `TrainingArguments`."""

    rank: int = field(default=16, metadata={"help": "Rank of the adapter; alpha is twice that."})
    target_modules: list[str] = field(
        default_factory=list, metadata={"help": "Modules to adapt, or all-linear; q_proj and v_proj if not given."}
    )
    dora: bool = field(default=False, metadata={"help": "Adapt direction and magnitude apart (DoRA)."})
    export_to: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(TARGETS)}; none: no export.", "choices": [*TARGETS, "none"]}
    )


def lora_config(script: ScriptArguments) -> LoraConfig:
    """Return the adapter's configuration; without target modules, PEFT's default for this model type."""
    modules: Any = script.target_modules or None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=script.rank,
        lora_alpha=2 * script.rank,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        use_dora=script.dora,
    )


def find_target(script: ScriptArguments) -> str | None:
    """Return the layout to export to: the one asked for, else the one that the checkpoint is in, if that is one."""
    if script.export_to is not None:
        return None if script.export_to == "none" else script.export_to
    family = PreTrainedConfig.get_config_dict(script.model)[0].get("model_type")
    return family if family in TARGETS else None


@torch.no_grad()
def difference(one: Any, other: Any, tokens: torch.Tensor) -> float:
    """Return the largest difference of the logits of two models on `tokens` `[tokens]`, over the largest logit."""
    found, expected = (model.eval()(tokens[None].to(model.device)).logits.float().cpu() for model in (one, other))
    return ((found - expected).abs().max() / expected.abs().max()).item()


def merge_and_export(trainer: AlibiTrainer, target: str | None, tokens: torch.Tensor) -> dict[str, float]:
    """Write the merged model and its export; return how far the logits of each are from those before it.

    Args:
        trainer: trained; its model is merged in place.
        target: what to export to, or None.
        tokens: `[tokens]`, what the logits are compared on.

    Raises:
        AlibiError: where the merged model cannot be exported to `target`; it is written then.
    """
    output = Path(trainer.args.output_dir)
    adapted = copy.deepcopy(trainer.model)
    merged = trainer.model.merge_and_unload()
    merged.config.use_cache = trainer.use_cache  # training had set it aside
    merged.save_pretrained(output / "merged")
    trainer.processing_class.save_pretrained(output / "merged")
    found = {"merged, from adapted": difference(merged, adapted, tokens)}
    if target is not None:
        export(output / "merged", output / "exported", target, overwrite=True)
    if target in LOADED_BY_TRANSFORMERS:
        upstream = AutoModelForCausalLM.from_pretrained(output / "exported", dtype=merged.dtype).to(merged.device)
        found[f"{type(upstream).__name__} on exported, from merged"] = difference(upstream, merged, tokens)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and return the exit status: 0 done, 1 stopped by a signal or not exported, 2 bad input."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=__doc__.partition("\n")[0])
    parser.set_defaults(**DEFAULTS)
    try:
        script, training = parser.parse_args_into_dataclasses(arguments)
        target = find_target(script)
        checkpoint = checkpoint_to_resume(training.resume_from_checkpoint, training.output_dir)
        tokenizer = AutoTokenizer.from_pretrained(script.model)
        data = load_data(script, tokenizer)
        model = get_peft_model(load_model(script), lora_config(script))
        trainer = build_trainer(model, tokenizer, data, script, training)
    except (ValueError, OSError) as error:
        print(f"finetune_lora.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    model.print_trainable_parameters()
    finished = train(trainer, checkpoint)
    if not trainer.is_world_process_zero():
        return 0
    if not finished:
        print(f"Stopped. Go on with --output_dir {training.output_dir} --resume_from_checkpoint true.", file=sys.stderr)
        return 1
    try:
        differences = merge_and_export(trainer, target, data.eval_tokens[: script.length])
    except AlibiError as error:
        print(f"finetune_lora.py: adapter and merged model are saved, not exported: {error}", file=sys.stderr)
        return 1
    print_evaluations(trainer.state)
    print("\ndifference of logits, over the largest")
    for name, value in differences.items():
        print(f"  {name:48}{value:9.1e}")
    if target is None:
        print("Not exported: name a layout with --export_to.")
    print(f"Saved in {training.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
