"""FlashAttention 2 with its own `alibi_slopes`: no bias in memory, on CUDA, in float16 and bfloat16.

* plain: rows without padding, one document each, are read where they lie, those of a cache too.
* ragged: with padding or packed documents, the tokens that count are gathered into one line of sequences. Index
  distance is then token distance, wherever the padding was.
* decode after left padding: the kernel skips the padding in the cache, and nothing is gathered.

The kernel aligns causality at the last query and the last key, and subtracts slope times |i - j| from scaled and capped
scores; its soft cap is a tanh of 11 bits. With causality alone it adds slope times key index instead: the same after
softmax, but its float32 rounding grows with the length. A left window of all keys keeps it on relative distances, and
hides nothing.

Source of the interface: Dao-AILab/flash-attention, `flash_attn/flash_attn_interface.py`; of the order of operations:
`csrc/flash_attn/src/mask.h` and `flash_fwd_kernel.h` there.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import torch

from .bias_alibi import Distances

DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
OTHERS = "use 'eager', which computes everything, 'sdpa' or 'flex_attention'."

_package: Any = None


def flash_package() -> Any:
    """Return the module `flash_attn`.

    Raises:
        ValueError: where it cannot be imported, or is older than `cache_leftpad` (2.6).
    """
    global _package
    if _package is None:  # kept here: a compiled model cannot import
        _package = _import_package()
    return _package


def _import_package() -> Any:
    try:
        package = importlib.import_module("flash_attn")
        known = inspect.signature(package.flash_attn_with_kvcache).parameters
    except (ImportError, AttributeError) as error:  # flash-attn-4 alone leaves an empty flash_attn
        raise ValueError(
            f"flash_attention_2 needs the package flash_attn, 2.6 or newer, which cannot be imported here ({error}); "
            f"install flash-attn, or {OTHERS}"
        ) from error
    missing = {"alibi_slopes", "cache_leftpad"} - set(known)
    if missing:
        version = getattr(package, "__version__", "of an unknown version")
        raise ValueError(
            f"flash_attention_2 needs the package flash_attn, 2.6 or newer; {version} does not know "
            f"{', '.join(sorted(missing))}. Update flash-attn, or {OTHERS}"
        )
    return package


def check_flash(config: Any) -> None:
    """Refuse what a model with this `AlibiConfig` could not compute on this machine.

    Raises:
        ValueError: without the package or a CUDA device, or naming the field that the kernel has no form for.
    """
    flash_package()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"flash_attention_2 needs a CUDA device, and torch finds none; {OTHERS}")
    _refuse(
        sqrt=config.alibi_distance == "sqrt",
        rounded=config.alibi_rounding != "exact",
        head_dim=config.head_dim,
        scaling=config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
    )


def _refuse(
    sqrt: bool,
    rounded: bool,
    head_dim: int,
    scaling: float,
    custom_mask: bool = False,
    capped_dropout: bool = False,
) -> None:
    reasons = {
        "alibi_distance='sqrt'": sqrt,
        "upstream's alibi_rounding, only 'exact'": rounded,
        f"head_dim={head_dim}, at most {MAX_HEAD_DIM}": head_dim > MAX_HEAD_DIM,
        f"attention_scale={scaling}, only a positive one": scaling <= 0,  # the slopes are divided by it
        "custom 4-D masks, only padding masks and position_ids that mark documents": custom_mask,
        "attn_logit_softcapping together with attention_dropout": capped_dropout,
    }
    for reason, found in reasons.items():
        if found:
            raise ValueError(f"flash_attention_2 cannot compute {reason}; {OTHERS}")


def flash_alibi(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: Distances,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return attention output `[batch, heads, queries, dim]`; shapes as for `dense_alibi.eager_attention`.

    Queries that are masked themselves, and those that see no key, give zeros.

    Raises:
        ValueError: naming what the kernel has no form for: another device or dtype, custom 4-D masks, ...
    """
    _check_call(query, distances, scaling, dropout, softcap)
    states = tuple(each.transpose(1, 2) for each in (query, key, value))
    options = {
        "softmax_scale": scaling,
        "causal": True,
        "softcap": softcap or 0.0,
        "alibi_slopes": distances.slopes,
    }
    plain = distances.key_mask is None and distances.key_document is None
    attend = _plain if plain else _ragged
    return attend(states, distances, dropout, options).transpose(1, 2)


