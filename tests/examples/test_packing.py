"""Packed rows: nothing is lost, nothing leaks, distances restart."""

import pytest
import torch
from transformers import DynamicCache

from packing import PackedCollator, pack
from tests.model.cases import assert_close, build, documents, expected

LENGTHS = (40, 5, 70, 12, 1, 33)
LENGTH = 40  # past the cases' training length of 32


def test_bins_hold_every_token_once_and_no_more_than_their_length() -> None:
    given = [text.tolist() for text in documents(*LENGTHS)]
    bins = pack(given, LENGTH)
    assert max(len(row["input_ids"]) for row in bins) <= LENGTH
    assert len(bins) == -(-sum(LENGTHS) // LENGTH)
    assert sorted(token for row in bins for token in row["input_ids"]) == sorted(
        token for text in given for token in text
    )
    assert sorted(n for row in bins for n in row["seq_lengths"]) == [1, 5, 12, 30, 33, 40, 40]


@pytest.mark.parametrize("case", ["six", "twelve_grouped", "scaled"])
def test_a_batch_reads_each_document_as_if_it_were_alone(case: str) -> None:
    bins = list(pack([text.tolist() for text in documents(*LENGTHS)], LENGTH))
    batch = PackedCollator()(bins)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == 7
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100))
    with torch.no_grad():
        logits = build(case)(**batch).logits[0]
    for start, end in zip(starts, [*starts[1:], len(logits)], strict=True):
        assert_close(logits[start:end], expected(case, batch["input_ids"][0, start:end]).logits, 1e-10)


def test_a_batch_does_not_go_with_a_cache() -> None:
    model = build("six")
    batch = PackedCollator()(list(pack([[1, 2, 3], [4, 5]], 8)))
    with pytest.raises(ValueError, match="several documents in one row, but a cache was passed"):
        model(**batch, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_length_without_anything_to_predict_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"length of {length} tokens"):
        pack([[1, 2, 3]], length)


def test_a_bin_without_anything_to_predict_is_left_out() -> None:
    bins = pack([[1] * 9, [2] * 8], 8)  # the last piece is one token, and no other bin has room for it
    assert sorted(n for row in bins for n in row["seq_lengths"]) == [8, 8]
    with pytest.raises(ValueError, match="nothing to predict"):
        pack([[1], []], 8)
