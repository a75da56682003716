"""The two models that are compared: upstream's class filled from the source, and ours loaded from the output."""

from __future__ import annotations

import logging as python_logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.checkpoints.plan import Group
from alibi_hf.checkpoints.reference import load_reference
from alibi_hf.checkpoints.source import Checkpoint, with_fields
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.model.modeling_alibi import AlibiForCausalLM

HEADS = ("score.", "classifier.", "qa_outputs.")  # heads that the language model, which is compared, does not have


class Caught(Exception):
    """Ends a forward pass at a hook, which has what it came for."""


def compared_groups(checkpoint: Checkpoint) -> list[Group]:
    """Return the groups of the checkpoint that the language model is made of."""
    return [group for group in checkpoint.groups if not group.targets or not group.targets[0].startswith(HEADS)]


def longer_fields(reference: Reference, length: int) -> dict[str, Any]:
    """Return the fields of upstream's config that make room for `length` tokens; empty where there is room."""
    if reference.max_length is None or length <= reference.max_length or reference.length_field is None:
        return {}
    return {reference.length_field: length}


def depends_on_call(config: AlibiConfig) -> bool:
    """True where slopes depend on how many tokens a call has: upstream's padding and anyone's cache change logits."""
    return config.alibi_scaling is not None and "train_seq_len" in config.alibi_scaling


def load_upstream(
    checkpoint: Checkpoint, reference: Reference, dtype: torch.dtype, length: int, stored: torch.dtype, device: str
) -> nn.Module:
    """Return the reference in `dtype`, filled from the source, with room for rows of `length` tokens.

    `stored` is the dtype of the output's tensors: the source's values are rounded to it first, so that both models have
    the same weights and only the computation is compared.

    Raises:
        TensorError: naming a tensor that the reference has no place for, or a parameter that nothing fills.
    """
    decoder = replace(checkpoint, groups=compared_groups(checkpoint))
    _, model = load_reference(decoder, dtype, device, stored, **longer_fields(reference, length))
    if stored != checkpoint.dtype:
        for weight in model.parameters():
            weight.data = weight.data.to(stored).to(dtype)
    return model.eval()


def load_ours(output: str | Path, dtype: torch.dtype, device: str, **fields: Any) -> AlibiForCausalLM:
    """Return our model from `output` through the installed package, with config `fields` such as alibi_rounding set."""
    config = with_fields(read_own_config(output), fields)
    model = AlibiForCausalLM.from_pretrained(str(output), config=config, dtype=dtype, use_safetensors=True)
    return model.to(device).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and warnings of Transformers and of our model out of a report; errors are raised anyway."""
    logging, own = transformers.utils.logging, python_logging.getLogger("alibi_hf.model")
    level, own_level, bars = logging.get_verbosity(), own.level, logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    own.setLevel(python_logging.ERROR)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        own.setLevel(own_level)
        if bars:
            logging.enable_progress_bar()
