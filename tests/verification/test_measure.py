"""The figures and the gates: right numbers, and nothing that hides a failure."""

import math

import pytest
import torch

from alibi_hf.verification.measure import GATES, GRADIENT_GATE, Difference, compare_all, compare_logits, judge

FLOAT32, BFLOAT16 = GATES[torch.float32], GATES[torch.bfloat16]


def test_figures_of_logits() -> None:
    truth = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    logits = truth.clone()
    logits[1, 1] = 4.0
    found = compare_logits(logits, truth)
    p, q = truth[1].softmax(-1), logits[1].softmax(-1)
    assert found.max == 4.0
    assert found.rms == pytest.approx(4.0 / 3.0)
    assert found.typical == 0.0
    assert found.argmax == pytest.approx(2 / 3)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum()) / 3)


def test_a_shift_of_all_logits_is_an_error_but_no_divergence() -> None:
    truth = torch.randn(5, 7, dtype=torch.float64)
    found = compare_logits(truth + 1, truth)
    assert found.max == pytest.approx(1.0)
    assert found.kl == pytest.approx(0.0, abs=1e-12)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        compare_logits(torch.zeros(2, 3), torch.zeros(3, 2))


def test_many_rows_are_taken_in_blocks() -> None:
    truth = torch.randn(300, 5, dtype=torch.float64)
    logits = truth.clone()
    logits[299, 4] += 2
    assert compare_logits(logits, truth).max == pytest.approx(2.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("gate", [FLOAT32, BFLOAT16])
def test_nan_and_inf_fail(gate, value: float) -> None:
    truth = torch.randn(4, 6, dtype=torch.float64)
    logits = truth.clone()
    logits[0, 0] = value
    for position in range(3):
        logits[3 - position] = truth[3 - position]  # the bad one first: later blocks must not cover it
    upstream = compare_logits(truth + 1e-3, truth)
    assert not judge(gate, compare_logits(logits, truth), upstream, 1.0).passed


def test_the_float32_gate() -> None:
    upstream = Difference(max=1e-5, rms=1e-6, typical=1e-6)
    assert judge(FLOAT32, Difference(1.4e-5, 1e-6, 1e-6), upstream, 1.0).passed
    assert judge(FLOAT32, Difference(1.9e-5, 1e-6, 1e-6), upstream, 20.0).passed  # 1e-6 of the largest logit
    assert not judge(FLOAT32, Difference(5e-5, 1e-6, 1e-6), upstream, 1.0).passed


def test_the_bfloat16_gate_is_the_root_mean_square() -> None:
    upstream = Difference(max=0.1, rms=0.010, typical=0.01)
    assert judge(BFLOAT16, Difference(0.3, 0.0109, 0.02), upstream, 1.0).passed
    assert not judge(BFLOAT16, Difference(0.1, 0.0112, 0.012), upstream, 1.0).passed


def test_the_median_decides_where_single_tokens_are_badly_conditioned() -> None:
    upstream = Difference(max=1e-5, rms=1e-6, typical=1e-6)
    lucky = judge(FLOAT32, Difference(3e-5, 2e-6, 1.05e-6), upstream, 1.0)
    assert lucky.passed and lucky.metric == "typical" and "upstream 1.0e-05" in lucky.note
    assert not judge(FLOAT32, Difference(3e-5, 2e-6, 1.2e-6), upstream, 1.0).passed


def test_gradients_are_one_vector() -> None:
    truth = {"a": torch.zeros(2, 2, dtype=torch.float64), "b": torch.zeros(12, dtype=torch.float64)}
    values = {"a": torch.full((2, 2), 2.0), "b": torch.zeros(12)}
    found = compare_all(values, truth)
    assert (found.max, found.rms) == (2.0, 1.0)
    assert not judge(GRADIENT_GATE, found, Difference(1e-3, 1e-3, 1e-3), 1.0, kind="gradients").passed
    with pytest.raises(ValueError, match="'b'"):
        compare_all({"a": values["a"]}, truth)


def test_a_nan_gradient_is_not_covered_by_a_later_tensor() -> None:
    truth = {"a": torch.zeros(2), "b": torch.zeros(2)}
    found = compare_all({"a": torch.tensor([math.nan, 0]), "b": torch.ones(2)}, truth)
    assert math.isnan(found.max) and math.isnan(found.rms)
