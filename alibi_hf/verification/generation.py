"""Decoding with a cache, token by token, and greedy generation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from alibi_hf.verification.logits import pad_left, run_row
from alibi_hf.verification.report import Check


def has_cache(model: nn.Module) -> bool:
    """True if `model` takes a cache: plain references mostly have none."""
    return "past_key_values" in inspect.signature(model.forward).parameters


def run_whole(model: nn.Module, ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Return what `run_decode` does, from whole rows: right where the length of a call changes nothing."""
    return run_row(model, ids)[:, prefill:]


@torch.no_grad()
def run_decode(model: nn.Module, ids: torch.Tensor, prefill: int) -> torch.Tensor:
    """Return the logits `[batch, steps, vocabulary]` of what follows `prefill`, fed one by one through the cache."""
    if not has_cache(model):
        return run_whole(model, ids, prefill)
    cache = model(input_ids=ids[:, :prefill], use_cache=True).past_key_values
    steps = []
    for index in range(prefill, ids.shape[1]):
        output = model(input_ids=ids[:, index : index + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    return torch.cat(steps, dim=1)


@dataclass(frozen=True)
class Greedy:
    """Greedily chosen tokens `[rows, steps]` and the logits they were chosen from `[rows, steps, vocabulary]`."""

    tokens: torch.Tensor
    logits: torch.Tensor


@torch.no_grad()
def run_greedy(model: Any, rows: list[torch.Tensor], steps: int, pad: int) -> Greedy:
    """Generate `steps` tokens for each row greedily, never stopping early; the rows are one left-padded batch."""
    if not hasattr(model, "generate"):
        return _greedy_by_hand(model, rows, steps)
    ids, mask = pad_left(rows, pad)
    model.generation_config = GenerationConfig(
        max_new_tokens=steps, do_sample=False, pad_token_id=pad, output_logits=True, return_dict_in_generate=True
    )
    output = model.generate(input_ids=ids, attention_mask=mask)
    return Greedy(output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1))


def _greedy_by_hand(model: nn.Module, rows: list[torch.Tensor], steps: int) -> Greedy:
    """The same for a reference that does not generate: with its cache, or the whole row again for every token."""
    chosen, logits = [], []
    for row in rows:
        start, cache, fed = row.shape[1], None, 0
        for _ in range(steps):
            cached = {"past_key_values": cache, "use_cache": True} if has_cache(model) else {}
            output = model(input_ids=row[:, fed:], **cached)
            if cached:
                cache, fed = output.past_key_values, row.shape[1]
            logits.append(output.logits[:, -1])
            row = torch.cat([row, logits[-1].argmax(-1, keepdim=True)], dim=1)
        chosen.append(row[:, start:])
    return Greedy(torch.cat(chosen), torch.stack(logits, dim=1).view(len(rows), steps, -1))


@dataclass(frozen=True)
class Agreement:
    """How many generated tokens differ, and whether every row first differs where upstream itself has a tie."""

    differ: int
    ties: int
    first: str

    @property
    def passed(self) -> bool:
        """True if nothing differs but after a tie."""
        return not self.first


def compare_greedy(ours: Greedy, upstream: Greedy, tie: float) -> Agreement:
    """Compare token for token.

    Where two tokens of upstream are nearer to each other than `tie` (twice the error that the gate allows), either is a
    right answer and what follows is another text: from there on a row is not compared.
    """
    if ours.tokens.shape != upstream.tokens.shape:
        shapes = tuple(ours.tokens.shape), tuple(upstream.tokens.shape)
        return Agreement(upstream.tokens.numel(), 0, f"ours has shape {shapes[0]}, upstream's {shapes[1]}")
    differ, ties, first = 0, 0, ""
    for row in range(len(upstream.tokens)):
        unequal = (ours.tokens[row] != upstream.tokens[row]).nonzero()
        if not len(unequal):
            continue
        step = int(unequal[0])
        a, b = int(upstream.tokens[row, step]), int(ours.tokens[row, step])
        margin = float(upstream.logits[row, step, a].double() - upstream.logits[row, step, b].double())
        if margin <= tie:
            ties += 1
            continue
        differ += len(unequal)
        first = first or f"row {row}, step {step}: upstream {a}, ours {b}, {margin:.1e} apart"
    return Agreement(differ, ties, first)


def check_greedy(ours: Greedy, upstream: Greedy, tie: float, length: int, suffix: str) -> Check:
    """Return the check that greedy generation agrees token for token; see `compare_greedy`."""
    agreement = compare_greedy(ours, upstream, tie)
    rows, steps = upstream.tokens.shape
    note = f"{rows} prompts in one batch, {steps} tokens each, against upstream's"
    if agreement.ties:
        note += f"; {agreement.ties} rows part at a tie of less than {tie:.1e}"
    if agreement.first:
        note += f"; {agreement.first}"
    differ, passed = float(agreement.differ), agreement.passed
    return Check("greedy tokens" + suffix, "float32", length, differ, None, 0.0, passed, metric="differ", note=note)
