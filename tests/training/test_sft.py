"""TRL's trainers: packed conversations do not leak, the loss is on answers only, preferences are scored right."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("trl")
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tests import builders
from tests.model.cases import build
from tests.references.decoder import decode

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '?' }}{% endif %}{% endfor %}"
)
ANSWERS = ["four", "the very long answer that takes most of the row", "no", "maybe so", "a b c d e f"]
CHATS = [
    {"messages": [{"role": "user", "content": "q" * (3 + 4 * number)}, {"role": "assistant", "content": answer}]}
    for number, answer in enumerate(ANSWERS)
]
QUIET: dict[str, Any] = {
    "max_steps": 2,
    "learning_rate": 0.0,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "dataloader_pin_memory": False,
}


def make_tokenizer(folder: Path) -> Any:
    """One token a character, "~" ends an answer."""
    tokenizer = AutoTokenizer.from_pretrained(builders.tokenizer(folder))
    tokenizer.eos_token, tokenizer.chat_template = "~", TEMPLATE
    return tokenizer


def make_model(**changes: Any) -> Any:
    """Return a decoder with a row of the embedding for each token."""
    return build("six", torch.float32, vocab_size=builders.VOCAB, **changes)


def make_trainer(tmp_path: Path, model: Any = None, **settings: Any) -> SFTTrainer:
    """Return a trainer of the chats, packed in rows of at most 64 tokens."""
    args = SFTConfig(
        str(tmp_path / "out"), max_length=64, packing=True, assistant_only_loss=True, **{**QUIET, **settings}
    )
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    return SFTTrainer(model or make_model(), args, train_dataset=Dataset.from_list(CHATS), processing_class=tokenizer)


def reference_loss(model: Any, tokenizer: Any, number: int) -> tuple[torch.Tensor, int]:
    """Return the summed loss of the answer of one conversation read alone, in float64, and its number of tokens."""
    question, answer = (message["content"] for message in CHATS[number]["messages"])
    prompt = tokenizer(question + "?")["input_ids"]
    text = torch.tensor(prompt + tokenizer(answer + "~")["input_ids"])
    logits = decode(model.state_dict(), model.config.to_dict(), text).logits
    return F.cross_entropy(logits[len(prompt) - 1 : -1], text[len(prompt) :], reduction="sum"), len(text) - len(prompt)


def packed_loss(trainer: SFTTrainer) -> torch.Tensor:
    """Return the trainer's own loss of its first batch, which holds all conversations in one row."""
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    assert (batch["position_ids"] == 0).sum() == len(CHATS)
    return trainer.compute_loss(trainer.model.train(), batch).detach()


def test_the_loss_of_a_packed_row_is_that_of_its_conversations_read_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, per_device_train_batch_size=8)
    assert len(trainer.train_dataset) < len(CHATS)
    alone = [reference_loss(trainer.model, trainer.processing_class, number) for number in range(len(CHATS))]
    expected = sum(loss for loss, _ in alone) / sum(count for _, count in alone)
    assert abs(packed_loss(trainer) / expected - 1) < 1e-5
    without_bias = make_trainer(tmp_path, make_model(alibi=False), per_device_train_batch_size=8)
    assert abs(packed_loss(without_bias) / expected - 1) > 1e-3


def test_the_loss_is_taken_on_answers_and_their_end(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    learned = []
    for row in trainer.train_dataset:
        pieces = torch.tensor(row["labels"]).split(row["seq_lengths"])
        learned += [trainer.processing_class.decode(piece[piece != -100]).replace(" ", "") for piece in pieces]
    assert sorted(learned) == sorted(answer.replace(" ", "") + "~" for answer in ANSWERS)


def test_packing_in_sdpa_raises_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path)
    assert trainer.model.config._attn_implementation == "sdpa"
    trainer.train()
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [message for message in found if "flash" in message.lower() or "packing" in message.lower()]


def test_preferences_are_scored_by_the_tokens_of_each_completion(tmp_path: Path) -> None:
    """DPO pads the two completions to one length: what it logs must be what each says alone."""
    tokenizer, model = make_tokenizer(tmp_path / "tokenizer"), make_model()
    rows = [{"prompt": "which one?", "chosen": " the first one of all", "rejected": " no"}]
    args = DPOConfig(str(tmp_path / "out"), per_device_train_batch_size=1, **QUIET)
    data = Dataset.from_list(rows)
    trainer = DPOTrainer(model, make_model(), args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    first = trainer.state.log_history[0]
    assert abs(first["loss"] - 0.6931) < 1e-3  # model and reference are the same
    prompt = tokenizer(rows[0]["prompt"])["input_ids"]
    for name in ("chosen", "rejected"):
        text = torch.tensor(prompt + tokenizer(rows[0][name] + "~")["input_ids"])
        logits = decode(model.state_dict(), model.config.to_dict(), text).logits.log_softmax(-1)
        expected = logits[torch.arange(len(prompt) - 1, len(text) - 1), text[len(prompt) :]].sum().item()
        assert abs(first[f"logps/{name}"] / expected - 1) < 1e-4
