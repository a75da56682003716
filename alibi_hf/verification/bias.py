"""The bias, head by head, where it reaches attention: upstream's captured by a forward pre-hook, ours beside it.

Upstream adds slope times an absolute position, we minus slope times a distance. Both are right, softmax sees only
differences along the keys of one query; so each is taken relative to the query's own key before they are compared.
The bias depends on no weight: models of one layer, with upstream's own code, are enough at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from alibi_hf.checkpoints.reference import reference_name
from alibi_hf.checkpoints.source import Checkpoint, with_fields
from alibi_hf.families._reference import Reference
from alibi_hf.model.bias_alibi import Distances
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from alibi_hf.verification.report import BiasSample, Check
from alibi_hf.verification.subjects import Caught, depends_on_call, longer_fields

TOLERANCE = 1e-6
VOCABULARY = 8
WHERE = "all heads, two queries"
ROUNDED_LENGTH = 300  # positions past 256 are not bfloat16 numbers, so a bias rounded to it differs there for any slope
SAMPLED = 24  # distances of the sample that is drawn, at most
LAYER_FIELDS = ("n_layer", "n_layers", "num_hidden_layers")


@dataclass(frozen=True)
class Feed:
    """One input for capturing: ids and mask `[1 or 2, length]`; the rows of a mask are padded on the left."""

    ids: torch.Tensor
    mask: torch.Tensor | None


def make_feeds(length: int, padded: bool = True) -> list[Feed]:
    """Return one row without a mask and, with `padded`, two rows of which the second is padded by a quarter."""
    ids = torch.arange(length)[None] % VOCABULARY
    if not padded:
        return [Feed(ids, None)]
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, : length // 4] = 0
    return [Feed(ids, None), Feed(ids.expand(2, -1), mask)]


class BiasProbe:
    """Captures the bias of one checkpoint from models of one layer."""

    def __init__(self, checkpoint: Checkpoint, config: AlibiConfig, reference: Reference, length: int) -> None:
        """`config` is the output's; `length` the longest row that will be captured."""
        small = {name: 1 for name in LAYER_FIELDS if name in checkpoint.raw} | {"vocab_size": VOCABULARY}
        self.raw = {**checkpoint.raw, **small, **longer_fields(reference, length)}
        self.reference = reference
        self.stored = [(group, checkpoint.get(group.source)) for group in checkpoint.groups if group.fate == "config"]
        self.config = with_fields(config, {"num_hidden_layers": 1, "vocab_size": VOCABULARY, "pad_token_id": None})

    @torch.no_grad()
    def upstream(
        self, dtype: torch.dtype, feed: Feed, patches: AbstractContextManager[None] | None = None
    ) -> torch.Tensor:
        """Return upstream's bias as it arrives at its attention `[batch, heads, queries or 1, keys]`, in its dtype."""
        model = _without_weights(self.reference.build(self.raw, dtype))
        state = model.state_dict()
        for group, values in self.stored:  # the bias depends on these
            state[reference_name(group, set(state))].view(-1).copy_(values.view(-1))
        module = self.reference.attention_modules(model)[0]
        with patches or nullcontext():
            bias = _capture(model, module, self.reference.bias_argument, feed)
        rows, keys = feed.ids.shape
        if self.reference.bias_layout == "heads":
            return bias[None, :, :, -keys:].expand(rows, -1, -1, -1)
        return bias.view(rows, -1, 1, keys) if self.reference.bias_layout == "flat" else bias

    def feeds(self, length: int) -> list[Feed]:
        """Return the inputs to compare at; nothing is padded where the bias depends on the length of the call."""
        return make_feeds(length, padded=not depends_on_call(self.config))

    @property
    def where(self) -> str:
        """What is compared, in words."""
        return WHERE + (
            ", without a mask" if depends_on_call(self.config) else ", without a mask and with left padding"
        )

    @torch.no_grad()
    def ours(self, dtype: torch.dtype, feed: Feed, rounding: str) -> Distances:
        """Return the distances that our attention is given; it adds what their `block` returns."""
        config = with_fields(self.config, {"alibi_rounding": rounding})
        model = AlibiForCausalLM(config).to(dtype).eval()
        return _capture(model, model.model.layers[0].self_attn, "distances", feed)

    def rounds(self) -> bool:
        """True if the family's own truth is not exact ALiBi but a rounding of it (Falcon)."""
        feed = make_feeds(ROUNDED_LENGTH)[0]
        own = self.upstream(torch.float64, feed, self.reference.truth())
        return not torch.equal(own, self.upstream(torch.float64, feed, self.reference.exact_truth()))


def _without_weights(model: nn.Module) -> nn.Module:
    """Return `model` with zeros for what has no memory yet; what its class computes itself, such as slopes, stays."""
    return model._apply(lambda tensor: torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor)


def _capture(model: nn.Module, module: nn.Module, argument: str, feed: Feed) -> Any:
    """Run `model` until `module` is called, and return the keyword `argument` of that call."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Caught(kwargs[argument])

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=feed.ids, attention_mask=feed.mask, use_cache=False)
    except Caught as caught:
        return caught.args[0]
    finally:
        hook.remove()
    raise RuntimeError(f"{type(module).__name__} was never called, so no {argument} could be captured.")


def our_bias(distances: Distances, query: int) -> torch.Tensor:
    """Return the bias of one query's keys in our attention, float32 `[batch or 1, heads, keys]`."""
    return distances.block(query, query + 1, distances.num_keys)[0][:, :, 0]


