"""Padded, packed or one document at a time, in one batch or several: the same loss, gradients and training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from tests.model.cases import build, documents
from tests.model.feeding import Texts, pad
from tests.model.training import assert_gradients, expected_gradients, gradients, loss_of
from tests.references.decoder import decode

Batch = dict[str, torch.Tensor]

TEXTS = documents(40, 23, 70, 30, 5, 61, 23, 44)
BOUND = 1e-5  # Transformers takes the loss in float32, whatever the model's dtype


def padded(texts: Texts) -> Batch:
    """Return the documents in one padded batch."""
    ids, mask = pad(texts, "right")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(texts: Texts) -> Batch:
    """Return the documents in one row, as Transformers' own collator packs them."""
    return DataCollatorWithFlattening()([{"input_ids": text.tolist()} for text in texts])


# How the documents are collated, and how many of them to a batch.
WAYS: dict[str, tuple[Callable[[Texts], Batch], int]] = {
    "separate": (padded, 1),
    "padded": (padded, 8),
    "packed": (packed, 8),
    "padded_in_twos": (padded, 2),
    "packed_in_twos": (packed, 2),
}


def accumulated(model: Any, way: str, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the sum of the losses of all batches, and the gradients that add up."""
    collate, size = WAYS[way]
    batches = [collate(TEXTS[start : start + size]) for start in range(0, len(TEXTS), size)]
    loss = sum(model(**batch, use_cache=False, **options).loss for batch in batches)
    return loss.item(), gradients(model, loss)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["six", "twelve_grouped"])
def test_batches_add_up(case: str, way: str, training: bool) -> None:
    tokens = torch.tensor(sum(len(text) - 1 for text in TEXTS))
    true_loss, truth = expected_gradients(case, TEXTS)
    loss, found = accumulated(build(case).train(training), way, num_items_in_batch=tokens)
    assert loss == pytest.approx(true_loss, rel=BOUND)
    assert_gradients(found, truth, BOUND)


@pytest.mark.parametrize("way", ["separate", "padded_in_twos", "packed_in_twos"])
def test_means_of_batches_do_not_add_up(way: str) -> None:
    """Without the number of tokens of all batches, documents in short batches weigh more: the check sees it."""
    loss, found = accumulated(build("six"), way)
    true_loss, truth = expected_gradients("six", TEXTS)
    batches = len(TEXTS) // WAYS[way][1]
    with pytest.raises(AssertionError, match="of the largest value"):
        assert_gradients({name: gradient / batches for name, gradient in found.items()}, truth, BOUND)
    assert loss / batches != pytest.approx(true_loss, rel=BOUND)


# Trainer

RATE, STEPS = 0.1, 2
TRAINED = ["separate", "padded", "packed_in_twos", "packed"]  # half of the documents a step


def trained(way: str, folder: Any) -> dict[str, torch.Tensor]:
    """Return how far Trainer moves each weight in `STEPS` steps of gradient descent."""
    model = build("six")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    collate, size = WAYS[way]
    size = min(size, len(TEXTS) // STEPS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=len(TEXTS) // STEPS // size,
        max_steps=STEPS,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    dataset = [{"input_ids": text} for text in TEXTS]
    Trainer(model, arguments, lambda rows: collate([row["input_ids"] for row in rows]), dataset).train()
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def descended() -> dict[str, torch.Tensor]:
    """Return how far the plain reference moves each weight in as many steps."""
    model = build("six")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fields, half = model.config.to_dict(), len(TEXTS) // STEPS
    for start in range(0, len(TEXTS), half):
        texts, state = TEXTS[start : start + half], dict(model.state_dict(keep_vars=True))
        found = gradients(model, loss_of([decode(state, fields, text).logits for text in texts], texts))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= RATE * found[name]
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def true_updates() -> dict[str, torch.Tensor]:
    return descended()


@pytest.mark.parametrize("way", TRAINED)
def test_trainer_moves_the_weights_as_the_reference_does(
    way: str, true_updates: dict[str, torch.Tensor], tmp_path: Any
) -> None:
    assert_gradients(trained(way, tmp_path), true_updates, 1e-4)
