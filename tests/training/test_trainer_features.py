"""What users of Trainer switch on, on tiny models: each feature does what it says, with the numbers of ALiBi."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from transformers import DataCollatorForTokenClassification, DataCollatorWithFlattening, Trainer, TrainingArguments

from alibi_hf import (
    AlibiForCausalLM,
    AlibiForQuestionAnswering,
    AlibiForSequenceClassification,
    AlibiForTokenClassification,
)
from tests.builders import tokenizer as write_tokenizer
from tests.model.cases import assert_close, build, config_of, documents, expected

CASE = "six"
TEXTS = documents(12, 20, 3, 7, 9, 15, 4, 11)
ROWS = [{"input_ids": text, "labels": text} for text in TEXTS]


@pytest.fixture
def pad(tmp_path: Path) -> Any:
    """A collator that pads ids, and labels with -100, on the right."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer"), padding_side="right")
    return DataCollatorForTokenClassification(tokenizer)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Return settings for a few quiet steps."""
    defaults = {"max_steps": 4, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    return TrainingArguments(str(folder), use_cpu=True, **{**defaults, "learning_rate": 1e-2, **settings})


def losses(trainer: Trainer) -> list[float]:
    """Return the loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "settings",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"auto_find_batch_size": True},
        {"bf16": True},
        {"optim": "adafactor"},
        {"gradient_checkpointing": True},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 1.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_options_train(settings: dict[str, Any], pad: Any, tmp_path: Path) -> None:
    settings = {"max_steps": 12, "per_device_train_batch_size": 4, **settings}
    trainer = Trainer(build(CASE, torch.float32), arguments(tmp_path, **settings), pad, ROWS)
    trainer.train()
    found = losses(trainer)
    assert sum(found[-3:]) < 0.9 * sum(found[:3]), found


def test_checkpointing_and_use_cache_change_no_loss(pad: Any, tmp_path: Path) -> None:
    found = []
    for settings in ({}, {"gradient_checkpointing": True}):
        trainer = Trainer(build(CASE, torch.float32, use_cache=True), arguments(tmp_path, **settings), pad, ROWS)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_label_smoothing_predicts_the_next_token(packed: bool, pad: Any, tmp_path: Path) -> None:
    factor, model = 0.2, build(CASE)
    collate = DataCollatorWithFlattening() if packed else pad
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=factor), collate, ROWS)
    rows = [{name: value.tolist() for name, value in row.items()} for row in ROWS]
    with torch.no_grad():
        found = trainer.compute_loss(model, dict(collate(rows)))
        logits = torch.cat([expected(CASE, text).logits[:-1] for text in TEXTS])
    labels = torch.cat([text[1:] for text in TEXTS])
    torch.testing.assert_close(found.double(), functional.cross_entropy(logits, labels, label_smoothing=factor))
    model.__class__ = type("FSDPAlibiForCausalLM", (FSDPModule, type(model)), {"__module__": FSDPModule.__module__})
    with torch.no_grad():  # FSDP2 makes a class of its own, and Trainer goes by the name
        assert trainer.compute_loss(model, dict(collate(rows))) == found


