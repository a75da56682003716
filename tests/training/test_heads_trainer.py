"""The heads learn under Trainer what only positions can tell, also past the training length; and their gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from alibi_hf import (
    AlibiConfig,
    AlibiForQuestionAnswering,
    AlibiForSequenceClassification,
    AlibiForTokenClassification,
)
from tests.model.cases import assert_close, build, documents
from tests.model.feeding import pad
from tests.references.decoder import decode

VOCAB, LENGTH = 12, 16
CASE, TEXTS = "six", documents(12, 20, 3, 7)


def previous_tokens(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every token is labelled by the token before it."""
    return {"labels": torch.cat([torch.tensor([-100]), ids[:-1]])}


def last_but_one(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A row is labelled by its last token but one."""
    return {"labels": ids[-2]}


def after_the_mark(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The answer is the token after the one token 1."""
    place = int(ids.sum()) % (len(ids) - 1)
    ids.masked_fill_(ids == 1, 2)[place] = 1
    return {"start_positions": torch.tensor(place + 1), "end_positions": torch.tensor(place + 1)}


TASKS: dict[str, tuple[Any, Callable, int]] = {  # head, labels, steps
    "sequence classification": (AlibiForSequenceClassification, last_but_one, 200),
    "token classification": (AlibiForTokenClassification, previous_tokens, 80),
    "question answering": (AlibiForQuestionAnswering, after_the_mark, 80),
}


def rows_of(labels_of: Callable, count: int, length: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return random token ids with what they are labelled by."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, VOCAB, (length,), generator=generator) for _ in range(count)]
    return [{**labels_of(ids), "input_ids": ids} for ids in rows]


def learn(task: str, folder: Path, **changes: Any) -> dict[int, float]:
    """Train one layer on a task; return the accuracy at the training length and at four times as much."""
    cls, labels_of, steps = TASKS[task]
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
    fields = {"vocab_size": VOCAB, "num_labels": VOCAB, "pad_token_id": 0, "alibi_slopes": [4.0, 2.0, 1.0, 0.5]}
    settings = {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "max_steps": steps, "use_cpu": True}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 32}
    trainer = Trainer(
        cls(AlibiConfig(**{**fields, **shape, **changes})),
        TrainingArguments(str(folder), **settings, **quiet),
        train_dataset=rows_of(labels_of, 3000, LENGTH, seed=0),
    )
    trainer.train()
    return {length: accuracy(trainer, rows_of(labels_of, 64, length, seed=1)) for length in (LENGTH, 4 * LENGTH)}


def accuracy(trainer: Trainer, rows: list[dict[str, torch.Tensor]]) -> float:
    """Return the share of right labels, or of right starts and ends."""
    output = trainer.predict(rows)
    several = isinstance(output.predictions, tuple)
    found = np.stack(output.predictions, 1).argmax(-1) if several else output.predictions.argmax(-1)
    truth = np.stack(output.label_ids, 1) if several else output.label_ids
    return float((found == truth)[truth != -100].mean())


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_heads_learn_positions_and_keep_them_at_four_times_the_length(task: str, tmp_path: Path) -> None:
    found = learn(task, tmp_path)
    assert min(found.values()) > 0.85, found


@pytest.mark.slow
def test_without_the_bias_one_layer_cannot(tmp_path: Path) -> None:
    """Without positions a layer sees the tokens before as a bag: the test above shows the bias, not the decoder."""
    found = learn("token classification", tmp_path, alibi=False, alibi_slopes=None)
    assert max(found.values()) < 0.6, found


def hidden_of(model: Any, text: torch.Tensor) -> torch.Tensor:
    """Return the reference's last hidden state of one document, a float64 function of the model's weights."""
    return decode(model.state_dict(keep_vars=True), model.config.to_dict(), text).hidden


def row_case(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of padded rows with a label each, and the truth from each document alone."""
    ids, mask = pad(TEXTS, "left")
    labels = torch.tensor([0, 2, 1, 1])
    scores = torch.stack([hidden_of(model, text)[-1] for text in TEXTS]) @ model.score.weight.T
    return model(ids, attention_mask=mask, labels=labels).loss, functional.cross_entropy(scores, labels)


def token_case(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of padded rows with a label a token, and the truth from each document alone."""
    ids, mask = pad(TEXTS, "left")
    labels = (ids % 3).masked_fill(mask == 0, -100)
    scores = torch.cat([hidden_of(model, text) for text in TEXTS]) @ model.score.weight.T + model.score.bias
    truth = functional.cross_entropy(scores, torch.cat([text % 3 for text in TEXTS]))
    return model(ids, attention_mask=mask, labels=labels).loss, truth


def answer_case(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of an answer in one document, and its truth; padding would take part in the choice of a span."""
    text, span = TEXTS[1], torch.tensor([[4], [9]])
    loss = model(text[None], start_positions=span[0], end_positions=span[1]).loss
    scores = hidden_of(model, text) @ model.qa_outputs.weight.T + model.qa_outputs.bias
    return loss, functional.cross_entropy(scores.T, span[:, 0])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])  # flex_attention has no gradients on a CPU
@pytest.mark.parametrize(
    ("cls", "case"),
    [
        (AlibiForSequenceClassification, row_case),
        (AlibiForTokenClassification, token_case),
        (AlibiForQuestionAnswering, answer_case),
    ],
    ids=["sequence classification", "token classification", "question answering"],
)
def test_gradients_are_those_of_the_reference(cls: Any, case: Callable, backend: str) -> None:
    model = build(CASE, cls=cls, backend=backend, num_labels=3)
    names, weights = zip(*model.named_parameters(), strict=True)
    loss, truth = case(model)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)  # the labels' loss is formed in float32
    found, true = torch.autograd.grad(loss, weights), torch.autograd.grad(truth, weights)
    largest = max(float(gradient.abs().max()) for gradient in true)
    for name, ours, theirs in zip(names, found, true, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-6 * largest, name


def test_labels_and_problem_are_saved(tmp_path: Path) -> None:
    names = {0: "before", 1: "after"}
    model = build(CASE, torch.float32, cls=AlibiForSequenceClassification, id2label=names, label2id={"before": 0})
    ids, mask = pad(TEXTS, "right")
    model(ids, attention_mask=mask, labels=torch.zeros(len(TEXTS), 2)).loss.backward()
    model.save_pretrained(tmp_path)
    again = AlibiForSequenceClassification.from_pretrained(tmp_path)
    assert (again.config.id2label, again.config.num_labels) == (names, 2)
    assert again.config.problem_type == "multi_label_classification"
    assert_close(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits, 1e-6)
