"""Tiny random checkpoints with learned or rotary positions, as Transformers writes them."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from tests.builders import HEAD_DIM, VOCAB, fill, untied, write

ROTARY_HEAD_DIM = 12  # of its own: no divisor of the width for most numbers of heads


def gpt2(folder: Path, heads: int = 6, *, layers: int = 2, seed: int = 0, **kwargs: Any) -> Path:
    """A `GPT2LMHeadModel` that was made for 48 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    raw = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": VOCAB,
        "n_embd": HEAD_DIM * heads,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 48,
        "n_ctx": 48,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **kwargs.pop("raw", {}),
    }
    model = fill(GPT2LMHeadModel(GPT2Config(**raw)), seed)
    return write(folder, raw, untied(model, raw.get("tie_word_embeddings", True)), **kwargs)


def llama(folder: Path, heads: int = 6, *, model_type: str = "llama", seed: int = 0, **kwargs: Any) -> Path:
    """A `LlamaForCausalLM` that was made for 48 tokens, its key/value heads shared where the heads can be."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    raw = {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": HEAD_DIM * heads,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 3),
        "head_dim": ROTARY_HEAD_DIM,
        "max_position_embeddings": 48,
        "rope_theta": 500.0,
        **kwargs.pop("raw", {}),
    }
    model = fill(AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(deepcopy(raw))), seed)
    raw["architectures"] = [type(model).__name__]
    return write(folder, raw, untied(model, raw.get("tie_word_embeddings", False)), **kwargs)


def mistral(folder: Path, heads: int = 6, **kwargs: Any) -> Path:
    """A `MistralForCausalLM` without a sliding window."""
    raw = {"sliding_window": None, **kwargs.pop("raw", {})}
    return llama(folder, heads, model_type="mistral", raw=raw, **kwargs)


SOURCES: dict[str, Callable[..., Path]] = {"gpt2": gpt2, "llama": llama, "mistral": mistral}
