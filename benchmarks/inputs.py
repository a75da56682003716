"""What attention is measured on: seeded normal numbers, or what a trained checkpoint computes on real text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from alibi_hf import AlibiConfig, AlibiForCausalLM
from alibi_hf.model.layers_alibi import AlibiAttention
from alibi_hf.verification.subjects import quiet
from alibi_hf.verification.text import make_tokens

SEED = 0
CHECKPOINTS = tuple(
    Path(__file__).parents[1] / "examples" / "checkpoints" / name for name in ("sotu-bloom", "sotu-mpt")
)


@dataclass(frozen=True)
class Problem:
    """Queries, keys and values of one layer, `[1, heads, length, head_dim]`, and a gradient of the output to go back.

    Attributes:
        source: what they are, such as "normal" or "sotu-bloom layer 2".
        query, key, value, grad: contiguous, of one dtype, on one device.
        scaling: factor on the scores.
    """

    source: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad: torch.Tensor
    scaling: float

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.query.shape[2]

    @property
    def heads(self) -> int:
        """Number of heads; as many for keys and values."""
        return self.query.shape[1]

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.query.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all four."""
        return self.query.dtype

    @property
    def device(self) -> str:
        """Where they are."""
        return str(self.query.device)

    @property
    def config(self) -> AlibiConfig:
        """A configuration with these heads."""
        return AlibiConfig(
            hidden_size=self.heads * self.head_dim, num_attention_heads=self.heads, num_hidden_layers=1, vocab_size=8
        )

    def describe(self) -> dict[str, Any]:
        """Return what a result says about its input."""
        return {
            "inputs": self.source,
            "length": self.length,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def normal_problem(length: int, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> Problem:
    """Return independent standard normal numbers with a fixed seed."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (1, heads, length, head_dim)
    query, key, value, grad = (torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(4))
    return Problem("normal", query, key, value, grad, head_dim**-0.5)


def make_problem(inputs: str, length: int, heads: int, head_dim: int, dtype: str, device: str) -> Problem:
    """Return the problem that `Problem.describe` describes."""
    if inputs == "normal":
        return normal_problem(length, heads, head_dim, getattr(torch, dtype), device)
    found = trained_problems(length, getattr(torch, dtype), device)
    return next(problem for problem in found if problem.source == inputs)


def trained_problems(length: int, dtype: torch.dtype, device: str) -> Iterator[Problem]:
    """Yield one problem a shipped checkpoint: the layer that is hardest on a window, the one of the largest norms."""
    for folder in CHECKPOINTS:
        layers = trained_layers(folder, length)
        hardest = max(range(len(layers)), key=lambda index: float(score_bound(*layers[index]).max()))
        query, key, value = (states.to(dtype).to(device).contiguous() for states in layers[hardest])
        grad = torch.randn(query.shape, generator=torch.Generator().manual_seed(SEED)).to(dtype).to(device)
        yield Problem(f"{folder.name} layer {hardest}", query, key, value, grad, query.shape[-1] ** -0.5)


def trained_layers(folder: Path, length: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return query, key and value of each layer, float32 `[1, heads, length, head_dim]`, as the model computes them.

    The text is the one that ships with the package; it starts over where `length` is longer.
    """
    with quiet(), torch.no_grad():
        model = AlibiForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        recorded: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        project = AlibiAttention.project

        def record(module: AlibiAttention, hidden_states: torch.Tensor) -> Any:
            recorded.append(project(module, hidden_states))
            return recorded[-1]

        with patch.object(AlibiAttention, "project", record):
            model.model(make_tokens(folder, model.vocab_size).rows(1, length), use_cache=False)
    return recorded


def score_bound(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None = None) -> torch.Tensor:
    """Return R, the largest score that the norms allow: max|q| max|k| / sqrt(head_dim), float64 `[heads]`."""
    longest = (states.double().norm(dim=-1).amax(dim=(0, 2)) for states in (query, key))
    return next(longest) * next(longest) * query.shape[-1] ** -0.5
