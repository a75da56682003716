"""The chunked loss is the ordinary one, without its logits: values, gradients, precision, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.loss.loss_utils import ForCausalLMLoss

from alibi_hf.evaluation import perplexity
from alibi_hf.model import loss_alibi
from alibi_hf.model.loss_alibi import chunked_loss
from tests.model.cases import assert_close, build, documents
from tests.model.feeding import flattened
from tests.model.test_memory import LargestTensor
from tests.model.training import assert_gradients, gradients
from tests.references.decoder import decode

HEADS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "scaled": {"logit_scale": 0.5},
    "capped": {"final_logit_softcapping": 2.0, "tie_word_embeddings": False},
    "scaled and capped": {"logit_scale": 0.5, "final_logit_softcapping": 2.0},
}
COUNTS = {"mean": {}, "int": {"num_items_in_batch": 7}, "tensor": {"num_items_in_batch": torch.tensor(7)}}


@pytest.fixture(params=[1, 7, 1000], ids="{} rows a chunk".format)
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let chunks have a few rows, which divide nothing, or all."""
    monkeypatch.setattr(loss_alibi, "CHUNK_BYTES", 1)
    monkeypatch.setattr(loss_alibi, "CHUNK_ROWS", request.param)
    return request.param


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let several chunks be needed for a short text."""
    monkeypatch.setattr(loss_alibi, "CHUNK_BYTES", 1)
    monkeypatch.setattr(loss_alibi, "CHUNK_ROWS", 16)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return two rows of tokens, and labels of which a prompt and a piece in the middle do not count."""
    ids = torch.stack(documents(20, 20))
    labels = ids.clone()
    labels[0, :9], labels[1, 5:8] = -100, -100
    return ids, labels


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_those_of_full_logits(head: str, count: str, chunk_rows: int) -> None:
    model, (ids, labels) = build("six", **HEADS[head]).train(), batch()
    logits, targets = model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    divisor = 7 if COUNTS[count] else (targets != -100).sum()
    truth = F.cross_entropy(logits, targets, reduction="sum") / divisor
    outputs = model(ids, labels=labels, skip_logits=True, use_cache=False, **COUNTS[count])
    assert outputs.logits is None and outputs.loss.dtype == torch.float64
    torch.testing.assert_close(outputs.loss, truth, rtol=1e-12, atol=0)
    assert_gradients(gradients(model, outputs.loss), gradients(model, truth), 1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": torch.tensor([7])},
        {"num_items_in_batch": torch.tensor(3.5)},
        {"ignore_index": 5},
        {"shift_labels": torch.arange(24).view(2, 12) % 11},
        {"shift_labels": torch.arange(24).view(2, 12) % 11, "ignore_index": 5, "num_items_in_batch": 9},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_options_are_those_of_transformers(options: dict[str, Any], small_chunks: None) -> None:
    hidden, weight, _ = states(2, 12, 8, 11)
    labels = torch.arange(24).view(2, 12) % 11
    truth = ForCausalLMLoss(F.linear(hidden, weight), labels, vocab_size=11, **options)
    found = chunked_loss(hidden, weight, labels, **options, seq_idx=None)
    assert found.shape == truth.shape
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(truth, (hidden, weight))
    for gradient, other in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
        assert_close(gradient, other, 1e-5)


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 7}], ids=["mean", "sum"])
def test_a_batch_without_labels_is_what_transformers_makes_of_it(options: dict[str, Any]) -> None:
    hidden, weight, _ = states(1, 12, 8, 11)
    labels = torch.full((1, 12), -100)
    truth = ForCausalLMLoss(F.linear(hidden, weight), labels, vocab_size=11, **options)
    found = chunked_loss(hidden, weight, labels, **options)
    torch.testing.assert_close(found, truth, equal_nan=True)
    for loss in (truth, found):
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in grads(loss, hidden, weight))