def _visible(feed: Feed, query: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each row of the feed with the indices of the keys that its query sees, the query's own last."""
    for row in range(feed.ids.shape[0]):
        keys = torch.arange(query + 1)
        yield row, keys if feed.mask is None else keys[feed.mask[row, : query + 1].bool()]


def _row(bias: torch.Tensor, row: int) -> torch.Tensor:
    return bias[row if bias.shape[0] > 1 else 0]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor, feed: Feed, query: int, elementwise: bool) -> float:
    """Return the largest relative error over rows, heads and keys, after both were shifted to 0 at the query's own key.

    Args:
        ours, theirs: `[batch or 1, heads, keys]`.
        elementwise: relative to each bias; else to the head's largest, for a side that rounds absolute positions.
    """
    worst = 0.0
    for row, keys in _visible(feed, query):
        if len(keys) < 2:
            continue
        a, b = (_row(side, row)[:, keys].double() for side in (ours, theirs))
        a, b = (a - a[:, -1:])[:, :-1], (b - b[:, -1:])[:, :-1]
        scale = b.abs() if elementwise else b.abs().amax(-1, keepdim=True)
        error = float(((a - b).abs() / scale.clamp(min=torch.finfo(torch.float64).tiny)).max())
        worst = error if error != error else max(worst, error)
    return worst


def check_bias(probe: BiasProbe, lengths: list[int], rounding: str) -> list[Check]:
    """Return the bias checks: against the float64 truth, against upstream as it stands, and bit for bit.

    `rounding` is the `alibi_rounding` that reproduces upstream's own; "" where there is none to reproduce.
    """
    checks = []
    own = probe.rounds()
    for length in lengths:
        checks += [_exact_check(probe, length), _upstream_check(probe, length, gated=not own)]
    if rounding:
        checks += [_bits_check(probe, lengths[-1], rounding, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return checks


def sample_bias(probe: BiasProbe, length: int) -> BiasSample:
    """Return our bias, as the output's config rounds it, and upstream's, for the last of `length` tokens in float32."""
    feed, query = make_feeds(length)[0], length - 1
    ours = our_bias(probe.ours(torch.float32, feed, probe.config.alibi_rounding), query)[0]
    theirs = _at(probe.upstream(torch.float32, feed), query)[0]
    distances = sorted({round(query ** (step / (SAMPLED - 1))) for step in range(SAMPLED)})
    keys = query - torch.tensor(distances)
    sides = [(side[:, keys].double() - side[:, query, None].double()).tolist() for side in (ours, theirs)]
    short = [[[float(f"{value:.9g}") for value in head] for head in side] for side in sides]
    return BiasSample(length, distances, *short)


def _queries(length: int) -> tuple[int, ...]:
    return (length - 1, length // 2)


def _exact_check(probe: BiasProbe, length: int) -> Check:
    """Ours in exact mode against the closed form in float64, each bias by itself."""
    error = _worst(probe, length, torch.float64, probe.reference.exact_truth, elementwise=True)
    note = f"relative to each bias; {probe.where}"
    return Check("bias, against float64", "float32", length, error, None, TOLERANCE, error <= TOLERANCE, note=note)


def _upstream_check(probe: BiasProbe, length: int, gated: bool) -> Check:
    """Ours in exact mode against what upstream's own attention is given in float32."""
    error = _worst(probe, length, torch.float32, nullcontext, elementwise=False)
    note = f"relative to the largest bias of the head; {probe.where}"
    note += "" if gated else "; upstream rounds it to bfloat16: shown, not gated"
    limit = TOLERANCE if gated else None
    passed = error <= TOLERANCE if gated else True
    return Check("bias, against upstream's", "float32", length, error, None, limit, passed, note=note)


def _worst(
    probe: BiasProbe,
    length: int,
    dtype: torch.dtype,
    patches: Callable[[], AbstractContextManager[None]],
    elementwise: bool,
) -> float:
    """Return the largest relative error of our exact bias over feeds and queries."""
    errors = []
    for feed in probe.feeds(length):
        theirs, distances = probe.upstream(dtype, feed, patches()), probe.ours(torch.float32, feed, "exact")
        for query in _queries(length):
            ours = our_bias(distances, query)
            errors.append(relative_error(ours, _at(theirs, query), feed, query, elementwise))
    return max(errors, key=lambda error: (error != error, error))  # NaN first


def _bits_check(probe: BiasProbe, length: int, rounding: str, dtype: torch.dtype) -> Check:
    """Ours with upstream's rounding against what upstream's attention is given: every bit."""
    differ = 0
    for feed in probe.feeds(length):
        theirs, distances = probe.upstream(dtype, feed), probe.ours(dtype, feed, rounding)
        for query in _queries(length):
            ours = our_bias(distances, query)
            for row, keys in _visible(feed, query):
                a, b = _row(ours, row)[:, keys], _row(_at(theirs, query), row)[:, keys]
                differ += int((a != b.float()).sum())
    name, words = f'bias bits, alibi_rounding="{rounding}"', str(dtype).removeprefix("torch.")
    return Check(
        name, words, length, float(differ), None, 0.0, differ == 0, metric="differ", note=f"bit for bit; {probe.where}"
    )


def _at(bias: torch.Tensor, query: int) -> torch.Tensor:
    """Return the row of one query `[batch, heads, keys]`."""
    return bias[:, :, query if bias.shape[2] > 1 else 0]