def test_the_best_model_comes_back(pad: Any, tmp_path: Path) -> None:
    model = build(CASE, torch.float32)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_strategy": "steps", "max_steps": 8}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    unlike = [{"input_ids": text.flip(0), "labels": text.flip(0)} for text in TEXTS]  # training makes it worse
    trainer = Trainer(model, arguments(tmp_path, **settings, **best), pad, ROWS, unlike)
    trainer.train()
    history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(history) == 4 and history[-1] > min(history), history
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(history), rel=1e-5)
    saved = AlibiForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert torch.equal(saved.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prediction_gives_the_logits_of_each_document(side: str, pad: Any, tmp_path: Path) -> None:
    pad.tokenizer.padding_side = side
    trainer = Trainer(build(CASE), arguments(tmp_path, per_device_eval_batch_size=3), pad)
    output = trainer.predict(ROWS)  # three batches of different widths
    for logits, labels, text in zip(output.predictions, output.label_ids, TEXTS, strict=True):
        assert_close(torch.tensor(logits[labels != -100]), expected(CASE, text).logits, 1e-10)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True, "return_flash_attn_kwargs": True, "return_position_ids": False},
    ],
    ids=["position_ids", "seq_idx", "cu_seq_lens", "without position_ids"],
)
def test_flattened_batches_are_as_the_documents_alone(keys: dict[str, bool], tmp_path: Path) -> None:
    collate = DataCollatorWithFlattening(**keys)
    settings = {"per_device_eval_batch_size": len(TEXTS), "prediction_loss_only": True}
    rows = [{"input_ids": text.tolist()} for text in TEXTS]
    trainer = Trainer(build(CASE), arguments(tmp_path, **settings), collate, rows, rows)
    logits = torch.cat([expected(CASE, text).logits[:-1] for text in TEXTS])
    truth = functional.cross_entropy(logits, torch.cat([text[1:] for text in TEXTS]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(truth), rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_vocabulary_is_trained(tied: bool, pad: Any, tmp_path: Path) -> None:
    model = build(CASE, torch.float32, tie_word_embeddings=tied)
    model.resize_token_embeddings(70)
    rows = [{"input_ids": text + 8, "labels": text + 8} for text in TEXTS]  # ids up to 68: eight of them are new
    before = model.model.embed_tokens.weight.detach().clone()
    trainer = Trainer(model, arguments(tmp_path, max_steps=12), pad, rows)
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    assert not torch.equal(model.model.embed_tokens.weight[61:], before[61:])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    trainer.save_model(str(tmp_path / "grown"))
    again = AlibiForCausalLM.from_pretrained(tmp_path / "grown")
    ids = TEXTS[1][None] + 8
    assert again.config.vocab_size == 70 and torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_frozen_embeddings_stay(pad: Any, tmp_path: Path) -> None:
    model = build(CASE, torch.float32, tie_word_embeddings=False)
    model.get_input_embeddings().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Trainer(model, arguments(tmp_path), pad, ROWS).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(before) - {"model.embed_tokens.weight"}


def test_model_init_starts_the_same_model_each_time(pad: Any, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        trainer = Trainer(
            None, arguments(tmp_path, seed=3), pad, ROWS, model_init=lambda: AlibiForCausalLM(config_of(CASE))
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]


def classified(problem: str) -> list[dict[str, Any]]:
    """Return one row a document for a sequence classification problem with three labels."""
    generator = torch.Generator().manual_seed(2)
    makers = {
        "single_label_classification": lambda: torch.randint(0, 3, (), generator=generator),
        "multi_label_classification": lambda: torch.randint(0, 2, (3,), generator=generator).float(),
        "regression": lambda: torch.randn(3, generator=generator),
    }
    return [{"input_ids": text, "labels": makers[problem]()} for text in TEXTS]


def token_rows(_problem: str) -> list[dict[str, Any]]:
    return [{"input_ids": text, "labels": (text % 3).masked_fill(text % 5 == 0, -100)} for text in TEXTS]


def question_rows(_problem: str) -> list[dict[str, Any]]:
    return [
        {"input_ids": text, "start_positions": torch.tensor(i % 3), "end_positions": torch.tensor(2)}
        for i, text in enumerate(TEXTS)
    ]


@pytest.mark.parametrize(
    ("cls", "rows_of", "problem"),
    [
        (AlibiForSequenceClassification, classified, "single_label_classification"),
        (AlibiForSequenceClassification, classified, "multi_label_classification"),
        (AlibiForSequenceClassification, classified, "regression"),
        (AlibiForTokenClassification, token_rows, "single_label_classification"),
        (AlibiForQuestionAnswering, question_rows, None),
    ],
    ids=["single label", "multi label", "regression", "tokens", "question answering"],
)
def test_accumulated_gradients_are_those_of_one_batch(cls: Any, rows_of: Any, problem: str, tmp_path: Path) -> None:
    rows, weights = rows_of(problem), []
    for size, steps in ((8, 1), (2, 4)):
        model = build(CASE, cls=cls, num_labels=3, problem_type=problem)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        plain = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": 1.0}
        settings |= plain | {"train_sampling_strategy": "sequential"}
        Trainer(model, arguments(tmp_path, **settings), collate_right, rows).train()
        weights.append(model.state_dict())
    start = build(CASE, cls=cls, num_labels=3, problem_type=problem).state_dict()
    one, accumulated = (torch.cat([(end[name] - start[name]).flatten() for name in start]) for end in weights)
    assert_close(accumulated, one, 1e-6)


def collate_right(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad ids and labels of tokens to 20: the scores of an answer are compared over the padding too."""
    width = max(len(text) for text in TEXTS)

    def column(name: str) -> torch.Tensor:
        values, fill = [row[name] for row in rows], 0 if name == "input_ids" else -100
        per_token = all(value.shape == row["input_ids"].shape for value, row in zip(values, rows, strict=True))
        return torch.stack(
            [functional.pad(value, (0, width - len(value)), value=fill) if per_token else value for value in values]
        )

    batch = {name: column(name) for name in rows[0]}
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}