def states(
    rows: int, tokens: int, size: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states, the weight of a head, and labels, always the same."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, tokens, size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, size, generator=generator).mul(2 / size**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows, tokens), generator=generator)


def grads(loss: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the gradients of a loss."""
    return torch.autograd.grad(loss, tensors, retain_graph=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mixed", [False, True], ids=["weights of 16 bits", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_near_to_float64_as_full_logits(
    dtype: torch.dtype, mixed: bool, device: str, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_alibi, "GPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(loss_alibi, "CAST_ROWS", 100)
    given = states(1, 300, 32, 512, torch.float32 if mixed else dtype)
    hidden, weight, labels = (tensor.detach().to(device) for tensor in given)
    hidden.requires_grad_(), weight.requires_grad_()
    double = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = chunked_loss(*double, labels, logit_scale=0.5, softcap=4.0)
    with torch.autocast(device, dtype, enabled=mixed):
        found = chunked_loss(hidden, weight, labels, logit_scale=0.5, softcap=4.0)
        logits = torch.tanh(F.linear(hidden, weight) * 0.5 / 4.0) * 4.0
        ordinary = ForCausalLMLoss(logits, labels, vocab_size=512)
    assert found.dtype == torch.float32
    assert abs(found.double() - truth) <= 1.1 * abs(ordinary.double() - truth)
    wanted = grads(truth, *double)
    pairs = zip(grads(found, hidden, weight), grads(ordinary, hidden, weight), wanted, strict=True)
    for ours, theirs, right in pairs:
        assert ours.dtype == theirs.dtype
        assert rms(ours, right) <= 1.1 * rms(theirs, right)
        assert rms(ours, right) <= 0.02 * right.square().mean().sqrt()


def rms(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the root mean square error."""
    return (found.double() - truth).square().mean().sqrt()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = states(1, 12, 8, 11)
    with torch.no_grad():
        found = chunked_loss(hidden * 100, weight * 100, labels)
    truth = F.cross_entropy((hidden * 100 @ (weight * 100).T)[0, :-1].double(), labels[0, 1:])
    assert truth > 1000
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)


def test_packed_documents_learn_what_separate_ones_do(small_chunks: None) -> None:
    """Three micro-batches or one row: the loss and the gradients of the reference, which knows the bias by itself."""
    model, texts = build("six").train(), documents(40, 9, 23)
    items = sum(len(text) - 1 for text in texts)
    state = dict(model.state_dict(keep_vars=True))
    logits = [decode(state, model.config.to_dict(), text).logits[:-1] for text in texts]
    targets = torch.cat([text[1:] for text in texts])
    truth = F.cross_entropy(torch.cat(logits), targets, reduction="sum") / items
    wanted = gradients(model, truth)

    def separate() -> torch.Tensor:
        return sum(model(text[None], labels=text[None], num_items_in_batch=items).loss for text in texts)

    def packed() -> torch.Tensor:
        flat, firsts = flattened(texts), [0, 40, 49]
        labels = flat["input_ids"].clone()
        labels[0, firsts] = -100
        return model(**flat, labels=labels, num_items_in_batch=items).loss

    for learn in (separate, packed):
        loss = learn()
        torch.testing.assert_close(loss, truth, rtol=1e-10, atol=0)
        assert_gradients(gradients(model, loss), wanted, 1e-9)


@pytest.mark.parametrize("skip", [True, False])
def test_nothing_of_tokens_times_vocabulary_is_held(skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_alibi, "CHUNK_BYTES", 1)
    model = build("two_heads", torch.float32, vocab_size=4096).train()
    ids = torch.randint(4096, (1, 1024))
    with LargestTensor() as seen:
        model(ids, labels=ids, skip_logits=skip, use_cache=False).loss.backward()
    assert (seen.largest < 1024 * 4096 // 4) == skip


def test_a_weight_of_16_bits_is_not_copied_whole(small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_alibi, "CAST_ROWS", 256)
    hidden, weight, labels = states(1, 40, 64, 4096, torch.bfloat16)
    with LargestTensor() as seen:
        chunked_loss(hidden, weight.detach(), labels).backward()
    assert seen.largest == weight.numel() // 2  # the weight itself, counted in float32


def test_perplexity_holds_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_alibi, "CHUNK_BYTES", 1)
    model, tokens = build("two_heads", torch.float32, vocab_size=4096), torch.randint(4096, (2048,))
    with LargestTensor() as seen:
        found = perplexity(model, tokens, 1024)
    assert seen.largest < 1024 * 4096 // 4
    with torch.no_grad():
        windows = tokens.view(2, 1024)
        assert found == pytest.approx(float(model(windows, labels=windows).loss.exp()), rel=1e-5)


@pytest.mark.parametrize(
    ("frozen", "products"), [((), 3), (("weight",), 2), (("hidden",), 2), (("hidden", "weight"), 1)], ids=str
)
def test_only_what_is_needed_is_computed(frozen: tuple[str, ...], products: int, small_chunks: None) -> None:
    """A frozen head gets no gradient, and a prompt of half the row costs nothing."""
    hidden, weight, labels = states(1, 100, 8, 32)
    hidden.requires_grad_("hidden" not in frozen)
    weight.requires_grad_("weight" not in frozen)
    labels[:, :51] = -100
    with FlopCounterMode(display=False) as counter:
        loss = chunked_loss(hidden, weight, labels)
        if len(frozen) < 2:
            loss.backward()
    assert counter.get_total_flops() == products * 2 * 49 * 8 * 32
    assert (hidden.grad is None) == ("hidden" in frozen)
    assert (weight.grad is None) == ("weight" in frozen)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        chunked_loss(hidden, weight, labels)
    assert counter.get_total_flops() == 2 * 49 * 8 * 32


def test_logits_are_skipped_in_a_training_step_of_trainer_alone() -> None:
    model, (ids, labels) = build("six"), batch()
    counted = {"num_items_in_batch": torch.tensor(7)}

    def logits(given: torch.Tensor | None, **options: Any) -> torch.Tensor | None:
        return model(ids, labels=given, **options).logits

    assert logits(labels, **counted) is not None
    model.train()
    assert logits(labels, **counted) is None
    assert logits(labels) is not None
    assert logits(None, **counted) is not None
    assert logits(labels, skip_logits=False, **counted) is not None
    with torch.no_grad():
        assert logits(labels, **counted) is not None
    assert model.eval()(ids, labels=labels, skip_logits=True, return_dict=False)[0].dim() == 0
    with pytest.raises(ValueError, match=r"skip_logits=True.*labels are None"):
        logits(None, skip_logits=True)


def test_some_of_the_tokens() -> None:
    model, (ids, labels) = build("six"), batch()
    kept = {"labels": labels[:, -6:], "logits_to_keep": 6}
    torch.testing.assert_close(
        model(ids, skip_logits=True, **kept).loss, model(ids, **kept).loss.double(), rtol=1e-6, atol=0
    )


def test_backward_runs_once() -> None:
    hidden, weight, labels = states(1, 12, 8, 11)
    loss = chunked_loss(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        loss.backward()


def test_there_is_no_second_derivative() -> None:
    """Where it is asked for, gradients made in forward would be taken for constants."""
    hidden, weight, labels = states(1, 12, 8, 11)
    with pytest.raises(RuntimeError, match="skip_logits=False for create_graph=True"):
        torch.autograd.grad(chunked_loss(hidden, weight, labels), hidden, create_graph=True)
