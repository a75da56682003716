"""`Layout`: what a source with other positions than ALiBi's must say; its modules are like those of a family.

They are no families: `from_pretrained` and `convert` never see them, because what comes out is another model.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from alibi_hf.families import Family
from alibi_hf.families._layout import has_tensor
from alibi_hf.families._reference import Reference
from alibi_hf.families._truth import KeepFloat64

DROPPED = "positions are replaced by ALiBi"


class KeepFloat64Norms(KeepFloat64):
    """And where `x.to(float32)` is asked for, as LlamaRMSNorm does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        to_float32 = func is torch.Tensor.to and any(argument is torch.float32 for argument in args[1:])
        if to_float32 and args[0].dtype == torch.float64:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


class Layout(Family, Protocol):
    """A `Family` whose `config` has ALiBi in the place of the source's own positions.

    `reference` gives Transformers' class with its positions removed, which is what the weights are checked in.
    """

    POSITIONS: str

    def notes(self, raw: dict[str, Any]) -> list[str]:
        """What became of the positions, one sentence each."""
        ...


def recognised(names: Sequence[str], raw: dict[str, Any], tensor_names: Sequence[str], *endings: str) -> bool:
    """Whether the model type is one of `names` and the tensors, if there are any, have names that end as they must."""
    return raw.get("model_type") in names and (not tensor_names or has_tensor(tensor_names, *endings))


def without_positions(
    class_name: str,
    build: Callable[[dict[str, Any], torch.dtype], nn.Module],
    attention_modules: Callable[[nn.Module], list[nn.Module]],
) -> Reference:
    """The `Reference` of a class of Transformers that knows no positions while `position_ids` are all zero.

    Its bias arrives as a 4-D `attention_mask`, which is added to the scores.
    """
    return Reference(
        class_name=class_name,
        attn_implementation="eager",
        build=build,
        truth=KeepFloat64Norms,
        exact_truth=KeepFloat64Norms,
        as_is_truth_note="norms and softmax are in float32 whatever the dtype",
        attention_modules=attention_modules,
        bias_argument="attention_mask",
        bias_layout="mask",
    )


__all__ = ["DROPPED", "Layout", "recognised", "without_positions"]