def _check_call(
    query: torch.Tensor, distances: Distances, scaling: float, dropout: float, softcap: float | None
) -> None:
    if query.device.type != DEVICE:
        raise ValueError(f"flash_attention_2 computes on {DEVICE}, the model is on {query.device}; {OTHERS}")
    if query.dtype not in DTYPES:
        raise ValueError(
            f"flash_attention_2 computes in {' and '.join(map(str, DTYPES))}, the queries are {query.dtype}; load the "
            f"model with dtype=torch.bfloat16, train under autocast, or {OTHERS}"
        )
    _refuse(
        sqrt=distances.sqrt,
        rounded=distances.row is not None or distances.rounded is not None,
        head_dim=query.shape[-1],
        scaling=scaling,
        custom_mask=distances.custom_mask is not None,
        capped_dropout=softcap is not None and dropout > 0,
    )


States = tuple[torch.Tensor, ...]  # query, key and value, `[batch, tokens, heads, dim]`


def _reads_only(states: States, dropout: float) -> bool:
    """True where `flash_attn_with_kvcache` may be called: it has neither gradients nor dropout."""
    wants_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in states)
    return dropout == 0.0 and not wants_gradient


def _window(keys: int) -> tuple[int, int]:
    return keys - 1, 0  # as many as `keys` would mean no window, and absolute positions


def _options_of_training(dropout: float) -> dict[str, Any]:
    return {"dropout_p": dropout, "deterministic": torch.are_deterministic_algorithms_enabled()}


def _plain(states: States, distances: Distances, dropout: float, options: dict[str, Any]) -> torch.Tensor:
    query, key, value = states
    offset, queries = distances.offset, query.shape[1]
    if isinstance(offset, torch.Tensor) or key.shape[1] > offset + queries:  # a static cache, with empty places
        if _reads_only(states, dropout):
            return _cached(states, distances, None, options)
        key, value = key[:, : int(offset) + queries], value[:, : int(offset) + queries]
    options = {**options, **_options_of_training(dropout), "window_size": _window(key.shape[1])}
    return flash_package().flash_attn_func(query, key, value, **options)


def _cached(
    states: States, distances: Distances, left_padding: torch.Tensor | None, options: dict[str, Any]
) -> torch.Tensor:
    """Attend to the filled places of a cache, but for the first `left_padding` `[batch]` of each row."""
    query, key, value = states
    filled = (distances.query_index[-1] + 1).to(torch.int32).repeat(query.shape[0])
    return flash_package().flash_attn_with_kvcache(
        query,
        key,
        value,
        cache_seqlens=filled,
        cache_leftpad=left_padding,
        window_size=_window(key.shape[1]),
        **options,
    )


@torch.compiler.disable  # how many tokens count is read from the data
def _ragged(states: States, distances: Distances, dropout: float, options: dict[str, Any]) -> torch.Tensor:
    query, key, value = states
    batch, queries = query.shape[:2]
    if queries == 1 and _reads_only(states, dropout):
        left_padding = distances.once("left_padding", lambda: find_left_padding(distances))
        if left_padding is not None:
            rows = torch.arange(batch, device=query.device)
            return _cached(states, distances, left_padding, {**options, "alibi_slopes": distances.slopes_at(rows, 0)})
    lines: Sequences = distances.once("sequences", lambda: find_sequences(distances, batch))
    if lines.max_queries == 0:
        return torch.zeros_like(query)
    options = {**options, "alibi_slopes": _sequence_slopes(distances, lines, batch * queries)}
    output = flash_package().flash_attn_varlen_func(
        _gather(query, lines.query_places),
        _gather(key, lines.key_places),
        _gather(value, lines.key_places),
        cu_seqlens_q=lines.query_bounds,
        cu_seqlens_k=lines.key_bounds,
        max_seqlen_q=lines.max_queries,
        max_seqlen_k=lines.max_keys,
        window_size=_window(lines.max_keys),
        **options,
        **_options_of_training(dropout),
    )
    if lines.query_places is not None:
        empty = output.new_zeros(batch * queries, *output.shape[1:])
        output = empty.index_copy(0, lines.query_places, output)
    return output.view(query.shape)


