"""Mixed precision as Trainer runs it: autocast rounds projections, never the bias."""

import pytest
import torch

from alibi_hf import AlibiConfig, AlibiForCausalLM
from alibi_hf.model.bias_alibi import Distances, alibi_slopes
from alibi_hf.model.dense_alibi import block_attention, ramp_attention, row_attention
from alibi_hf.model.flex_alibi import flex_alibi
from alibi_hf.model.tiles_alibi import Group, tiled_attention
from alibi_hf.model.window_alibi import head_windows

FORMS = {
    "row": (row_attention, ()),
    "ramp": (ramp_attention, (0.0,)),
    "block": (block_attention, (0.0,)),
    "tiles": (tiled_attention, ([Group(0, 4, 130), Group(4, 8, 600)],)),
    "flex": (flex_alibi, (0.0,)),
}


def rms_error(backend: str, **changes: object) -> float:
    """Root mean square error of the logits of a float32 model under bfloat16 autocast, against float64 eager."""
    torch.manual_seed(0)
    config = AlibiConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, initializer_range=0.2, **changes
    )
    model = AlibiForCausalLM(config).eval()
    tokens = torch.randint(64, (1, 600))
    with torch.no_grad():
        model.set_attn_implementation(backend)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(tokens).logits
        model.set_attn_implementation("eager")
        truth = model.double()(tokens).logits
    return float((mixed.double() - truth).square().mean().sqrt())


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "head"}, {"num_key_value_heads": 2}], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_autocast_is_as_exact_as_eager(backend, changes):
    assert rms_error(backend, **changes) <= 1.1 * rms_error("eager", **changes)


def test_training_step_under_autocast():
    config = AlibiConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=8, qk_norm="full")
    model, tokens = AlibiForCausalLM(config).train(), torch.randint(64, (2, 40))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def autocast_inputs() -> tuple[list[torch.Tensor], Distances]:
    """Return query, key and value in bfloat16, and their distances."""
    states = [torch.randn(1, 8, 600, 32, dtype=torch.bfloat16) for _ in range(3)]
    return states, Distances(torch.tensor(alibi_slopes(8)), torch.arange(600), 600)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_leaves_attention_alone(form):
    states, distances = autocast_inputs()
    attend, more = FORMS[form]
    plain = attend(*states, distances, 0.2, *more)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attend(*states, distances, 0.2, *more)
    assert torch.equal(plain, mixed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_windows_alone(dtype):
    """Scores of 16 bits are off by more than the bound allows for, and overflow at 65504."""
    (query, key, _), distances = autocast_inputs()
    plain = head_windows(200 * query, 200 * key, distances.slopes, 1e-4, 1e-3)
    with torch.autocast("cpu", dtype):
        mixed = head_windows(200 * query, 200 * key, distances.slopes, 1e-4, 1e-3)
    assert torch.equal(plain, mixed)
