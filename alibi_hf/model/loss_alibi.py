"""The language modelling loss from hidden states: logits exist for one chunk of tokens at a time, never for all.

* For each chunk forward computes logits, loss, and at once the gradients that backward will need; backward only
  multiplies them by the gradient that comes in. Nothing of shape `[tokens, vocab]` is ever held.
* Rows whose label is ignored are left out before the first product: a prompt, or padding, costs nothing.
* Scale, soft cap, softmax and the sums over chunks are in float32 (float64 for a float64 model), whatever the dtype of
  the weights. On CUDA 16-bit factors are multiplied as they are and summed in float32; elsewhere, where 16-bit products
  are as a rule emulated, in float32 altogether.

The result is that of Transformers' `ForCausalLMLoss`. Gradients in forward: Liger Kernel's fused linear cross entropy,
Hsu et al., arXiv:2410.10989, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from .layers_alibi import is_plain_linear
from .positions_alibi import is_tracing

logger = logging.get_logger(__name__)

IGNORED = -100
CHUNK_BYTES = 64 * 2**20  # float32 logits of one chunk on CPU; a GPU needs larger ones to be busy
GPU_CHUNK_BYTES = 4 * CHUNK_BYTES
CHUNK_ROWS = 128  # at least: each chunk reads the whole weight
CAST_ROWS = 8192  # of a 16-bit weight that are held in float32 at a time


def chunked_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    logit_scale: float | None = None,
    softcap: float | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Return the cross entropy of the next token, as `ForCausalLMLoss` does, without its logits.

    It can be differentiated once, with respect to `hidden_states` and `weight`, and holds both gradients until then, in
    float32 at least.

    Args:
        hidden_states: `[batch, tokens, hidden]`.
        weight: of the head, `[vocab, hidden]`.
        labels: `[batch, tokens]`, shifted inside: the label of a token is read by the token before it.
        logit_scale: factor of the logits. softcap: logits become `softcap * tanh(logits / softcap)` after it.
        num_items_in_batch: what the sum is divided by; None: the number of labels that count.
        ignore_index: the label that does not count.
        shift_labels: `[batch, tokens]`, the label of each token itself; `labels` are not read then.

    Other keywords are those of the model's forward, and mean nothing here.

    Raises:
        ValueError: a label outside the vocabulary; labels that are truth values or fractions, such as a mask.
    """
    targets = F.pad(labels[..., 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"labels are of {targets.dtype}, but have to be token ids; is it a mask that was given?")
    targets = targets.flatten().to(hidden_states.device, torch.long)
    rows = (targets != ignore_index).nonzero()[:, 0]
    targets = targets[rows]
    _refuse_unknown(targets, weight.shape[0])
    total = _ChunkedCrossEntropy.apply(
        hidden_states.flatten(0, -2), weight, rows, targets, logit_scale, softcap, torch.is_grad_enabled()
    )
    if num_items_in_batch is None:
        return total / len(rows)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class AlibiHead(nn.Linear):
    """The language modelling head: logits, or with labels the loss alone, which [`chunked_loss`] computes."""

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """Return logits `[batch, tokens, vocab]` of hidden states, or the loss; `options` are [`chunked_loss`]'s."""
        return super().forward(input) if labels is None else chunked_loss(input, self.weight, labels, **options)


def can_chunk(head: Any, hidden_states: torch.Tensor, loss_function: Any) -> bool:
    """True where [`AlibiHead`] computes in chunks what head and loss function would: nothing was put around either.

    Hooks, wrappers (LoRA, quantised heads, tensor parallelism, offloading) and other loss functions want logits; a
    compiler fuses the ordinary path by itself. FSDP2 and ZeRO-3 gather the weight around the head's forward.
    """
    if loss_function is not ForCausalLMLoss or is_tracing() or not isinstance(head, AlibiHead):
        return False
    if getattr(head, "bias", None) is not None or type(hidden_states) is not torch.Tensor:
        return False
    if gathers_weight(head) and "forward" not in vars(head):  # tensor parallelism and accelerate replace it
        return True
    return is_plain_linear(head, AlibiHead) and hidden_states.device == head.weight.device


def gathers_weight(head: Any) -> bool:
    """True where an engine, and nobody else, has put hooks around the head's forward that gather its weight."""
    if hasattr(head.weight, "ds_id"):  # DeepSpeed ZeRO-3
        return True
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    sharded = isinstance(head, FSDPModule)
    return sharded and len(head._forward_pre_hooks) == len(head._forward_hooks) == 1


def check_labels(
    labels: torch.Tensor,
    shape: torch.Size,
    vocab_size: int,
    *,
    ignore_index: int = IGNORED,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> None:
    """Check the labels that a causal model's loss will read, before they reach a kernel; their values only on CPU.

    Raises:
        ValueError: labels of another shape than the tokens, `shape`; a label outside the vocabulary.
    """
    check_label_shape(labels if shift_labels is None else shift_labels, shape)
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    if targets.device.type != "cpu" or is_tracing():
        return
    counted = targets[targets != ignore_index]
    if counted.numel() == 0:
        logger.warning_once(
            f"No token of a batch {tuple(shape)} has a label other than {ignore_index} to predict: it teaches nothing, "
            "and its mean loss is nan. Was the answer cut off, or the whole text masked?"
        )
    _refuse_unknown(counted, vocab_size)


def check_label_shape(labels: torch.Tensor, shape: torch.Size) -> None:
    """Check that there is one label a token.

    Raises:
        ValueError: with both shapes.
    """
    if labels.shape == shape:
        return
    message = f"labels have shape {tuple(labels.shape)}, the tokens {tuple(shape)}; give one label a token."
    if labels.dim() == 2 and labels.shape[0] == shape[0] == 1 and labels.shape[1] > shape[1]:
        message += " DataCollatorWithFlattening yields a label for a document without tokens: leave empty ones out."
    raise ValueError(message)


def _refuse_unknown(labels: torch.Tensor, vocab_size: int) -> None:
    outside = labels[(labels < 0) | (labels >= vocab_size)]
    if outside.numel():
        raise ValueError(
            f"label {int(outside[0])} is outside the vocabulary of {vocab_size} tokens; labels are token ids, or "
            f"{IGNORED} where a token does not count. Was the embedding resized to the tokenizer?"
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross entropy of some rows of `[tokens, hidden]`; its gradients are made in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        rows: torch.Tensor,
        labels: torch.Tensor,
        scale: float | None,
        softcap: float | None,
        grad_enabled: bool,
    ) -> torch.Tensor:
        """Return the sum, in float32 or float64; `rows` are those that count, `labels` theirs, both `[counted]`."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        to_hidden, to_weight = (
            torch.zeros_like(tensor, dtype=exact) if grad_enabled and needed else None
            for tensor, needed in zip((hidden, weight), ctx.needs_input_grad, strict=False)
        )
        total = torch.zeros((), dtype=exact, device=hidden.device)
        narrow = _factor_dtype(hidden, exact)
        factor = weight.to(narrow) if hidden.is_cuda else weight
        size = _chunk_rows(weight.shape[0], hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for at, targets in zip(rows.split(size), labels.split(size), strict=True):
                states = hidden[at].to(narrow)
                logits = _logits(states, factor, exact)
                total += _cross_entropy_(logits, targets, scale, softcap).sum()
                if to_hidden is not None:
                    to_hidden[at] = _times_weight(logits.to(narrow), factor, exact)
                if to_weight is not None:
                    _add_product(to_weight, logits.to(narrow).t(), states)
        ctx.gradients = (to_hidden, to_weight)
        ctx.dtypes, ctx.empty = (hidden.dtype, weight.dtype), len(rows) == 0
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients times `grad_output`, and let go of them: a weight's are large."""
        if torch.is_grad_enabled():  # create_graph: they would count as constants
            raise RuntimeError("The chunked loss is differentiated once; pass skip_logits=False for create_graph=True.")
        if ctx.gradients is None:
            raise RuntimeError(
                "The chunked loss holds its gradients for one backward only; pass skip_logits=False to go back twice."
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = 0.0 if ctx.empty else grad_output  # the mean of nothing is nan, its gradient zero
        found = [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*found, None, None, None, None, None)


def _chunk_rows(vocab_size: int, device: torch.device) -> int:
    limit = CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    return max(CHUNK_ROWS, limit // (4 * vocab_size))


def _factor_dtype(hidden: torch.Tensor, exact: torch.dtype) -> torch.dtype:
    """Return the dtype in which factors are multiplied: on CUDA 16 bits under autocast or in a 16-bit model."""
    if not hidden.is_cuda or hidden.dtype == torch.float64:
        return exact
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype


def _cross_entropy_(
    logits: torch.Tensor, labels: torch.Tensor, scale: float | None, softcap: float | None
) -> torch.Tensor:
    """Return the loss of each row, `[rows]`; `logits` `[rows, vocab]` become the gradient of their sum, in place."""
    if scale is not None:
        logits.mul_(scale)
    steepness = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        steepness = 1 - logits.square()
        logits.mul_(softcap)
    right = torch.arange(len(labels), device=labels.device), labels
    logits.sub_(logits.amax(-1, keepdim=True))
    losses = -logits[right]
    sums = logits.exp_().sum(-1, keepdim=True)
    losses += sums[:, 0].log()
    logits.div_(sums)
    logits[right] -= 1
    if steepness is not None:
        logits.mul_(steepness)
    if scale is not None:
        logits.mul_(scale)
    return losses


def _pieces(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the rows of the weight in `dtype`: all at once where that copies nothing."""
    step = weight.shape[0] if weight.dtype == dtype else CAST_ROWS
    for start in range(0, weight.shape[0], step):
        piece = slice(start, start + step)
        yield piece, weight[piece].to(dtype)


def _logits(states: torch.Tensor, weight: torch.Tensor, exact: torch.dtype) -> torch.Tensor:
    """Return `states @ weight.T` in `exact`, `[rows, vocab]`."""
    if states.dtype != exact:
        return torch.mm(states, weight.t(), out_dtype=exact)
    logits = states.new_empty(states.shape[0], weight.shape[0])
    for piece, part in _pieces(weight, exact):
        torch.mm(states, part.t(), out=logits[:, piece])
    return logits


def _times_weight(gradient: torch.Tensor, weight: torch.Tensor, exact: torch.dtype) -> torch.Tensor:
    """Return `gradient @ weight` in `exact`, `[rows, hidden]`."""
    product = torch.zeros(gradient.shape[0], weight.shape[1], dtype=exact, device=gradient.device)
    for piece, part in _pieces(weight, gradient.dtype):
        _add_product(product, gradient[:, piece], part)
    return product


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left @ right` to `total`; the product is not rounded to 16 bits first."""
    options: dict[str, Any] = {} if left.dtype == total.dtype else {"out_dtype": total.dtype}
    torch.addmm(total, left, right, out=total, **options)
