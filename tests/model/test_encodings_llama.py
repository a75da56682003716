"""RoPE of every kind against Transformers' Llama, with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.llama import modeling_llama

from alibi_hf import AlibiConfig, AlibiForCausalLM
from tests.builders import fill
from tests.model.cases import KINDS, MISTRAL, TRAINED, assert_close, documents, rope_of


def llama(rope: dict[str, Any], layers: int = 2) -> LlamaForCausalLM:
    """Return a random Llama that is trained at 32 tokens."""
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": TRAINED}
    config = LlamaConfig(**shape, **heads, rms_norm_eps=1e-5, rope_parameters=dict(rope), eos_token_id=None)
    model = fill(LlamaForCausalLM(config))
    model.set_attn_implementation("eager")
    return model


def ours(theirs: LlamaForCausalLM, rope: dict[str, Any], backend: str = "sdpa") -> AlibiForCausalLM:
    """Return the same decoder, with the same weights, as a config of this package."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {name: getattr(theirs.config, name) for name in (*names, "num_key_value_heads", "max_position_embeddings")}
    config = AlibiConfig(**shape, **MISTRAL, alibi=False, norm_eps=1e-5, rope_parameters=rope, pad_token_id=0)
    model = AlibiForCausalLM(config).eval()
    model.load_state_dict(theirs.state_dict())
    model.set_attn_implementation(backend)
    return model


def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Llama norm in float64 and turn by float64 angles of its float32 frequencies: it has float32 in any model."""

    def turn(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", dynamic_rope_update(turn))
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_llamas_logits(kind: str, backend: str) -> None:
    theirs = llama(rope_of(kind))
    model = ours(theirs, rope_of(kind), backend)
    for text in documents(20, TRAINED, TRAINED + 1, 100):
        assert_close(model(text[None]).logits, theirs(text[None]).logits, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_llamas_logits_in_float64(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_float64(monkeypatch)
    theirs = llama(rope_of(kind)).double()
    theirs.set_attn_implementation("sdpa")  # eager's softmax is float32
    model = ours(theirs, rope_of(kind)).double()
    for text in documents(20, TRAINED, TRAINED + 1, 100):
        assert_close(model(text[None]).logits, theirs(text[None]).logits, 1e-10)


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
def test_llamas_gradients(kind: str) -> None:
    text, theirs = documents(50)[0][None], llama(rope_of(kind))
    model = ours(theirs, rope_of(kind))
    for each in (theirs, model):
        each(text, labels=text, use_cache=False).loss.backward()
    truth = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, truth[name].grad, 1e-5)
