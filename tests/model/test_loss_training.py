"""The chunked loss where models are trained: Trainer, TRL, DDP, FSDP2, and heads that something was put around."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening, EvalPrediction, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from alibi_hf.model.loss_alibi import can_chunk
from tests.distributed.processes import needs_gloo, run
from tests.model.cases import build, documents
from tests.model.test_loss import batch
from tests.model.training import assert_gradients, gradients

WORKER = Path(__file__).with_name("loss_worker.py")


def train(folder: Path, collate: Callable[..., Any], **options: Any) -> tuple[list[float], list[bool], Trainer]:
    """Train a tiny model for three steps; return the losses, whether each micro-batch gave logits, and the trainer."""
    model = build("six", torch.float32).train()
    given: list[bool] = []
    model.register_forward_hook(lambda module, arguments, outputs: given.append(outputs.logits is not None))
    data = [{"input_ids": text.tolist()} for text in documents(20, 9, 31, 14, 25, 6, 17, 28, 11, 22, 13, 30)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, collate, train_dataset=data, eval_dataset=data[:3], **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], given, trainer


def test_trainer_takes_the_same_steps_without_logits(tmp_path: Path) -> None:
    collator, shapes = DataCollatorWithFlattening(return_flash_attn_kwargs=True), []

    def measure(prediction: EvalPrediction) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {}

    found, given, trainer = train(tmp_path, collator, compute_metrics=measure)
    assert given == [False] * 6
    truth, given, _ = train(tmp_path, lambda features: {**collator(features), "skip_logits": False})
    assert given == [True] * 6
    assert len(found) == 3 and found[0] > found[2]
    assert found == pytest.approx(truth, rel=1e-4)
    trainer.evaluate()
    assert shapes == [((3, 31, 61), (3, 31))]  # logits of all tokens, padded to the longest


@pytest.mark.slow
@needs_gloo
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """DDP and FSDP2, one row of the batch a process: losses and gradients of the whole batch, without logits."""
    model, (ids, labels) = build("six", tie_word_embeddings=False).train(), batch()
    items = int((labels[:, 1:] != -100).sum())
    loss = model(ids, labels=labels, num_items_in_batch=items, skip_logits=False).loss
    torch.save({"ids": ids, "labels": labels, "items": items}, tmp_path / "given.pt")
    run(WORKER, "2", tmp_path)
    truth = gradients(model, loss)
    found = torch.load(tmp_path / "found.pt")
    for engine in ("DDP", "FSDP2", "FSDP2, head apart"):
        torch.testing.assert_close(found[engine]["loss"], loss.detach().double(), rtol=1e-6, atol=0)
        assert_gradients({name: found[engine]["gradients"][name] for name in truth}, truth, 1e-6)


class Halved(nn.Linear):
    """A head that does something of its own."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) / 2


def halve(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    """Halve the logits, as a forward hook."""
    return output / 2


def halve_input(module: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Halve the hidden states, as a hook before forward."""
    return (arguments[0] / 2,)


def replace_forward(model: Any) -> None:
    """Put a function in the place of forward, as accelerate does."""
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) / 2


def add_bias(model: Any) -> None:
    """Give the head a bias."""
    model.lm_head.bias = nn.Parameter(torch.linspace(-2, 2, 61, dtype=torch.float64))


def double_loss(model: Any) -> None:
    """Set a loss function."""
    model.loss_function = lambda *args, **kwargs: 2 * ForCausalLMLoss(*args, **kwargs)


CHANGES: dict[str, Callable[[Any], object]] = {
    "hook": lambda model: model.lm_head.register_forward_hook(halve),
    "hook before": lambda model: model.lm_head.register_forward_pre_hook(halve_input),
    "hook of gradients": lambda model: model.lm_head.register_full_backward_hook(
        lambda module, grad_input, grad_output: (grad_input[0] / 2,)
    ),
    "forward": replace_forward,
    "class": lambda model: setattr(model.lm_head, "__class__", Halved),
    "bias": add_bias,
    "loss function": double_loss,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_around_the_head_is_run(change: str) -> None:
    """Logits are skipped here too, but nothing else: the loss and gradients are those of the changed model."""
    plain, (ids, labels) = build("six"), batch()
    model = copy.deepcopy(plain)
    CHANGES[change](model)
    found, truth = (model(ids, labels=labels, skip_logits=skip) for skip in (True, False))
    assert found.logits is None and truth.logits is not None
    assert torch.equal(found.loss, truth.loss)
    ours, theirs = gradients(model, found.loss), gradients(model, truth.loss)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    name = "model.layers.0.mlp.up_proj.weight"
    without = gradients(plain, plain(ids, labels=labels).loss)
    assert not torch.allclose(ours[name], without[name], rtol=1e-3)  # the change does change something


def test_heads_that_are_sharded_or_elsewhere_are_called() -> None:
    model = build("six")
    hidden = torch.zeros(1, 2, 48, dtype=torch.float64)
    assert can_chunk(model.lm_head, hidden, model.loss_function)
    assert not can_chunk(model.lm_head, hidden.to("meta"), model.loss_function)
    model.lm_head = nn.Linear(48, 61, bias=False, dtype=torch.float64)
    assert not can_chunk(model.lm_head, hidden, model.loss_function)
    model.set_output_embeddings(model.lm_head)  # as resizing the vocabulary does
    assert can_chunk(model.lm_head, hidden, model.loss_function)


def test_lora_on_the_head_is_run() -> None:
    peft = pytest.importorskip("peft")
    model, (ids, labels) = build("six", torch.float32, tie_word_embeddings=False), batch()
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    found, truth = (wrapped(input_ids=ids, labels=labels, skip_logits=skip) for skip in (True, False))
    assert found.logits is None
    assert torch.equal(found.loss, truth.loss)
    found.loss.backward()
    assert all(parameter.grad is not None for name, parameter in wrapped.named_parameters() if "lora_" in name)


def test_a_compiled_model_computes_the_same() -> None:
    model, (ids, labels) = build("six"), batch()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(ids, labels=labels, skip_logits=True, use_cache=False)
    assert found.logits is None
    torch.testing.assert_close(found.loss, model(ids, labels=labels).loss, rtol=1e-6, atol=0)


def test_activation_checkpointing() -> None:
    model, (ids, labels) = build("six").train(), batch()
    options = {"labels": labels, "num_items_in_batch": 7}
    truth = gradients(model, model(ids, **options).loss)
    model.gradient_checkpointing_enable()
    assert_gradients(gradients(model, model(ids, **options).loss), truth, 1e-12)


@pytest.mark.slow
def test_trl_computes_the_same_loss() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    model, (ids, labels) = build("six", torch.float32, logit_scale=0.5, final_logit_softcapping=2.0).train(), batch()
    ours = model(ids, labels=labels, num_items_in_batch=7).loss
    utils.add_fused_lm_head(model)
    theirs = model(input_ids=ids, labels=labels, num_items_in_batch=7, fused_lm_head=True).loss
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)
    assert_gradients(gradients(model, theirs), gradients(model, ours), 1e-5)
