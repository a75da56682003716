"""Tiny decoders of awkward shapes, the documents they read, and the check of any feeding against the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from alibi_hf import AlibiConfig, AlibiForCausalLM
from alibi_hf.model.bias_alibi import Distances
from tests.references.decoder import Decoded, decode

BACKENDS = ("eager", "sdpa", "flex_attention")

# Everything agrees to float64's own precision, because the reference rounds slope times distance to float32 as well. In
# float32 the bound is the one the design promises.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SQRT_TOLERANCE = 1e-7  # torch's float32 square root is a unit off in one place of five

ALL_BIASES = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}
MISTRAL = {"norm_type": "rms_norm", "mlp_type": "gated", "hidden_act": "silu", "tie_word_embeddings": False}

# Each config switch is in at least one case; head counts on both sides of a power of two.
CASES: dict[str, dict[str, Any]] = {
    "one_head": {"num_attention_heads": 1, "hidden_size": 16},
    "six": {"num_attention_heads": 6, "hidden_size": 48, "embedding_norm": True, **ALL_BIASES},
    "twelve_grouped": {
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "hidden_size": 48,
        "head_dim": 8,
        **MISTRAL,
    },
    "forty": {"num_attention_heads": 40, "hidden_size": 160, "hidden_act": "gelu_pytorch_tanh"},
    "multi_query": {
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "hidden_size": 48,
        "alibi_bias_max": 16,
        "clip_qkv": 1,
        "qk_norm": "full",
        "norm_bias": False,
        "attention_scale": 0.2,
        "logit_scale": 0.5,
    },
    "capped": {
        "num_attention_heads": 4,
        "hidden_size": 32,
        "qk_norm": "head",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "embedding_scale": 1.7,
    },
    "rms_head_norm": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_size": 48,
        "qk_norm": "head",
        **MISTRAL,
    },
    "sqrt": {"num_attention_heads": 6, "hidden_size": 48, "alibi_distance": "sqrt", "hidden_act": "relu"},
    "scaled": {"num_attention_heads": 6, "hidden_size": 48, "alibi_scaling": {"type": "linear", "factor": 3}},
    "scaled_by_length": {
        "num_attention_heads": 6,
        "hidden_size": 48,
        "alibi_scaling": {"type": "linear", "train_seq_len": 100},
    },
    "own_slopes": {
        "num_attention_heads": 4,
        "hidden_size": 32,
        "alibi_slopes": [0.9, 0.0, 0.03, 0.3],
        "norm_eps": 1e-3,
    },
    "after_norm": {"num_attention_heads": 12, "hidden_size": 48, "residual_from_norm": True, "attention_bias": True},
    "no_alibi": {"num_attention_heads": 4, "hidden_size": 32, "alibi": False, "intermediate_size": 40},
    "rope": {  # as in Qwen3; float32 holds these frequencies: 1, 1/4, 1/16, 1/64
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "alibi": False,
        "qk_norm": "head",
        "rope_parameters": {"rope_type": "default", "rope_theta": 256.0},
        **MISTRAL,
    },
    "hybrid": {
        "num_attention_heads": 6,
        "hidden_size": 96,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 256.0, "partial_rotary_factor": 0.5},
    },
    "learned": {
        "num_attention_heads": 4,
        "hidden_size": 32,
        "alibi": False,
        "learned_positions": True,
        "max_position_embeddings": 320,
    },
    "sinusoidal": {
        "num_attention_heads": 3,
        "hidden_size": 33,
        "alibi": False,
        "sinusoidal_positions": True,
        "embedding_scale": 33**0.5,
        "embedding_norm": True,
    },
    "two_heads": {"num_attention_heads": 2, "hidden_size": 16, "num_hidden_layers": 1},
}

TRAINED = 32  # max_position_embeddings of the cases

# Transformers' kinds of RoPE, at a training length of 32 tokens and for heads of 8 features.
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": TRAINED,
        "factor": 4.0,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
LATE = ("dynamic", "longrope")


def rope_of(kind: str) -> dict[str, Any]:
    """Return the `rope_parameters` of a kind."""
    return {"rope_type": kind, "rope_theta": 1000.0, **KINDS[kind]}


def config_of(case: str, **changes: Any) -> AlibiConfig:
    """Return the config of a case, with `changes`."""
    fields = {
        "vocab_size": 61,
        "num_hidden_layers": 2,
        "max_position_embeddings": TRAINED,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return AlibiConfig(**{**fields, **CASES[case], **changes})


def build(case: str, dtype: torch.dtype = torch.float64, backend: str = "sdpa", cls: Any = None, **changes: Any) -> Any:
    """Return a model of a case in eval mode; all its weights are random, norms and biases too, and always the same."""
    model = (cls or AlibiForCausalLM)(config_of(case, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
            else:
                parameter.copy_(noise * (1.0 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5))
    model.set_attn_implementation(backend)
    return model.to(dtype).eval()


def documents(*lengths: int) -> list[torch.Tensor]:
    """Return one document of random token ids (never the padding id) for each length, always the same."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(1, 61, (length,), generator=generator) for length in lengths]


@functools.cache
def _expected(case: str, tokens: tuple[int, ...], single: bool, calls: tuple[int, ...]) -> Decoded:
    model = build(case, backend="eager")
    with torch.no_grad():
        return decode(model.state_dict(), model.config.to_dict(), torch.tensor(tokens), single, calls)


def expected(case: str, document: torch.Tensor, single: bool = True, calls: Sequence[int] = ()) -> Decoded:
    """Return the reference's answer for one document of a case; `calls`: tokens of each call, all in one if empty."""
    return _expected(case, tuple(document.tolist()), single, tuple(calls))


def check(
    model: Any,
    feed: Callable[[Any, Sequence[torch.Tensor]], list[torch.Tensor]],
    case: str,
    texts: Sequence[torch.Tensor],
    tolerance: float | None = None,
    calls: Sequence[Sequence[int]] | None = None,
) -> None:
    """Assert that the model, fed in one way, gives each document the reference's logits.

    The bound is relative to the largest logit, for the dtype of the model. Where it matters how many tokens of a
    document each call reads, `calls` says so.
    """
    bound = tolerance or TOLERANCE[model.dtype]
    if model.config.alibi_distance == "sqrt":
        bound = max(bound, SQRT_TOLERANCE)
    with torch.no_grad():
        found = feed(model, texts)
    assert len(found) == len(texts)
    for text, logits, own in zip(texts, found, calls or [()] * len(texts), strict=True):
        assert_close(logits, expected(case, text, calls=own).logits, bound)


def assert_close(found: torch.Tensor, truth: torch.Tensor, bound: float) -> None:
    """Assert that nothing is further from the truth than `bound` times its largest entry."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    error = ((found.double() - truth.double()).abs().max() / truth.double().abs().max()).item()
    assert error <= bound, f"error {error:.2e} of the largest value, bound {bound:.0e}"  # also fails on NaN


def windowed(distances: Distances, eps: float | None) -> Distances:
    """Return the distances with windows that may drop `eps` of a row; None: without windows."""
    return distances.replace(window=eps is not None, window_eps=eps, shared={}, _kept={})
