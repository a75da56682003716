"""How close a family has to be to its independent reference, in every way of feeding it; shared by families' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.direct import load_foreign
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from tests.builders import distance, ids

LENGTH = 48  # past the training length of 32 that the references write
FLOAT64, FLOAT32 = 1e-7, 2e-6  # slope and bias are float32 whatever the dtype


@torch.no_grad()
def check_parity(
    folder: Path, out: Path, logits: Callable[..., torch.Tensor], backend: str = "eager", exact: float = FLOAT64
) -> None:
    """Converted and directly loaded model against `logits(folder, ids, mask)`: whole, padded, token by token."""
    convert(folder, out, verify=False, dtype="float32", max_shard_size="40KB")
    tokens, mask = ids(length=LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :7] = 0
    whole, padded = logits(folder, tokens), logits(folder, tokens, mask)
    for model in (
        AlibiForCausalLM.from_pretrained(out, attn_implementation=backend),
        load_foreign(AlibiForCausalLM, folder, attn_implementation=backend, dtype=torch.float32),
    ):
        model = model.eval()
        assert distance(model(tokens).logits, whole) < FLOAT32
        assert distance(model.double()(tokens).logits, whole) < exact
        got = model(tokens, attention_mask=mask).logits
        assert distance(got[mask.bool()], padded[mask.bool()]) < exact
    assert distance(token_by_token(model, tokens[:, :40]), whole[:, :40]) < exact


@torch.no_grad()
def token_by_token(model: AlibiForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, tokens, vocab] of a cached decode, one token a step after the first eight."""
    step = model(tokens[:, :8], use_cache=True)
    found = [step.logits]
    for place in range(8, tokens.shape[1]):
        step = model(tokens[:, place : place + 1], past_key_values=step.past_key_values, use_cache=True)
        found.append(step.logits)
    return torch.cat(found, 1)


@torch.no_grad()
def check_mutations(folder: Path, logits: Callable[..., torch.Tensor]) -> None:
    """Zero slopes, slopes of the wrong sign and, where there is a gate, gate and up exchanged are all far outside."""
    tokens = ids(length=LENGTH)
    expected = logits(folder, tokens)

    def error(change: Callable[[AlibiForCausalLM], object]) -> float:
        model = load_foreign(AlibiForCausalLM, folder, attn_implementation="eager").eval()
        change(model)
        return distance(model(tokens).logits, expected)

    def slopes(factor: float) -> Callable[[AlibiForCausalLM], None]:
        def change(model: AlibiForCausalLM) -> None:
            heads = model.config.num_attention_heads
            usual = model.config.alibi_slopes or [2.0 ** (-8 * (head + 1) / heads) for head in range(heads)]
            model.config.alibi_slopes = [factor * slope for slope in usual]

        return change

    assert error(lambda model: None) < FLOAT32
    assert error(slopes(0.0)) > 1e-3 and error(slopes(-1.0)) > 1e-3
    if load_foreign(AlibiForCausalLM, folder).config.mlp_type == "gated":
        assert error(exchange) > 1e-3


def exchange(model: AlibiForCausalLM) -> None:
    """Gate for up and up for gate, in every layer."""
    for layer in model.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj
