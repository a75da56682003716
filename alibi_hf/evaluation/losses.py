"""The loss of every token under any causal model of Transformers, without the logits of all of them.

The decoder runs once over the window, without a cache. The model's own forward then makes logits of its hidden states a
chunk of tokens at a time: the decoder inside is told to answer with the chunk. Whatever the class does between hidden
states and logits, such as a scale or a soft cap, is therefore done. That this is what the model computes is tried on a
few tokens first; where it is not, the logits of a whole window are made at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from alibi_hf.errors import AlibiError
from alibi_hf.model.loss_alibi import CHUNK_BYTES, CHUNK_ROWS, GPU_CHUNK_BYTES

TRIED = 24  # tokens that both ways are compared on
AGREE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class LossReader:
    """Reads windows of tokens with a model, which it leaves as it was.

    Args:
        model: a causal language model of Transformers, in evaluation mode.
        text: token ids `[tokens]`, two at least; some of them, from all over it, are what it is tried on.

    Raises:
        AlibiError: where a token can be seen by those before it: its loss would mean nothing.
    """

    def __init__(self, model: Any, text: torch.Tensor) -> None:
        self.model = model
        self.decoder: Any = None
        self.width = 0  # of the logits of a token, as tried: configs do not all name it alike
        self.notes: list[str] = []
        self._try(text[torch.linspace(0, len(text) - 1, min(TRIED, len(text))).long()])

    @torch.no_grad()
    def losses(self, ids: torch.Tensor, first: int) -> torch.Tensor:
        """Return the loss of the tokens from `first` on, in nats, float32 (float64 of a float64 model).

        Args:
            ids: `[windows, tokens]`.
            first: 1 or more, in tokens of the window.

        Returns:
            `[windows, tokens - first]`, on the device of the model.
        """
        ids = ids.to(self.model.device, torch.long)
        targets = ids[:, first:]
        if self.decoder is None:
            return _cross_entropy(self.model(input_ids=ids, use_cache=False).logits[:, first - 1 : -1], targets)
        decoded = self.decoder(input_ids=ids, use_cache=False)
        chunks = self._chunks(decoded.last_hidden_state[:, first - 1 : -1], targets)
        losses = [_cross_entropy(self._head(self.decoder, ids, decoded, part), at) for part, at in chunks]
        return torch.cat(losses, dim=1)

    def _chunks(self, states: torch.Tensor, targets: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        limit = GPU_CHUNK_BYTES if states.is_cuda else CHUNK_BYTES
        rows = max(CHUNK_ROWS, limit // (4 * self.width))
        size = max(1, rows // len(states))
        return zip(states.split(size, dim=1), targets.split(size, dim=1), strict=True)

    def _head(self, decoder: Any, ids: torch.Tensor, decoded: Any, states: torch.Tensor) -> torch.Tensor:
        """Return the logits `[windows, tokens, vocab]` of some hidden states, as the model's forward makes them."""
        with _answering(decoder, type(decoded)(**{**decoded, "last_hidden_state": states})):
            return self.model(input_ids=ids[:, : states.shape[1]], use_cache=False).logits

    @torch.no_grad()
    def _try(self, sample: torch.Tensor) -> None:
        ids = sample.to(self.model.device, torch.long)[None]
        try:
            whole = self.model(input_ids=ids, use_cache=False).logits
            changed = ids.clone()
            changed[0, -1] = ids[0, 0] if ids[0, 0] != ids[0, -1] else (ids[0, -1] + 1) % whole.shape[-1]
            other = self.model(input_ids=changed, use_cache=False).logits
        except Exception:  # the model's own failure, which reading it will show with its length
            return
        if not torch.isfinite(whole).all():  # which reading it will show, too
            return
        if not _agree(whole[:, :-1], other[:, :-1]):
            raise AlibiError(
                f"{type(self.model).__name__} is not causal: changing the last of {ids.shape[1]} tokens changes what "
                "it predicts before it, so that a token's loss would mean nothing. Give a causal language model."
            )
        self.width = whole.shape[-1]
        self.decoder = next(
            (inner for inner in find_decoders(self.model) if self._head_agrees(inner, ids, whole)), None
        )
        if self.decoder is None:
            self.notes.append(
                f"{type(self.model).__name__} does more between its decoder and its logits than a chunk of tokens "
                "tells; the logits of a whole window were held at once."
            )

    def _head_agrees(self, decoder: Any, ids: torch.Tensor, whole: torch.Tensor) -> bool:
        try:
            decoded = decoder(input_ids=ids, use_cache=False)
            parts = decoded.last_hidden_state.split(TRIED // 2, dim=1)
            return _agree(torch.cat([self._head(decoder, ids, decoded, part) for part in parts], dim=1), whole)
        except Exception:  # a decoder that answers in another way, or a forward that asks for more
            return False


def find_decoders(model: Any) -> list[torch.nn.Module]:
    """Return the parts of a model that may give the hidden states that its forward makes logits of."""
    found = [getattr(model, model.base_model_prefix or "", None), model.get_decoder()]  # the second in OPT
    return [inner for inner in found if isinstance(inner, torch.nn.Module) and inner is not model]


@contextmanager
def _answering(module: Any, answer: Any) -> Iterator[None]:
    """Let `module` answer every call with `answer`."""
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    bound = AGREE.get(expected.dtype, 5e-2)
    found, expected = found.double(), expected.double()
    scale = expected.abs().max()
    return bool(torch.allclose(found, expected, rtol=0, atol=bound * float(scale)))


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    exact = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(logits.flatten(0, 1).to(exact), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


__all__ = ["LossReader", "find_decoders"]
