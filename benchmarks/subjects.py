"""The models that are compared: a BLOOM and an MPT of 110 million parameters, as upstream's class and as ours.

Weights are random and written once in upstream's layout; both sides load that folder, ours through
`AlibiForCausalLM.from_pretrained`. Their spread makes queries and keys standard normal, as the inputs of
`benchmarks.attention` are: with the usual 0.02 scores would be too small for a window to have work to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, MptConfig, MptForCausalLM
from transformers.cache_utils import Cache

from alibi_hf import AlibiError, AlibiForCausalLM
from alibi_hf.model.cache_alibi import make_cache
from alibi_hf.verification.subjects import quiet

SEED = 0
SIZES = {
    "110m": {"hidden": 768, "layers": 12, "heads": 12, "vocab": 32000},
    "tiny": {"hidden": 32, "layers": 2, "heads": 4, "vocab": 128},  # only shows that the benchmark runs
}
UPSTREAM: dict[str, Any] = {"bloom": BloomForCausalLM, "mpt": MptForCausalLM}
# Fields of our config; upstream's class is the first contender, against which ratios are formed.
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "upstream": None,
    "ours": {"attention_window": True},
    "ours-dense": {"attention_window": False},
    "ours-flex": {"attention_window": True, "attn_implementation": "flex_attention"},
}
CUDA_ONLY = ("ours-flex",)


@dataclass(frozen=True)
class Subject:
    """A loaded model.

    Attributes:
        name: of the contender.
        model: in evaluation mode.
        make_cache: gives an empty cache of the kind that the model makes for itself.
    """

    name: str
    model: Any
    make_cache: Callable[[], Cache]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.model.parameters()).device


def write_checkpoint(family: str, size: str, longest: int, folder: Path) -> Path:
    """Write a random checkpoint in upstream's layout; `longest` is the room that MPT makes for positions."""
    torch.manual_seed(SEED)
    with quiet():
        UPSTREAM[family](_config(family, SIZES[size], longest)).save_pretrained(folder)
    return folder


def load_subject(family: str, contender: str, folder: Path, dtype: torch.dtype, device: str) -> Subject:
    """Load the checkpoint as upstream's class or as ours.

    Raises:
        AlibiError: where our config refuses the contender's fields, or the device cannot run it.
    """
    fields = CONTENDERS[contender]
    if contender in CUDA_ONLY and not device.startswith("cuda"):
        raise AlibiError("runs on CUDA alone")
    kind = UPSTREAM[family] if fields is None else AlibiForCausalLM
    with quiet():
        model = kind.from_pretrained(str(folder), dtype=dtype, **(fields or {})).to(device).eval()
    cache = (lambda: DynamicCache(config=model.config)) if fields is None else (lambda: make_cache(model.config))
    return Subject(contender, model, cache)


def filled_cache(subject: Subject, tokens: int) -> Cache:
    """Return a cache of `tokens` standard normal keys and values: reading them for real would tell nothing more."""
    config, weights = subject.model.config, next(subject.model.parameters())
    shape = (1, config.num_attention_heads, tokens, config.hidden_size // config.num_attention_heads)
    generator = torch.Generator().manual_seed(SEED)
    cache = subject.make_cache()
    with torch.no_grad():
        for layer in range(config.num_hidden_layers):
            states = (torch.randn(shape, generator=generator).to(weights) for _ in range(2))
            cache.update(*states, layer)
    return cache


def _config(family: str, size: dict[str, int], longest: int) -> Any:
    spread, vocab, hidden = size["hidden"] ** -0.5, size["vocab"], size["hidden"]
    if family == "bloom":
        return BloomConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            n_layer=size["layers"],
            n_head=size["heads"],
            initializer_range=spread,
        )
    return MptConfig(
        vocab_size=vocab,
        d_model=hidden,
        n_layers=size["layers"],
        n_heads=size["heads"],
        max_seq_len=longest,
        initializer_range=spread,
    )
