"""How much memory a verification needs, how much there is, and the error that says so before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from alibi_hf.checkpoints.shards import TensorInfo
from alibi_hf.errors import AlibiError
from alibi_hf.model.configuration_alibi import AlibiConfig

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")


class NotEnoughMemoryError(AlibiError):
    """The model is too big to be run in float64 here."""


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of a verification, by what they are for."""

    weights: int
    gradients: int
    activations: int
    results: int

    @property
    def total(self) -> int:
        """All of them: they coincide while the truth is computed."""
        return self.weights + self.gradients + self.activations + self.results


def estimate_memory(
    config: AlibiConfig, parameters: int, batches: Sequence[tuple[int, int]], training: tuple[int, int], kept: int
) -> Estimate:
    """Estimate the peak: one float64 model at a time, its gradients, and the truth that is kept for comparing.

    Args:
        config: sizes of the model.
        parameters: number of parameters.
        batches: (rows, length) of what is run without gradients; upstream's eager attention holds
            [rows, heads, length, length] a few times over.
        training: (rows, length) of what is run with gradients; attention is kept for every layer.
        kept: number of positions whose float64 logits are kept.
    """
    scores, hidden, logits = _per_token(config)
    forward = max(rows * (5 * scores * length**2 + (hidden + 3 * logits) * length) for rows, length in batches)
    rows, length = training
    backward = config.num_hidden_layers * rows * (3 * scores * length**2 + hidden * length) + 3 * logits * rows * length
    return Estimate(
        weights=(8 + 2) * parameters,  # and the tensor being read, in the checkpoint's dtype
        gradients=2 * 8 * parameters,  # the truth's are kept while a model computes its own
        activations=max(forward, backward),
        results=logits * kept,
    )


def estimate_layer_memory(
    config: AlibiConfig, layer: Sequence[TensorInfo], largest: int, batches: Sequence[tuple[int, int]], logits: int
) -> Estimate:
    """Estimate the peak of going layer by layer: one layer in float64, and the states between two layers.

    Args:
        config: sizes of the model.
        layer: the tensors of a layer.
        largest: bytes of the largest tensor of all; both sides' are there while they are compared.
        batches: (rows, length) of what is run.
        logits: number of logits that are compared.
    """
    scores, hidden, _ = _per_token(config)
    tokens = sum(rows * length for rows, length in batches)
    parameters = sum(info.bytes // info.dtype.itemsize for info in layer)
    return Estimate(
        weights=max(8 * parameters + max(info.bytes for info in layer), 2 * largest),
        gradients=0,
        activations=max(rows * (5 * scores * length**2 + hidden * length) for rows, length in batches),
        results=4 * 8 * max(config.hidden_size * tokens, logits),
    )


def _per_token(config: AlibiConfig) -> tuple[int, int, int]:
    """Return the float64 bytes of a query's scores for one key, of a layer's states, and of a position's logits."""
    states = 3 * int(config.intermediate_size or 0) + 8 * config.hidden_size
    return 8 * config.num_attention_heads, 8 * states, 8 * config.vocab_size


def available_memory(device: str = "cpu") -> int:
    """Return the free bytes of `device`; on the CPU what the kernel calls available, within the container's limit."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_meminfo(), _container()]
    known = [value for value in free if value is not None]
    return min(known) if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_device(device: str) -> None:
    """`AlibiError` if torch does not know `device`, this machine does not have it, or it computes no numbers (meta)."""
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise AlibiError(
            f"device={device!r} cannot be used: {reason}. Use cpu, or a device of this machine."
        ) from error


def require_memory(estimate: Estimate, available: int, device: str = "cpu") -> None:
    """Refuse to start what would not fit.

    Raises:
        NotEnoughMemoryError: with the need, what is available, and what to do.
    """
    if estimate.total <= available:
        return
    raise NotEnoughMemoryError(
        f"Verifying this model needs about {estimate.total / GIB:.1f} GiB on {device} (float64 weights "
        f"{estimate.weights / GIB:.1f}, gradients {estimate.gradients / GIB:.1f}, activations "
        f"{estimate.activations / GIB:.1f}, kept results {estimate.results / GIB:.1f}); {available / GIB:.1f} GiB are "
        f"available. Give shorter lengths, use a larger machine, or prove one layer at a time: --layerwise "
        f"(only=('bias', 'tensors', 'layers'))."
    )


def _meminfo() -> int | None:
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _container() -> int | None:
    """Return what a memory limit of the control group leaves (version 2), or None without one."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used -= int(stat.get("inactive_file", 0))  # file cache that the kernel gives back on demand
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used)
