"""Gradients of the language modelling loss over documents fed in any way, and the check of them against the reference.

Each document alone, through the plain decoder in float64, says what the gradients have to be.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.model.cases import SQRT_TOLERANCE, build
from tests.model.feeding import Feed, Texts
from tests.references.decoder import decode

Gradients = dict[str, torch.Tensor]

# Of the largest entry of each parameter's gradient.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4}
# Ways of feeding of which training makes use, without a cache.
TRAINING_FEEDS = (
    "no_cache",
    "left",
    "right",
    "interior",
    "packed_positions_no_cache",
    "packed_seq_idx",
    "packed_cu_seq_lens",
    "packed_and_padded",
    "mask_4d_bool",
)


def loss_of(logits: Sequence[torch.Tensor], texts: Texts) -> torch.Tensor:
    """Return the mean over all documents of what each token costs, given those before it, in the dtype of `logits`."""
    targets = torch.cat([text[1:] for text in texts]).to(logits[0].device)
    return F.cross_entropy(torch.cat([each[:-1] for each in logits]), targets)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> Gradients:
    """Return the gradient of every parameter, by `backward`, as reentrant checkpoints want it; none is left."""
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@functools.cache
def _expected(case: str, texts: tuple[tuple[int, ...], ...]) -> tuple[float, Gradients]:
    model = build(case, backend="eager")
    state, fields = dict(model.state_dict(keep_vars=True)), model.config.to_dict()
    documents = [torch.tensor(text) for text in texts]
    loss = loss_of([decode(state, fields, document).logits for document in documents], documents)
    return loss.item(), gradients(model, loss)


def expected_gradients(case: str, texts: Texts) -> tuple[float, Gradients]:
    """Return the reference's loss of a case and its gradients, float64."""
    return _expected(case, tuple(tuple(text.tolist()) for text in texts))


def relative_errors(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the largest error in each gradient over the largest entry of its `twin`."""
    assert found.keys() == truth.keys()
    return {
        name: ((found[name].double() - truth[name]).abs().max() / twin(truth, name).abs().max()).item()
        for name in truth
    }


def twin(truth: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the gradient against whose entries an error counts: its own, or for a key's bias that of the query's.

    Softmax does not see a constant, so that the gradient of a key's bias is zero.
    """
    return truth[name.replace("k_proj.bias", "q_proj.bias")]


def assert_gradients(found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor], bound: float) -> None:
    """Assert that no gradient is off by more than `bound` times its largest entry; one of the wrong dtype is none."""
    errors = relative_errors(found, truth)
    name = max(errors, key=errors.__getitem__)
    assert errors[name] <= bound, f"{name}: error {errors[name]:.2e} of the largest value, bound {bound:.0e}"
    assert all(error == error for error in errors.values())  # not a number is larger than nothing


def check_gradients(model: Any, feed: Feed, case: str, texts: Texts, bound: float | None = None) -> None:
    """Assert that the model, fed in one way, has the reference's loss and gradients."""
    bound = bound or BOUNDS[model.dtype]
    if model.config.alibi_distance == "sqrt":
        bound = max(bound, 10 * SQRT_TOLERANCE)
    true_loss, truth = expected_gradients(case, texts)
    loss = loss_of(feed(model, texts), texts)
    assert abs(loss.item() - true_loss) <= bound * true_loss
    assert_gradients({name: each.cpu() for name, each in gradients(model, loss).items()}, truth, bound)


def enable_checkpointing(model: Any, kind: str) -> None:
    """Train with activation checkpointing: "reentrant" or not, or of every other layer, which newer versions have."""
    model.train()  # there is no dropout: only checkpointing makes a difference
    start = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    model.enable_input_require_grads()
    if kind == "every_other_layer":
        if "every_n_layers" not in inspect.signature(start).parameters:
            pytest.skip("this version of Transformers checkpoints all layers or none")
        start(every_n_layers=2)
    else:
        start({"use_reentrant": kind == "reentrant"})
