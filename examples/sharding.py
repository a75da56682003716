"""What a config of `accelerate/` says about sharding, for scripts that load and save a model.

FSDP and ZeRO-3 shard a loaded model, which Trainer does by itself. Tensor parallelism happens while it is loaded.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import ParallelismConfig
from transformers import Trainer
from transformers.distributed import DistributedConfig


def distributed_config() -> DistributedConfig | None:
    """Return what `from_pretrained` takes, after the section parallelism_config of the config; None without tp_size."""
    sizes = ParallelismConfig()  # of the environment that accelerate launch sets
    if sizes.tp_size == 1:
        return None
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    return DistributedConfig(tp_size=sizes.tp_size, fsdp_size=sizes.dp_shard_size, fsdp_mixed_precision=mixed)


def save_whole(trainer: Trainer, **kwargs: Any) -> None:
    """Save a model as `from_pretrained` reads it: with SHARDED_STATE_DICT `save_model` alone writes nothing."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(**kwargs)
