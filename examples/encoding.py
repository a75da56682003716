"""From labelled rows (`tasks.py`) to what a head reads: token ids with a label, a label a token, or an answer's span.

A decoder reads from left to right, and that decides two things: the last piece of a word carries its tag, because only
there the whole word has been read; and the question comes before its context, which is then read with it in mind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from tasks import Row


def find_labels(rows: list[Row]) -> list[str]:
    """Return the labels or tags of the rows in alphabetical order; questions have none."""
    found = [label for row in rows for label in row.get("ner_tags", [row.get("label")])]
    return sorted({str(label) for label in found if label is not None})


def encode(task: str, rows: list[Row], tokenizer: Any, length: int, labels: list[str]) -> Dataset:
    """Return the rows as model inputs of at most `length` tokens, each with its labels.

    Raises:
        ValueError: naming the row, where a label is unknown, words and tags differ in number, or the answer is not in
            the context or not within the length.
    """
    encoders: dict[str, Callable[[Row, Any, int, dict[str, int]], Row]] = {
        "classification": encode_text,
        "tokens": encode_words,
        "question-answering": encode_answer,
    }
    numbers, encoded = {label: number for number, label in enumerate(labels)}, []
    for index, row in enumerate(rows):
        try:
            encoded.append(encoders[task](row, tokenizer, length, numbers))
        except ValueError as error:
            raise ValueError(f"Row {index}: {error}") from None
    return Dataset.from_list(encoded)


def number_of(label: Any, numbers: dict[str, int]) -> int:
    """Return the number of a label."""
    if str(label) not in numbers:
        raise ValueError(f"label {label!r} is in no training row; known are {', '.join(numbers)}.")
    return numbers[str(label)]


def encode_text(row: Row, tokenizer: Any, length: int, numbers: dict[str, int]) -> Row:
    """Return a text and the number of its label."""
    encoded = tokenizer(row["text"], truncation=True, max_length=length)
    return inputs_of(encoded) | {"labels": number_of(row["label"], numbers)}


def encode_words(row: Row, tokenizer: Any, length: int, numbers: dict[str, int]) -> Row:
    """Return the words, with single spaces between them, and the tag of each at its last piece; -100 elsewhere."""
    words, tags = row["tokens"], row["ner_tags"]
    if len(words) != len(tags):
        raise ValueError(f"{len(words)} words have {len(tags)} tags; give one a word.")
    encoded = tokenizer(" ".join(words), truncation=True, max_length=length, return_offsets_mapping=True)
    tag_at, end = {}, -1
    for word, tag in zip(words, tags, strict=True):
        end += 1 + len(word)
        tag_at[end] = number_of(tag, numbers)
    labels = [tag_at.get(end, -100) if start < end else -100 for start, end in encoded["offset_mapping"]]
    return inputs_of(encoded) | {"labels": labels}


def encode_answer(row: Row, tokenizer: Any, length: int, numbers: dict[str, int]) -> Row:
    """Return a question with its context, and the first and last token of the answer."""
    context, answer, start = row["context"], row["answers"]["text"][0], row["answers"]["answer_start"][0]
    end = start + len(answer)
    if not answer or context[start:end] != answer:
        raise ValueError(f"the answer is {answer!r}, but the context has {context[start:end]!r} at character {start}.")
    encoded = tokenizer(
        f"{row['question']}\n", context, truncation="only_second", max_length=length, return_offsets_mapping=True
    )
    places = zip(encoded.sequence_ids(), encoded["offset_mapping"], strict=True)
    span = [i for i, (part, (first, last)) in enumerate(places) if part == 1 and first < end and last > start]
    if not span or encoded["offset_mapping"][span[-1]][1] < end:
        raise ValueError(
            f"the answer {answer!r} ends at character {end} of the context, past what fits in {length} tokens; "
            "raise --length (ALiBi has no ceiling) or shorten the context."
        )
    return inputs_of(encoded) | {"start_positions": span[0], "end_positions": span[-1]}


def inputs_of(encoded: Any) -> Row:
    """Return what the decoder reads of a tokenizer's answer; it takes no `token_type_ids`."""
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@dataclass
class AnswerCollator:
    """Pads questions with their contexts; where the padding is on the left, the answer moves with its text.

    `DataCollatorWithPadding` would leave the positions where they were.
    """

    tokenizer: Any

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Return the batch: ids and mask `[batch, tokens]`, positions `[batch]`."""
        batch = self.tokenizer.pad([inputs_of(row) for row in rows], return_tensors="pt")
        left = self.tokenizer.padding_side == "left"
        width = batch["input_ids"].shape[1]
        shifts = [width - len(row["input_ids"]) if left else 0 for row in rows]
        for name in ("start_positions", "end_positions"):
            batch[name] = torch.tensor([row[name] + shift for row, shift in zip(rows, shifts, strict=True)])
        return dict(batch)
