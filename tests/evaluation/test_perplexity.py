"""Perplexity against the definition, on our models and on others."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from alibi_hf import AlibiError
from alibi_hf.evaluation import check_lengths, perplexity, perplexity_by_length
from tests.model.cases import build, config_of, documents, expected

TEXT = documents(200)[0]


def by_hand(length: int) -> float:
    """Return the perplexity of the case "six" from the reference's logits, in float64."""
    losses = []
    for start in range(0, len(TEXT) - length + 1, length):
        window = TEXT[start : start + length]
        logits = expected("six", window).logits.double()[:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    return math.exp(torch.stack(losses).mean())


@pytest.mark.parametrize("length", [32, 90, 200])
def test_it_is_that_of_the_reference_past_the_training_length_too(length: int) -> None:
    found = perplexity(build("six"), TEXT, length, batch_tokens=100)  # 200 is 6 windows of 32 and a rest, 2 of 90
    assert found == pytest.approx(by_hand(length), rel=1e-5)  # Transformers' loss is float32


@pytest.mark.parametrize("changes", [{"alibi": False}, {"alibi_bias_max": 4}, {"alibi_distance": "sqrt"}])
def test_a_wrong_bias_shows(changes: dict) -> None:
    assert perplexity(build("six", **changes), TEXT, 90) != pytest.approx(by_hand(90), rel=1e-3)


def test_a_bias_of_the_wrong_sign_shows() -> None:
    model = build("six", backend="eager", attention_window=False)
    right = perplexity(model, TEXT, 90)
    model.config.alibi_slopes = [-(2 ** (-8 * head / 8)) for head in range(1, 7)]  # the config would refuse these
    assert abs(perplexity(model, TEXT, 90) / right - 1) > 1e-2


def test_even_odds_have_the_perplexity_of_the_vocabulary() -> None:
    model = build("six")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, TEXT, 50) == pytest.approx(config_of("six").vocab_size, rel=1e-5)


@pytest.mark.parametrize(("factor", "expected"), [(1e6, math.inf), (math.nan, math.nan)])
def test_a_model_that_has_diverged_is_measured_too(factor: float, expected: float) -> None:
    model = build("six")
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    assert perplexity(model, TEXT, 50) == pytest.approx(expected, nan_ok=True)


def test_any_model_of_transformers_is_read_within_its_positions() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=64, n_embd=16, n_layer=1, n_head=2)).train()
    found = perplexity_by_length(model, TEXT, [16, 64])
    assert model.training
    with torch.no_grad():
        truth = model.eval()(TEXT[:192].view(3, 64), labels=TEXT[:192].view(3, 64)).loss
    assert found == {16: pytest.approx(61, rel=0.1), 64: pytest.approx(truth.exp().item(), rel=1e-5)}


def test_dropout_is_off_while_it_reads() -> None:
    model = build("six", hidden_dropout=0.5).train()
    assert perplexity(model, TEXT, 90) == pytest.approx(by_hand(90), rel=1e-5)
    assert model.training


@pytest.mark.parametrize(
    "length, says", [(0, "0 tokens"), (1, "1 tokens"), (-5, "-5 tokens"), (201, "200 tokens.*201")]
)
def test_lengths_that_cannot_be_read_are_refused_before_anything_is(length: int, says: str) -> None:
    for refuse in (
        lambda: perplexity(None, TEXT, length),
        lambda: perplexity_by_length(None, TEXT, [100, length]),
        lambda: check_lengths(TEXT, [100, length]),
    ):
        with pytest.raises(AlibiError, match=says):
            refuse()
