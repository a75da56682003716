"""What a config of `accelerate/` says about sharding, for scripts that load and save a model.

    python examples/sharding.py my-bloom my-untied-bloom     # gives the head weights of its own

FSDP and ZeRO-3 shard a loaded model, which Trainer does by itself. Tensor parallelism happens while it is loaded. With
both, Transformers 5.23 trains models wrongly whose head and embedding are one tensor, Llamas too: from the second step
on, losses differ. Such a model is refused here, and the command above makes one of it that trains.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from transformers import AutoConfig, AutoTokenizer, Trainer
from transformers.distributed import DistributedConfig

from alibi_hf import AlibiForCausalLM


def distributed_config(folder: str | Path) -> DistributedConfig | None:
    """Return what `from_pretrained` takes, after the section parallelism_config of the config; None without tp_size.

    Raises:
        ValueError: for tensor parallelism with FSDP, where head and embedding of the model in `folder` are one tensor.
    """
    sizes = ParallelismConfig()  # of the environment that accelerate launch sets
    if sizes.tp_size == 1:
        return None
    if sizes.dp_shard_size > 1 and AutoConfig.from_pretrained(folder).tie_word_embeddings:
        raise ValueError(
            f"{folder} has tie_word_embeddings=True, which tp_size={sizes.tp_size} with dp_shard_size="
            f"{sizes.dp_shard_size} trains wrongly; run `python examples/sharding.py {folder} OUTPUT`, and train that."
        )
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    return DistributedConfig(tp_size=sizes.tp_size, fsdp_size=sizes.dp_shard_size, fsdp_mixed_precision=mixed)


def save_whole(trainer: Trainer, **kwargs: Any) -> None:
    """Save a model as `from_pretrained` reads it: with SHARDED_STATE_DICT `save_model` alone writes nothing."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(**kwargs)


def untie(source: Path, output: Path) -> None:
    """Write a model in our own layout whose head has weights of its own, equal to those of the embedding."""
    model = AlibiForCausalLM.from_pretrained(source)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(output)
    if (source / "tokenizer_config.json").is_file():
        AutoTokenizer.from_pretrained(source).save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of an ALiBi checkpoint of any family")
    parser.add_argument("output", type=Path, help="folder to write")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists; name a new folder.")
    untie(options.source, options.output)
