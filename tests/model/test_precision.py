"""How near each backend is to float64 in 16 bits, and the gradients of those that have them."""

import copy

import pytest
import torch

from tests.model.cases import CASES, assert_close, build, documents
from tests.model.feeding import flattened, pad
from tests.references.decoder import decode


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


def loss_of(model: torch.nn.Module, given: dict[str, torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    """Return a loss that every counting logit takes part in."""
    logits = model(**given).logits[counts]
    return torch.nn.functional.cross_entropy(logits, given["input_ids"][counts])


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of every parameter."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("case", ["six", "twelve_grouped", "multi_query", "sqrt"])
def test_gradients(case: str, inputs: str) -> None:
    given, counts = INPUTS[inputs]()
    eager = build(case, torch.float64, "eager")
    truth = gradients(eager, loss_of(eager, given, counts))
    for backend in ("eager", "sdpa"):
        for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-4)):  # one tensor's own largest entry
            model = build(case, dtype, backend)
            found = gradients(model, loss_of(model, given, counts))
            for name, gradient in found.items():
                if name.endswith("k_proj.bias"):  # its gradient is zero: softmax does not see a constant
                    assert gradient.abs().max() < 1e-5
                else:
                    assert_close(gradient, truth[name], bound)


@pytest.mark.parametrize("case", [case for case in CASES if case != "scaled_by_length"])
def test_gradients_of_eager_against_the_reference(case: str) -> None:
    model, text = build(case, torch.float64, "eager"), documents(40)[0]
    state = dict(model.state_dict(keep_vars=True))
    truth = gradients(model, decode(state, model.config.to_dict(), text).logits.square().mean())
    found = gradients(model, model(text[None]).logits.square().mean())
    for name, gradient in found.items():
        if not name.endswith("k_proj.bias"):
            assert_close(gradient, truth[name], 1e-6 if case == "sqrt" else 1e-9)


def test_flex_attention_has_no_gradients_on_cpu() -> None:
    model = build("six", torch.float32, "flex_attention")
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(documents(20)[0][None]).logits.sum().backward()
