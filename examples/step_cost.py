"""Time and memory of one training step, forward and backward: what training at L and at 2 L costs.

On CPU the memory is counted by PyTorch's profiler, allocation by allocation, and the time is the processor's own, so
that both can be repeated on a machine that does other things too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def train_step(model: Any, batch: torch.Tensor) -> None:
    """Read `batch` `[rows, tokens]` in training mode and compute the gradients, which are then dropped."""
    model.train()
    device = model.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
        loss = model(input_ids=batch, labels=batch, use_cache=False, skip_logits=True).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def peak_bytes(call: Callable[[], None], device: str) -> int:
    """Return by how many bytes the memory of all tensors rises at most while `call` runs; it is called once before."""
    call()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(sizes, initial=0))


def time_steps(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Return the seconds of each call, the median over `rounds` in each of which all are called in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            taken = _seconds(step, device)
            if number:  # the first round warms up
                seconds[name].append(taken)
    return {name: median(values) for name, values in seconds.items()}


def _seconds(call: Callable[[], None], device: str) -> float:
    if device == "cpu":
        started = time.process_time()
        call()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started
