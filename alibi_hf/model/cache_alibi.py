"""A key/value cache that grows in place: a decode step writes one token and copies nothing else.

* Transformers' `DynamicCache` concatenates, and so copies all keys and values for every token, in every layer. Here
  they lie in buffers with room for more; where the room is used up, a buffer a quarter longer takes over.
* `keys` and `values` of a layer are views of the filled part of its buffers, so that every method of `DynamicLayer`
  works on them as it is. An update writes in place only behind the very views that the last one returned: after
  anything else (`crop`, `batch_select_indices`, a caller who sets `keys`) it starts new buffers. So no number that a
  view has shown is ever overwritten.
* While autograd records, or torch traces, it concatenates as `DynamicCache` does: a graph may need what it has read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .positions_alibi import is_tracing
from .window_alibi import KeyNorms

MIN_ROOM = 64  # tokens that a new buffer has room for, at least, beyond those it must hold
ROOM_SHARE = 4  # and at least its length over this: each token is copied this many times in the long run

Pair = tuple[torch.Tensor, torch.Tensor]


def capacity_for(tokens: int) -> int:
    """Return for how many tokens a new buffer that must hold `tokens` has room."""
    return tokens + max(MIN_ROOM, tokens // ROOM_SHARE)


class GrowingLayer(DynamicLayer):
    """The keys and values of one layer, `[batch, key/value heads, tokens, head_dim]`, in buffers with room to grow."""

    keys: Any  # a tensor, or None before the first update
    values: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: Pair | None = None  # [batch, key/value heads, capacity, head_dim]
        self._shown: Pair | None = None  # the views of the filled part that keys and values were set to
        self._norms: KeyNorms | None = None  # of the first keys of `_shown`
        self._version: int | None = None  # of the keys that `_norms` have seen: in-place edits count it up

    @classmethod
    def take_over(cls, layer: DynamicLayer) -> GrowingLayer:
        """Return a growing layer that holds what `layer` holds; the two share no buffer."""
        growing = cls()
        growing.__dict__.update(layer.__dict__)
        return growing

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Append the new states and return all keys and values.

        Args:
            key_states, value_states: `[batch, key/value heads, new tokens, head_dim]`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = (key_states, value_states)
        if not _may_write() or not all(map(_continues, new, (self.keys, self.values))):
            self._buffers = self._shown = self._norms = None
            return super().update(key_states, value_states, *args, **kwargs)
        self._forget_stale_norms()
        start = _length(self.keys)
        stop = start + key_states.shape[-2]
        kept, buffers = (self.keys, self.values), self._writable_buffers(stop)
        if buffers is None:
            buffers = _empty_like(new, key_states.shape[0], capacity_for(stop))
            if start:
                _write(buffers, kept, 0)
        _write(buffers, new, start)
        return self._show(buffers, stop)

    def key_norms(self) -> KeyNorms | None:
        """Return the norms of all keys, reading only those that are new; None where a graph may hold them."""
        self._forget_stale_norms()
        if not self._is_current():
            return None
        if self._norms is None:
            self._norms, self._version = KeyNorms(self.keys), _version(self.keys)
        self._norms.extend(self.keys)
        return self._norms

    def _forget_stale_norms(self) -> None:
        if not self._is_current() or _version(self.keys) != self._version:
            self._norms = None

    def _writable_buffers(self, tokens: int) -> Pair | None:
        """Return the buffers if nothing but the room behind the last views would be written to, and it suffices."""
        if self._buffers is None or not self._is_current() or self._buffers[0].shape[-2] < tokens:
            return None
        if self._buffers[0].is_inference() and not torch.is_inference_mode_enabled():
            return None  # torch forbids it
        return self._buffers

    def _is_current(self) -> bool:
        return self._shown is not None and self.keys is self._shown[0] and self.values is self._shown[1]

    def _show(self, buffers: Pair, tokens: int) -> Pair:
        self._buffers = buffers
        self._shown = buffers[0][..., :tokens, :], buffers[1][..., :tokens, :]
        self.keys, self.values = self._shown
        self._version = _version(self.keys)
        return self._shown

    def _release(self) -> None:
        """Let go of buffers that keys and values no longer lie in."""
        if not self._is_current():
            self._buffers = self._shown = self._norms = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the rows `beam_idx` `[beams]` of the batch, in buffers with room: beam search copies once a step."""
        tokens = self.get_seq_length()
        if tokens == 0 or not _may_write():
            super().reorder_cache(beam_idx)
            self._release()
            return
        kept = (self.keys, self.values)
        buffers = _empty_like(kept, beam_idx.shape[0], capacity_for(tokens))
        for states, buffer in zip(kept, buffers, strict=True):
            torch.index_select(states, 0, beam_idx.to(states.device), out=buffer[..., :tokens, :])
        self._norms = None
        self._show(buffers, tokens)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._release()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices` of the batch."""
        super().batch_select_indices(indices)
        self._release()

    def offload(self) -> None:
        """Move keys and values to the CPU, without the room behind them."""
        super().offload()
        self._release()

    def reset(self) -> None:
        """Forget everything; what was returned before keeps its numbers."""
        self.keys = self.values = None
        self.is_initialized = False
        self._release()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_buffers": None, "_shown": None, "_norms": None}  # copies must not share a buffer
        if self._buffers is not None:  # a view would be saved with all of its buffer
            state["keys"], state["values"] = self.keys.clone(), self.values.clone()
        return state


class GrowingCache(DynamicCache):
    """A `DynamicCache` whose full-attention layers grow in place; the arguments are those of `DynamicCache`."""

    layers: list[Any]
    layer_class_to_replicate: Any

    def __init__(
        self,
        ddp_cache_data: Iterable[tuple[torch.Tensor | None, ...]] | None = None,
        config: Any | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        super().__init__(ddp_cache_data, config, offloading, offload_only_non_sliding)
        self._replace_layers()

    @classmethod
    def take_over(cls, cache: DynamicCache) -> GrowingCache:
        """Return a growing cache that holds what `cache` holds."""
        growing = cls.__new__(cls)
        growing.__dict__.update(cache.__dict__)
        growing._replace_layers()
        return growing

    def _replace_layers(self) -> None:
        self.layers = [GrowingLayer.take_over(layer) if type(layer) is DynamicLayer else layer for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer


def make_cache(config: Any) -> Cache:
    """Return the cache that a call without one fills: growing, or Transformers' own while torch traces."""
    return DynamicCache(config=config) if is_tracing() else GrowingCache(config=config)


def grow(cache: Any) -> Any:
    """Return a `GrowingCache` in place of a plain `DynamicCache`; every other cache, and None, as it is.

    A cache that offloads its layers to the CPU copies all of them anyway, and stays.
    """
    return GrowingCache.take_over(cache) if type(cache) is DynamicCache and not cache.offloading else cache


def find_key_norms(cache: Any, layer_idx: int) -> Callable[[], KeyNorms | None] | None:
    """Return what gives the norms of the keys of a layer, or None where the cache keeps none."""
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    return layer.key_norms if isinstance(layer, GrowingLayer) else None


def _may_write() -> bool:
    """True where no graph can hold what is in a buffer: autograd does not record, torch does not trace."""
    return not torch.is_grad_enabled() and not is_tracing()


def _version(states: torch.Tensor) -> int | None:
    """Return how often torch has seen the tensor change; it does not count for tensors made in inference mode."""
    return None if states.is_inference() else states._version


def _length(states: torch.Tensor) -> int:
    return states.shape[-2] if states.dim() > 1 else 0  # a new layer holds an empty vector


def _continues(new: torch.Tensor, kept: torch.Tensor) -> bool:
    """True where only the number of tokens differs; otherwise concatenation decides: it promotes dtypes, or raises."""
    if new.dtype != kept.dtype or new.device != kept.device:
        return False
    return kept.dim() == 1 or (new.shape[:-2] == kept.shape[:-2] and new.shape[-1] == kept.shape[-1])


def _empty_like(states: Pair, rows: int, capacity: int) -> Pair:
    keys, values = (each.new_empty(rows, each.shape[1], capacity, each.shape[3]) for each in states)
    return keys, values


def _write(buffers: Pair, states: Pair, start: int) -> None:
    for buffer, new in zip(buffers, states, strict=True):
        # Through `.data`: to autograd, a graph that saved an earlier view has not been touched, and it has not.
        buffer.data[..., start : start + new.shape[-2], :] = new
