"""Packed batches without padding: documents side by side in one row that do not see each other.

`trl.pack_dataset` fills bins of `length` tokens with documents ("best fit decreasing", a document longer than a bin in
pieces); `DataCollatorWithFlattening` lays the documents of a batch in one row `[1, tokens]` with position_ids that
restart at each. From these the model takes where documents start: attention is block-diagonal, distances restart.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening
from trl import pack_dataset


def pack(documents: list[list[int]], length: int) -> Dataset:
    """Return bins of at most `length` tokens, columns `input_ids` and `seq_lengths` (of the documents in the bin).

    A bin of documents of one token each is left out: it has nothing to predict, and its mean loss would be NaN.

    Raises:
        ValueError: where no bin has anything to predict.
    """
    if length < 2:
        raise ValueError(f"A length of {length} tokens leaves nothing to predict; give a length of at least 2.")
    bins = pack_dataset(Dataset.from_dict({"input_ids": documents}), length, strategy="bfd_split")
    bins = bins.filter(lambda lengths: max(lengths) > 1, input_columns="seq_lengths")
    if len(bins) == 0:
        raise ValueError("No document has two tokens, so that there is nothing to predict; give a longer text.")
    return bins


class PackedCollator:
    """Collates rows of [`pack`] to `input_ids`, `labels` and `position_ids`, each `[1, tokens]`.

    Trainer needs `remove_unused_columns=False`, or it drops `seq_lengths`.
    """

    def __init__(self) -> None:
        self.flatten = DataCollatorWithFlattening()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Split each row into its documents again and flatten them all."""
        documents = []
        for row in rows:
            bounds = np.cumsum([0, *row["seq_lengths"]])
            documents += [{"input_ids": row["input_ids"][start:end]} for start, end in pairwise(bounds)]
        return self.flatten(documents)
