"""Attention and its gradients in float64 with exact ALiBi, and how far a contender is from them.

The scores are formed for a few queries at a time, and for long inputs only for some queries: with the output's gradient
set to zero outside those, the gradients of queries, keys and values are exact for them, and cost little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alibi_hf.families._truth import true_slopes
from benchmarks.inputs import Problem

ALL_ROWS = 8192  # shorter inputs are compared in every row
SAMPLED_ROWS = 256
CHUNK_BYTES = 128 * 2**20  # of one matrix of scores in float64

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Truth:
    """What is right for the queries `rows`, int64 `[n]`, in order.

    Attributes:
        output: float64 `[1, heads, n, head_dim]`.
        grad: gradient of the output that `gradients` belong to, zero outside `rows`; dtype of the problem.
        gradients: of query (at `rows` alone), key and value, float64; None if they were not asked for.
    """

    rows: torch.Tensor
    output: torch.Tensor
    grad: torch.Tensor
    gradients: Tensors | None


def make_truth(problem: Problem, gradients: bool) -> Truth:
    """Compute the truth for all rows of a short problem, for `SAMPLED_ROWS` of a long one."""
    rows = compared_rows(problem.length).to(problem.query.device)
    query, key, value, grad = (t.double() for t in (problem.query, problem.key, problem.value, problem.grad))
    slopes = true_slopes(problem.heads, device=problem.query.device)[:, None, None]
    chunk = max(1, CHUNK_BYTES // (8 * problem.heads * problem.length))
    outputs, dqs, dk, dv = [], [], torch.zeros_like(key), torch.zeros_like(value)
    for part in rows.split(chunk):
        seen = int(part.max()) + 1
        distance = part[:, None] - torch.arange(seen, device=part.device)
        scores = query[:, :, part] @ key[:, :, :seen].transpose(2, 3) * problem.scaling - slopes * distance
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        outputs.append(weights @ value[:, :, :seen])
        if gradients:
            out_grad = grad[:, :, part]
            dv[:, :, :seen] += weights.transpose(2, 3) @ out_grad
            weights_grad = out_grad @ value[:, :, :seen].transpose(2, 3)
            inner = (weights * weights_grad).sum(-1, keepdim=True)
            scores_grad = weights * (weights_grad - inner) * problem.scaling
            dqs.append(scores_grad @ key[:, :, :seen])
            dk[:, :, :seen] += scores_grad.transpose(2, 3) @ query[:, :, part]
    kept = torch.zeros_like(problem.grad)
    kept[:, :, rows] = problem.grad[:, :, rows]
    return Truth(rows, torch.cat(outputs, 2), kept, (torch.cat(dqs, 2), dk, dv) if gradients else None)


def compared_rows(length: int) -> torch.Tensor:
    """Return the queries that are compared: all, or the first, the last and a seeded choice between them."""
    if length < ALL_ROWS:
        return torch.arange(length)
    between = torch.randperm(length - 2, generator=torch.Generator().manual_seed(0))[: SAMPLED_ROWS - 2] + 1
    return torch.cat([torch.tensor([0, length - 1]), between]).sort().values


def errors(truth: Truth, output: torch.Tensor, gradients: Sequence[torch.Tensor] | None) -> dict[str, dict[str, float]]:
    """Return the errors by name: "output", and "dq", "dk", "dv" where there are gradients.

    Args:
        output: `[1, heads, length, head_dim]`.
        gradients: of query, key and value for `truth.grad`, same shape.
    """
    found = {"output": relative_error(output[:, :, truth.rows], truth.output)}
    if gradients is not None and truth.gradients is not None:
        dq, dk, dv = gradients
        compared = zip(("dq", "dk", "dv"), (dq[:, :, truth.rows], dk, dv), truth.gradients, strict=True)
        found |= {name: relative_error(own, true) for name, own, true in compared}
    return found


def relative_error(values: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Return "max", the largest error over the largest true value, and "rms", the same of root mean squares."""
    error = values.double() - truth
    return {
        "max": float(error.abs().max() / truth.abs().max()),
        "rms": float(error.square().mean().sqrt() / truth.square().mean().sqrt()),
    }
