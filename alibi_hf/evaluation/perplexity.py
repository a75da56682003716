"""Perplexity of any causal model over non-overlapping windows of a text."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from alibi_hf.errors import AlibiError

LARGEST = math.log(sys.float_info.max)  # the logarithm of a perplexity that a float holds


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor, length: int, batch_tokens: int = 8192) -> float:
    """Return the perplexity of `model` on consecutive windows of `length` tokens; what is left over is not read.

    Infinite where the mean loss is past about 709, as of a model whose training has diverged.

    Args:
        model: any causal language model of Transformers; it is evaluated without dropout and left as it was.
        tokens: `[tokens]`, ids of one long text.
        length: of a window, in tokens; the first token of each is not predicted.
        batch_tokens: how many tokens are read at once.

    Raises:
        AlibiError: where a window has no token to predict, or the text is shorter than one window.
    """
    check_lengths(tokens, [length])
    windows = tokens[: len(tokens) // length * length].view(-1, length).to(model.device)
    options = {"use_cache": False}
    if "skip_logits" in inspect.signature(model.forward).parameters:
        options["skip_logits"] = True  # the loss alone is read: long windows need no logits
    batches = windows.split(max(1, batch_tokens // length))
    with evaluating(model):
        total = sum(float(model(input_ids=batch, labels=batch, **options).loss) * len(batch) for batch in batches)
    mean = total / len(windows)
    return math.exp(mean) if mean < LARGEST or math.isnan(mean) else math.inf


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, evaluate the model without dropout; afterwards every part of it is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def perplexity_by_length(model: Any, tokens: torch.Tensor, lengths: Sequence[int]) -> dict[int, float]:
    """Return the perplexity at each of `lengths`; the arguments and errors are those of [`perplexity`]."""
    check_lengths(tokens, lengths)
    return {length: perplexity(model, tokens, length) for length in lengths}


def check_lengths(tokens: torch.Tensor, lengths: Sequence[int]) -> None:
    """Refuse, before anything is computed, `lengths` that windows of the text `tokens` cannot have.

    Raises:
        AlibiError: as in [`perplexity`].
    """
    for length in lengths:
        if length < 2:
            raise AlibiError(f"a window of {length} tokens has nothing to predict; give lengths of at least 2.")
        if len(tokens) < length:
            raise AlibiError(
                f"the text has {len(tokens)} tokens, fewer than one window of {length}; give a shorter length."
            )
