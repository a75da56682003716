"""Loss and gradients, compared in upstream's layout: ours go through the inverse of the tensor rules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from alibi_hf.checkpoints.plan import Group
from alibi_hf.checkpoints.reference import reference_name
from alibi_hf.verification.measure import GATES, GRADIENT_GATE, Difference, compare_all, compare_values, judge
from alibi_hf.verification.report import Check


@dataclass(frozen=True)
class Training:
    """Loss [] and the gradient of each source tensor, by its name in the source; tied tensors appear once."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]

    @property
    def rms(self) -> float:
        """The root mean square over all gradients."""
        total = sum(gradient.numel() for gradient in self.gradients.values())
        return (sum(float(gradient.double().square().sum()) for gradient in self.gradients.values()) / total) ** 0.5


def train_upstream(model: nn.Module, ids: torch.Tensor, groups: list[Group]) -> Training:
    """Return loss and gradients of next-token prediction over `ids` [rows, length] in the reference."""
    loss, gradients = _backward(model, ids)
    names = set(gradients)
    used = (group for group in groups if group.fate == "used")
    return Training(loss, {group.source: gradients[reference_name(group, names)] for group in used})


def train_ours(model: nn.Module, ids: torch.Tensor, groups: list[Group]) -> Training:
    """Return the same of our model, each group of gradients turned back into the source's layout."""
    loss, gradients = _backward(model, ids)
    used = (group for group in groups if group.fate == "used")
    sources = {group.source: group.rule.inverse([gradients[name] for name in group.targets]) for group in used}
    return Training(loss, sources)


def _backward(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Dropout stays off: the models are in evaluation mode."""
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    gradients = {name: _gradient(weight) for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def _gradient(weight: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def compare_training(result: Training, truth: Training) -> tuple[Difference, Difference]:
    """Return the errors of the loss and of all gradients together."""
    return compare_values(result.loss, truth.loss), compare_all(result.gradients, truth.gradients)


def check_training(
    ours: tuple[Difference, Difference],
    upstream: tuple[Difference, Difference],
    truth: Training,
    length: int,
    suffix: str,
) -> list[Check]:
    """Gate the loss like float32 logits, the gradients by their root mean square.

    The largest error among millions of gradients is luck: between equally good runs it differs by a factor of 1.5 and
    more, the root mean squares by a few percent.
    """
    checks = []
    for name, gate, mine, theirs, unit in (
        ("loss", GATES[torch.float32], ours[0], upstream[0], float(truth.loss.abs())),
        ("gradients", GRADIENT_GATE, ours[1], upstream[1], truth.rms),
    ):
        found = judge(gate, mine, theirs, unit, kind="gradients")
        detail = {"ours": mine.to_dict(), "upstream": theirs.to_dict()}
        figures = (found.ours, found.upstream, found.limit, found.passed, found.metric)
        checks.append(Check(name + suffix, "float32", length, *figures, detail=detail, note=found.note))
    return checks
