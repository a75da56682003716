"""Float64 truth inside upstream's own classes.

Upstream computes slopes and softmax in float32 even in a float64 model, so that model is not the truth. These patches
keep float64 where upstream would drop to float32 and put the closed form of the slopes in.

ALiBi: Press, Smith and Lewis, arXiv:2108.12409, section 3 and their `get_slopes`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SOFTMAX = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)


class KeepFloat64(TorchFunctionMode):
    """While active, `softmax(x, dtype=float32)` and `x.float()` of a float64 tensor stay in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensor = args[0] if args else kwargs.get("input")
        if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
            if func is torch.Tensor.float:
                return tensor
            if func in _SOFTMAX and kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def true_slopes(heads: int, bias_max: float = 8.0, device: Any = None) -> Tensor:
    """The slopes of the paper in float64, [heads]; written apart from the model's own so that neither hides the other.

    The slopes of the power of two below `heads`, then every second one of the power of two above.
    """
    below = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-bias_max * (head + 1) / below) for head in range(below)]
    above = [2.0 ** (-bias_max * (head + 1) / (2 * below)) for head in range(0, 2 * below, 2)]
    return torch.tensor((first + above)[:heads], dtype=torch.float64, device=device)


def mask_bias(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """BLOOM's and Falcon's `build_alibi_tensor` in float64: mask [batch, keys] to bias [batch * heads, 1, keys]."""
    positions = ((mask.long().cumsum(-1) - 1) * mask.long()).double()
    bias = true_slopes(heads, device=mask.device)[:, None] * positions[:, None, :]
    return bias.reshape(mask.shape[0] * heads, 1, mask.shape[1]).to(dtype)


@contextmanager
def float64_truth(module: ModuleType, replacements: dict[str, Callable[..., Tensor]]) -> Iterator[None]:
    """`KeepFloat64`, with those of `replacements` that `module` defines in this version of Transformers patched in."""
    with ExitStack() as stack:
        for name, function in replacements.items():
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, function))
        stack.enter_context(KeepFloat64())
        yield


__all__ = ["KeepFloat64", "float64_truth", "mask_bias", "true_slopes"]
