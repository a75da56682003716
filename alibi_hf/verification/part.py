"""One part of a model at a time, upstream's or ours: embedding, one layer, or last norm and head.

* The model is built with one layer and filled from the files; a layer that is not wanted is not there.
* Of embedding and head only the rows that are asked for are read: the largest matrix is never in memory whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.checkpoints.plan import Group
from alibi_hf.checkpoints.reading import read_tensor
from alibi_hf.checkpoints.reference import reference_name
from alibi_hf.checkpoints.shards import TensorInfo, list_tensors
from alibi_hf.checkpoints.source import Checkpoint, with_fields
from alibi_hf.errors import TensorError
from alibi_hf.families._reference import Reference
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from alibi_hf.verification.bias import LAYER_FIELDS
from alibi_hf.verification.subjects import Caught, compared_groups, longer_fields

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_MODEL, _LAYERS = "model.", "model.layers."


@dataclass(frozen=True)
class Wanted:
    """Which part is filled: one layer by index, rows of the embedding, or rows of the head.

    What is not wanted of the two matrices becomes one row of zeros.
    """

    layer: int | None = None
    embedding: Sequence[int] | None = None
    head: range | None = None

    def rows(self, name: str, tied: bool) -> Sequence[int] | None:
        """Return the wanted rows of `EMBEDDING` or `HEAD`; a tied embedding serves as the head too."""
        return self.head if name == HEAD or (tied and self.head is not None) else self.embedding


@dataclass
class Part:
    """A language model with one layer or none; `layers` is its list of layers, `norm` the module that follows them."""

    model: nn.Module
    layers: nn.ModuleList
    norm: nn.Module

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the states `[batch, length, hidden]` that ids `[batch, length]` bring to the first layer."""
        hook = self.norm.register_forward_pre_hook(_stop_before)
        return self._run(ids, hook)

    @torch.no_grad()
    def layer(self, states: torch.Tensor) -> torch.Tensor:
        """Return what the layer makes of states `[batch, length, hidden]`, in the same shape."""
        layer = self.layers[0]
        before = layer.register_forward_pre_hook(lambda _, *inputs: _put(states, *inputs), with_kwargs=True)
        return self._run(_no_ids(states), before, layer.register_forward_hook(_stop_after))

    @torch.no_grad()
    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits `[batch, length, rows of the head]` of states that leave the last layer."""
        hook = self.norm.register_forward_pre_hook(lambda _, *inputs: _put(states, *inputs), with_kwargs=True)
        return self._run(_no_ids(states), hook)

    def _run(self, ids: torch.Tensor, *hooks: Any) -> torch.Tensor:
        try:
            return self.model(input_ids=ids, use_cache=False).logits
        except Caught as caught:
            return caught.args[0]
        finally:
            for hook in hooks:
                hook.remove()


def _stop_before(_: nn.Module, args: tuple[Any, ...]) -> None:
    raise Caught(args[0])


def _stop_after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    raise Caught(output[0] if isinstance(output, tuple) else output)


def _put(states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the arguments of a call with `states` in the place of the hidden states."""
    return ((states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": states})


def _no_ids(states: torch.Tensor) -> torch.Tensor:
    return torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)


@dataclass(frozen=True)
class UpstreamParts:
    """Parts of the reference, with the source's values rounded to `stored` first, as `load_upstream` does."""

    checkpoint: Checkpoint
    reference: Reference
    stored: torch.dtype
    length: int
    device: str

    def load(self, dtype: torch.dtype, wanted: Wanted) -> Part:
        """Return one part in `dtype`.

        Raises:
            TensorError: naming a tensor that the reference has no place for, or a parameter that nothing fills.
        """
        raw = {**self.checkpoint.raw, **longer_fields(self.reference, self.length), **_one_layer(self.checkpoint)}
        model = self.reference.build(raw, dtype)
        layers = _layer_list(model, self.reference.attention_modules(model)[0])
        names, norm = set(model.state_dict()), ""
        if wanted.layer is None:
            del layers[0]
        for group in compared_groups(self.checkpoint):
            name = reference_name(replace(group, layer=0), names)
            if group.targets[:1] == (NORM,):
                norm = name.rpartition(".")[0]
            if group.fate not in ("used", "config") or (group.rule.per_layer and group.layer != wanted.layer):
                continue
            if name not in names:
                raise TensorError(f"{group.source} has no place in {self.reference.class_name}.")
            _fill(model, name, self._values(group, name, wanted).to(device=self.device, dtype=dtype))
        return Part(_finish(model, self.device), layers, model.get_submodule(norm))

    def _values(self, group: Group, name: str, wanted: Wanted) -> torch.Tensor:
        checkpoint, target = self.checkpoint, group.targets[0] if group.targets else ""
        if target in (EMBEDDING, HEAD):
            width = checkpoint.tensors[group.source].shape[1]
            rows = wanted.rows(target, checkpoint.config.tie_word_embeddings)
            values = _read_rows(lambda first, count: checkpoint.get_rows(group.source, first, count), rows, width)
        else:
            values = checkpoint.get(group.source)
        if self.reference.prepare is not None:
            values = self.reference.prepare(name, group.rule.widened(values, self.stored))
        rounded = self.stored != checkpoint.dtype and target.startswith((_MODEL, HEAD))
        return values.to(self.stored) if rounded else values


@dataclass(frozen=True)
class OurParts:
    """Parts of the converted model in the folder `output`."""

    output: Path
    device: str

    def load(self, dtype: torch.dtype, wanted: Wanted, **fields: Any) -> Part:
        """Return one part in `dtype`, with config `fields` such as alibi_rounding set."""
        config = with_fields(read_own_config(self.output), {**fields, "num_hidden_layers": 1, "pad_token_id": None})
        with torch.device("meta"):
            model = AlibiForCausalLM(config).to(dtype).eval()
        if wanted.layer is None:
            del model.model.layers[0]
        names = set(model.state_dict())
        for info in list_tensors(self.output).values():
            name = info.name
            if name.startswith(_LAYERS):
                layer, _, rest = name.removeprefix(_LAYERS).partition(".")
                name = f"{_LAYERS}0.{rest}" if int(layer) == wanted.layer else ""
            if name in names:  # not another layer's, nor a classifier's
                values = _our_values(info, wanted, config.tie_word_embeddings)
                _fill(model, name, values.to(device=self.device, dtype=dtype))
        return Part(_finish(model, self.device), model.model.layers, model.model.norm)


def _our_values(info: TensorInfo, wanted: Wanted, tied: bool) -> torch.Tensor:
    if info.name not in (EMBEDDING, HEAD):
        return read_tensor(info)
    rows = wanted.rows(info.name, tied)
    return _read_rows(lambda first, count: read_tensor(info, first, count), rows, info.shape[1])


def _read_rows(read: Callable[[int, int], torch.Tensor], rows: Sequence[int] | None, width: int) -> torch.Tensor:
    """Return rows `[len(rows), width]` by `read(first, count)`; one row of zeros if none are wanted."""
    if rows is None:
        return torch.zeros(1, width)
    if isinstance(rows, range):
        return read(rows.start, len(rows))
    return torch.cat([read(row, 1) for row in rows])


def _one_layer(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the fields of upstream's config that make a model of one layer; where there are none, their default."""
    fields = (field.names for field in checkpoint.family.FIELDS if field.to == "num_hidden_layers")
    names = next(fields, LAYER_FIELDS)
    return {name: 1 for name in names if name in checkpoint.raw} or {names[0]: 1}


def _layer_list(model: nn.Module, attention: nn.Module) -> nn.ModuleList:
    """Return the list that holds the one layer of `model`, in which `attention` is."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(inner is attention for inner in module.modules()):
            return module
    raise RuntimeError(f"{type(model).__name__} has no list of layers with {type(attention).__name__} in it.")


def _fill(model: nn.Module, name: str, values: torch.Tensor) -> None:
    """Put values in the place of a parameter, whatever the shape of what was there, or of a buffer, in its shape."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        module.padding_idx = None  # it may lie outside the rows that are there
    is_buffer = leaf in module._buffers  # slopes, which files hold as [heads] or [heads, 1]
    setattr(module, leaf, values.view_as(module._buffers[leaf]) if is_buffer else nn.Parameter(values, False))


def _finish(model: nn.Module, device: str) -> nn.Module:
    """Tie what is tied and move what was not read from files; `TensorError` for a parameter without values."""
    cast(Any, model).tie_weights()
    if left := [name for name, value in model.named_parameters() if value.is_meta]:
        raise TensorError(f"{type(model).__name__} has parameters the checkpoint lacks: {', '.join(left[:5])}.")
    return model.to(device)
