"""A short run of Trainer on packed documents, the same however many processes share its batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

import alibi_hf
from alibi_hf import AlibiForCausalLM
from tests.model.cases import documents

CODE = {path.name for path in Path(alibi_hf.__file__).parent.joinpath("model").glob("*_alibi.py")}
BATCH = 8  # documents a step, in two micro-batches
STEPS = 4  # a checkpoint after every second
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": 2,
    "logging_steps": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-3,  # Adam divides rounding by rounding where a gradient is nothing else
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def make_trainer(
    source: Path, output: Path, sharing: int | None = None, distributed: dict[str, int] | None = None, **settings: Any
) -> Trainer:
    """Return a Trainer for the model of `source`, its batches shared by `sharing` processes (default: all)."""
    sharing = sharing or int(os.environ.get("WORLD_SIZE", 1))
    size = BATCH // SETTINGS["gradient_accumulation_steps"] // sharing
    arguments = TrainingArguments(str(output), per_device_train_batch_size=size, **{**SETTINGS, **settings})
    model = AlibiForCausalLM.from_pretrained(source, dtype=torch.float32, distributed_config=distributed)
    data = [{"input_ids": text.tolist()} for text in documents(*range(8, 8 + BATCH * STEPS))]
    return Trainer(model, arguments, train_dataset=data, data_collator=DataCollatorWithFlattening())


def train(trainer: Trainer, resume: Path | None = None) -> list[tuple[int, float, float]]:
    """Train, and return step, loss and norm of the gradients of each step."""
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return [
        (entry["step"], float(entry["loss"]), float(entry["grad_norm"]))
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def assert_same_course(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> None:
    """Assert that steps, losses and norms of gradients are the same, to float32."""
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-5, atol=0)


def assert_same_weights(folder: Path, model: Any) -> None:
    """Assert that a folder, loaded by its own code, holds the weights of a model, to what Adam makes of rounding."""
    saved = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert {path.name for path in folder.glob("*.py")} == CODE
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved.get_parameter(name), parameter, rtol=1e-3, atol=1e-4)
