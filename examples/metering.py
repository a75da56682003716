"""Time and memory of each segment of a text, measured while Transformers' `generate` writes it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from alibi_hf import AlibiForCausalLM
from alibi_hf.model.cache_alibi import GrowingCache


@dataclass(frozen=True)
class Cost:
    """What one segment cost.

    Attributes:
        seconds: of a step, the median; a step is one token of every continuation.
        cache: bytes that the cache holds after it, the room for tokens to come included.
        memory: bytes that the process (or GPU) has taken since generation began; a second run in the same process takes
            what the first has left.
    """

    seconds: float
    cache: int
    memory: int


@dataclass(frozen=True)
class Run:
    """One class that has generated.

    Attributes:
        name: of the class.
        tokens: `[continuations, tokens]`, prompt included; None where it failed.
        costs: of the segments that were finished.
        failure: why it ended early; empty where it did not.
    """

    name: str
    tokens: torch.Tensor | None
    costs: list[Cost]
    failure: str


class Meter(BaseStreamer):
    """Measures each segment while `generate` runs, which hands it every token.

    Args:
        cache: the one that `generate` fills.
        segment: in tokens.
    """

    def __init__(self, cache: Any, segment: int) -> None:
        self.cache, self.segment = cache, segment
        self.costs: list[Cost] = []
        self.length, self.before = 0, taken()
        self.steps: list[float] = []
        self.last = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt `[continuations, tokens]`, and then the new tokens `[continuations]` of each step."""
        self.length += value.shape[-1] if value.dim() > 1 else 1
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.last = now
        if self.length % self.segment == 0:
            self.costs.append(Cost(statistics.median(self.steps), cache_bytes(self.cache), taken() - self.before))
            self.steps.clear()

    def end(self) -> None:
        """Nothing is left to be done."""


def taken() -> int:
    """Return how many bytes the GPU holds, or the process where none is used."""
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else psutil.Process().memory_info().rss


def cache_bytes(cache: Any) -> int:
    """Return how many bytes a cache holds, the room for tokens to come included."""
    return sum(states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values))


def generate(model: Any, prompt: Any, tokens: int, segment: int, **options: Any) -> Run:
    """Continue every row of a batch with Transformers' `generate` up to `tokens` tokens, with no early end.

    Args:
        model: any causal model of Transformers.
        prompt: what the tokenizer returned, `[rows, prompt]`; shorter than a segment, without padding.
        tokens: length of each text, prompt included; a multiple of `segment`.
        segment: in tokens.
        options: of `generate`, such as how to sample.
    """
    cache = (GrowingCache if isinstance(model, AlibiForCausalLM) else DynamicCache)(config=model.config)
    meter, written, failure = Meter(cache, segment), None, ""
    new = tokens - prompt["input_ids"].shape[1]
    length = {"min_new_tokens": new, "max_new_tokens": new, "num_beams": 1}  # whatever the model's own settings say
    try:
        prompt = prompt.to(model.device)
        written = model.generate(**prompt, **length, **options, past_key_values=cache, streamer=meter).cpu()
    except (RuntimeError, ValueError, IndexError) as error:
        failure = f"{type(model).__name__} fails after {meter.length:,} tokens: {' '.join(str(error).split())}"
    return Run(type(model).__name__, written, meter.costs, failure)
