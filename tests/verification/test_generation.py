"""Token-for-token comparison, and what counts as a tie."""

import torch

from alibi_hf.verification.generation import Greedy, compare_greedy


def greedy(*tokens: int, logits: torch.Tensor | None = None) -> Greedy:
    return Greedy(torch.tensor([tokens]), torch.zeros(1, len(tokens), 4) if logits is None else logits)


def margins(*values: float) -> torch.Tensor:
    """Logits where token 0 leads token 1 by the value of each step."""
    logits = torch.zeros(1, len(values), 4)
    logits[0, :, 0] = torch.tensor(values)
    return logits


def test_equal() -> None:
    assert compare_greedy(greedy(1, 2), greedy(1, 2), tie=0.0).passed


def test_a_different_token_fails_with_its_place() -> None:
    found = compare_greedy(greedy(0, 1, 3), greedy(0, 0, 0, logits=margins(1, 0.5, 1)), tie=0.01)
    assert not found.passed and found.differ == 2
    assert found.first == "row 0, step 1: upstream 0, ours 1, 5.0e-01 apart"


def test_after_a_tie_either_text_is_right() -> None:
    found = compare_greedy(greedy(0, 1, 3), greedy(0, 0, 0, logits=margins(1, 0.005, 1)), tie=0.01)
    assert found.passed and (found.ties, found.differ) == (1, 0)


def test_fewer_tokens_fail() -> None:
    assert not compare_greedy(greedy(1), greedy(1, 2), tie=1.0).passed