def _sequence_slopes(distances: Distances, lines: Sequences, tokens: int) -> torch.Tensor:
    """Return the slopes of all sequences, float32 `[heads]`, or `[sequences, heads]` where each has its own."""
    if distances.query_slopes is None:
        return distances.slopes
    counted = tokens if lines.query_places is None else lines.query_places.numel()
    first = lines.query_bounds[:-1].long().clamp(max=counted - 1)  # a sequence without queries takes any
    places = first if lines.query_places is None else lines.query_places[first]
    queries = distances.query_index.numel()
    return distances.slopes_at(places // queries, places % queries)


def _gather(states: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """Return the tokens at `places`, `[tokens, heads, dim]`, of `[batch, tokens, heads, dim]`."""
    line = states.flatten(0, 1)
    return line if places is None else line.index_select(0, places)


@dataclasses.dataclass
class Sequences:
    """Where the tokens that count lie, and how they divide into sequences of queries and of keys.

    Attributes:
        query_places, key_places: int64 `[tokens]`, indices into batch times tokens; None where all count.
        query_bounds, key_bounds: int32 `[sequences + 1]`, where each sequence starts, and the end of the last.
        max_queries, max_keys: tokens of the longest sequence.
    """

    query_places: torch.Tensor | None
    key_places: torch.Tensor | None
    query_bounds: torch.Tensor
    key_bounds: torch.Tensor
    max_queries: int
    max_keys: int


def find_left_padding(distances: Distances) -> torch.Tensor | None:
    """Return how many first keys of each row are masked, int32 `[batch]`; None if others before the query are too."""
    if distances.key_mask is None or distances.key_document is not None:
        return None
    counting = _counting_keys(distances, distances.key_mask.shape[0])
    last = distances.query_index[-1]
    padding = last + 1 - counting.sum(-1)
    index = torch.arange(distances.num_keys, device=counting.device)
    behind = (index >= padding[:, None]) & (index <= last)
    return padding.to(torch.int32) if torch.equal(counting, behind) else None


def find_sequences(distances: Distances, batch: int) -> Sequences:
    """Return the sequences of a padded or packed call; the queries of each are the last of its keys."""
    if distances.key_document is not None:
        return _find_documents(distances, batch)
    keys = _counting_keys(distances, batch)
    queries = keys[:, distances.query_index]
    bounds = _bounds(queries.sum(-1)), _bounds(keys.sum(-1))
    return Sequences(_places(queries), _places(keys), *bounds, _longest(bounds[0]), _longest(bounds[1]))


def _find_documents(distances: Distances, batch: int) -> Sequences:
    """Return the documents of a packed call: there is no cache, so queries and keys are the same tokens."""
    documents = distances.key_document.expand(batch, -1)  # type: ignore[union-attr]
    row = torch.arange(batch, device=documents.device)[:, None].expand_as(documents)
    belongs = torch.stack([row.flatten(), documents.flatten()])
    places = None if distances.key_mask is None else _places(_counting_keys(distances, batch))
    if places is not None:
        belongs = belongs[:, places]
    lengths = torch.unique_consecutive(belongs, dim=1, return_counts=True)[1]
    bounds = _bounds(lengths)
    longest = _longest(bounds)
    return Sequences(places, places, bounds, bounds, longest, longest)


def _counting_keys(distances: Distances, batch: int) -> torch.Tensor:
    """Return which keys are unmasked and not behind the last query, bool `[batch, keys]`."""
    index = torch.arange(distances.num_keys, device=distances.slopes.device)
    filled = (index <= distances.query_index[-1]).expand(batch, -1)
    return filled if distances.key_mask is None else filled & distances.key_mask


def _places(counting: torch.Tensor) -> torch.Tensor:
    return counting.flatten().nonzero()[:, 0]


def _bounds(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _longest(bounds: torch.Tensor) -> int:
    return int(bounds.diff().max()) if bounds.numel() > 1 else 0
