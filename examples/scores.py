"""What the fine-tuned heads are measured by, and baselines that do not read: one figure a task, each between 0 and 1.

* classification: accuracy; baseline: the commonest label of the training rows.
* tokens: F1 of whole entities; baseline: each word's commonest tag in the training rows.
* question-answering: exact matches; baseline: how often the first number of the context starts the answer.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tasks import NUMBER, Row

LONGEST_ANSWER = 32  # tokens
FIGURES = {"classification": "accuracy", "tokens": "f1", "question-answering": "exact_match"}


def choose(logits: Any, _labels: Any) -> torch.Tensor:
    """Return what a head says: the best label, `[batch]` or `[batch, tokens]`, or the best span, `[batch, 2]`.

    Args:
        logits: of labels, in the last dimension; or the pair of start and end logits, each `[batch, tokens]`.
    """
    if not isinstance(logits, tuple):
        return logits.argmax(-1)
    starts, ends = logits
    both = starts.float()[:, :, None] + ends.float()[:, None, :]
    allowed = torch.ones_like(both[0], dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    best = both.masked_fill(~allowed, -torch.inf).flatten(1).argmax(-1)
    return torch.stack([best // starts.shape[1], best % starts.shape[1]], -1)


def scorer(task: str, labels: list[str]) -> Callable[[Any], dict[str, float]]:
    """Return Trainer's `compute_metrics` for a task: of choices and truth, the task's figure."""

    def accuracy(outcome: Any) -> float:
        return float((outcome.predictions == outcome.label_ids).mean())

    def exact_match(outcome: Any) -> float:
        return float((outcome.predictions == np.stack(outcome.label_ids, -1)).all(-1).mean())

    def f1(outcome: Any) -> float:
        pairs = zip(outcome.predictions, outcome.label_ids, strict=True)
        kept = [(found[true != -100], true[true != -100]) for found, true in pairs]
        return entity_f1([([labels[i] for i in found], [labels[i] for i in true]) for found, true in kept])

    figure = {"classification": accuracy, "tokens": f1, "question-answering": exact_match}[task]
    return lambda outcome: {FIGURES[task]: figure(outcome)}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the kind, the first and the last word of each entity of a sequence of BIO tags."""
    found: list[tuple[str, int, int]] = []
    for index, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if mark == "I" and found and found[-1][0] == kind and found[-1][2] == index - 1:
            found[-1] = (kind, found[-1][1], index)
        elif mark in ("B", "I"):
            found.append((kind, index, index))
    return set(found)


def entity_f1(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float:
    """Return the F1 of whole entities over pairs of found and true tags; 0 where there is no entity at all."""
    right = total = 0
    for found, true in pairs:
        right += len(entities(found) & entities(true))
        total += len(entities(found)) + len(entities(true))
    return 2 * right / total if total else 0.0


def baseline(task: str, train: list[Row], held_out: list[Row]) -> float:
    """Return the figure of the task's baseline on the held-out rows."""
    if task == "classification":
        common = Counter(row["label"] for row in train).most_common(1)[0][0]
        return sum(row["label"] == common for row in held_out) / len(held_out)
    if task == "tokens":
        seen: dict[str, Counter] = defaultdict(Counter)
        for row in train:
            for word, tag in zip(row["tokens"], row["ner_tags"], strict=True):
                seen[word][str(tag)] += 1
        usual = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
        return entity_f1(
            [
                ([usual.get(word, "O") for word in row["tokens"]], [str(tag) for tag in row["ner_tags"]])
                for row in held_out
            ]
        )
    first = [re.search(NUMBER, row["context"]) for row in held_out]
    starts = [row["answers"]["answer_start"][0] for row in held_out]
    return sum(match is not None and match.start() == start for match, start in zip(first, starts, strict=True)) / len(
        held_out
    )
