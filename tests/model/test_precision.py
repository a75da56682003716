"""How near each backend is to float64 in 16 bits."""

import copy

import pytest
import torch

from tests.model.cases import build, documents
from tests.model.feeding import flattened, pad


def padded_inputs() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a left-padded batch and which of its tokens count."""
    ids, mask = pad(documents(150, 200, 90), "left")
    return {"input_ids": ids, "attention_mask": mask}, mask.bool()


def packed_inputs() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return three documents in one row, and that all tokens count."""
    flat = flattened(documents(150, 200, 90))
    return {name: flat[name] for name in ("input_ids", "position_ids")}, torch.ones(1, 440, dtype=torch.bool)


def plain_inputs() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a batch of two long documents."""
    return {"input_ids": documents(800)[0].view(2, 400)}, torch.ones(2, 400, dtype=torch.bool)


INPUTS = {"plain": plain_inputs, "padded": padded_inputs, "packed": packed_inputs}


@torch.no_grad()
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["six", "twelve_grouped", "sqrt"])
def test_sixteen_bits_are_as_near_to_float64_as_eager(case: str, dtype: torch.dtype, inputs: str) -> None:
    given, counts = INPUTS[inputs]()
    model = build(case, torch.float32).to(dtype)
    truth = copy.deepcopy(model).double()
    truth.set_attn_implementation("eager")
    reference = truth(**given).logits[counts]

    def rms(backend: str) -> float:
        model.set_attn_implementation(backend)
        return (model(**given).logits[counts].double() - reference).square().mean().sqrt().item()

    eager = rms("eager")
    assert 0 < eager < 0.1 * reference.square().mean().sqrt()
    assert rms("sdpa") <= 1.1 * eager
    assert rms("flex_attention") <= 1.1 * eager


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_decode_is_as_near_to_float64_as_eager(dtype: torch.dtype) -> None:
    text = documents(200)[0]
    model = build("six", torch.float32).to(dtype)
    reference = copy.deepcopy(model).double()(text[None]).logits[0, 100:]

    def rms(backend: str) -> float:
        model.set_attn_implementation(backend)
        cache = model(text[None, :100]).past_key_values
        steps = [model(text[None, i : i + 1], past_key_values=cache).logits[0, 0] for i in range(100, 200)]
        return (torch.stack(steps).double() - reference).square().mean().sqrt().item()

    eager = rms("eager")
    assert rms("sdpa") <= 1.1 * eager
    assert rms("flex_attention") <= 1.1 * eager
