"""The ways of feeding documents to a decoder; each returns the logits of every document, `[tokens, vocab]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

Texts = Sequence[torch.Tensor]
Feed = Callable[[Any, Texts], list[torch.Tensor]]
CHUNKS = (3, 1, 7, 1, 20)


def whole(model: Any, texts: Texts) -> list[torch.Tensor]:
    """Each document alone, in one call."""
    return [model(text[None]).logits[0] for text in texts]


def without_cache(model: Any, texts: Texts) -> list[torch.Tensor]:
    """Each document alone, with use_cache off."""
    return [model(text[None], use_cache=False).logits[0] for text in texts]


def shifted_positions(model: Any, texts: Texts) -> list[torch.Tensor]:
    """Each document alone, with position_ids that start at 7: an offset changes nothing."""
    return [model(text[None], position_ids=torch.arange(7, 7 + len(text))[None]).logits[0] for text in texts]


def embedded(model: Any, texts: Texts) -> list[torch.Tensor]:
    """Each document alone, as inputs_embeds."""
    return [model(inputs_embeds=model.get_input_embeddings()(text[None])).logits[0] for text in texts]


def _cache(model: Any, kind: str, length: int) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=length + 9)


def _pieces(length: int, sizes: Sequence[int]) -> list[slice]:
    pieces, start = [], 0
    for size in [*sizes, *[sizes[-1]] * length]:
        if start < length:
            pieces.append(slice(start, min(start + size, length)))
            start += size
    return pieces


def cached(kind: str, sizes: Sequence[int], offset: int | None = None) -> Feed:
    """Each document alone, in pieces of the given sizes (the last one repeats), through a cache.

    With `offset`, position_ids are given, and are off by it.
    """

    def positions(piece: slice) -> torch.Tensor | None:
        return None if offset is None else torch.arange(piece.start, piece.stop)[None] + offset

    def feed(model: Any, texts: Texts) -> list[torch.Tensor]:
        results = []
        for text in texts:
            cache = _cache(model, kind, len(text))
            outputs = [
                model(text[None, piece], past_key_values=cache, position_ids=positions(piece)).logits[0]
                for piece in _pieces(len(text), sizes)
            ]
            results.append(torch.cat(outputs))
        return results

    return feed


def pad(texts: Texts, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of the padded batch; "interior" pads in the middle of each document and after it."""
    width = max(len(text) for text in texts) + 5
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        place = torch.arange(len(text))
        if side == "left":
            place = place + width - len(text)
        elif side == "interior":
            place = place + 5 * (place >= len(text) // 2)
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


def _unpad(logits: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    return [row[kept.bool()] for row, kept in zip(logits, mask, strict=True)]


def padded(side: str, dtype: torch.dtype = torch.long, positions: str | None = None) -> Feed:
    """All documents in one padded batch, in one call; position_ids as some callers give them."""

    def feed(model: Any, texts: Texts) -> list[torch.Tensor]:
        ids, mask = pad(texts, side)
        given = {
            None: None,
            "index": torch.arange(ids.shape[1])[None],
            "count": (mask.cumsum(-1) - 1).clamp(min=0),
            "ones": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1),
        }[positions]
        return _unpad(model(ids, attention_mask=mask.to(dtype), position_ids=given).logits, mask)

    return feed


def batch_without_mask(model: Any, texts: Texts) -> list[torch.Tensor]:
    """All documents in one batch, filled up on the right; causality alone keeps the filling out."""
    ids, mask = pad(texts, "right")
    return _unpad(model(ids).logits, mask)


def padded_cached(kind: str, side: str, sizes: Sequence[int]) -> Feed:
    """All documents in one padded batch, in pieces, through a cache; the mask grows as in `generate`."""

    def feed(model: Any, texts: Texts) -> list[torch.Tensor]:
        ids, mask = pad(texts, side)
        cache = _cache(model, kind, ids.shape[1])
        outputs = [
            model(ids[:, piece], attention_mask=mask[:, : piece.stop], past_key_values=cache).logits
            for piece in _pieces(ids.shape[1], sizes)
        ]
        return _unpad(torch.cat(outputs, dim=1), mask)

    return feed


def flattened(texts: Texts) -> dict[str, torch.Tensor]:
    """Return what `DataCollatorWithFlattening` gives for the documents in one row."""
    lengths = torch.tensor([len(text) for text in texts])
    return {
        "input_ids": torch.cat(list(texts))[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "seq_idx": torch.repeat_interleave(torch.arange(len(texts)), lengths)[None].int(),
        "cu_seq_lens_q": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
    }


def packed(*names: str, use_cache: bool | None = None) -> Feed:
    """All documents in one row; `names` are the arguments that say where each starts."""

    def feed(model: Any, texts: Texts) -> list[torch.Tensor]:
        flat = flattened(texts)
        given = {name: flat[name] for name in ("input_ids", *names)}
        outputs = model(**given, use_cache=use_cache)
        assert outputs.past_key_values is None
        return list(outputs.logits[0].split([len(text) for text in texts]))

    return feed


def packed_with_a_mask_of_ones(model: Any, texts: Texts) -> list[torch.Tensor]:
    """All documents in one row, with position_ids and a mask that hides nothing, as some collators give."""
    flat = flattened(texts)
    ids, mask = flat["input_ids"], torch.ones_like(flat["input_ids"])
    logits = model(ids, attention_mask=mask, position_ids=flat["position_ids"]).logits[0]
    return list(logits.split([len(text) for text in texts]))


def packed_rows(model: Any, texts: Texts) -> list[torch.Tensor]:
    """Two rows with the documents in opposite orders, without a mask; the answer is that of the second row."""
    rows = [flattened(texts), flattened(list(texts)[::-1])]
    ids, positions = (torch.cat([row[name] for row in rows]) for name in ("input_ids", "position_ids"))
    logits = model(ids, position_ids=positions).logits[1]
    return list(logits.split([len(text) for text in texts][::-1]))[::-1]


def packed_and_padded(model: Any, texts: Texts) -> list[torch.Tensor]:
    """Two rows packed in different orders, with padding between the documents and a mask."""
    rows, gap = [list(texts), list(texts)[::-1]], 4
    width = sum(len(text) + gap for text in texts)
    ids, mask, positions = (torch.zeros(2, width, dtype=torch.long) for _ in range(3))
    places = []
    for row, order in enumerate(rows):
        start = 0
        for text in order:
            place = slice(start, start + len(text))
            ids[row, place], mask[row, place], positions[row, place] = text, 1, torch.arange(len(text))
            places.append((row, place))
            start += len(text) + gap
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    pieces = [logits[row, place] for row, place in places]
    found, again = pieces[: len(texts)], pieces[len(texts) :][::-1]
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    return found


def custom_mask(kind: str) -> Feed:
    """One row under a 4-D mask that separates the documents: bool, or float with -inf or the dtype's minimum."""

    def feed(model: Any, texts: Texts) -> list[torch.Tensor]:
        flat = flattened(texts)
        same = flat["seq_idx"][0][:, None] == flat["seq_idx"][0][None, :]
        mask = (same & torch.ones_like(same).tril())[None, None]
        if kind != "bool":
            low = -torch.inf if kind == "infinity" else torch.finfo(model.dtype).min
            mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, low)
        logits = model(flat["input_ids"], attention_mask=mask).logits[0]
        return list(logits.split([len(text) for text in texts]))

    return feed


FEEDS: dict[str, Feed] = {
    "whole": whole,
    "no_cache": without_cache,
    "shifted_positions": shifted_positions,
    "embedded": embedded,
    "tokens_dynamic": cached("dynamic", (1,)),
    "tokens_static": cached("static", (1,)),
    "chunks_dynamic": cached("dynamic", CHUNKS),
    "chunks_static": cached("static", CHUNKS),
    "chunks_shifted_positions": cached("dynamic", CHUNKS, offset=5),
    "left": padded("left"),
    "right": padded("right"),
    "interior": padded("interior"),
    "bool_mask": padded("left", torch.bool),
    "float_mask": padded("interior", torch.float32),
    "left_positions_index": padded("left", positions="index"),
    "left_positions_count": padded("left", positions="count"),
    "left_positions_ones": padded("left", positions="ones"),
    "interior_positions_count": padded("interior", positions="count"),
    "batch_without_mask": batch_without_mask,
    "left_dynamic": padded_cached("dynamic", "left", (9, 1)),
    "left_static": padded_cached("static", "left", (9, 1)),
    "interior_dynamic": padded_cached("dynamic", "interior", CHUNKS),
    "interior_static": padded_cached("static", "interior", CHUNKS),
    "packed_positions": packed("position_ids"),
    "packed_positions_use_cache": packed("position_ids", use_cache=True),
    "packed_positions_no_cache": packed("position_ids", use_cache=False),
    "packed_seq_idx": packed("seq_idx", use_cache=True),
    "packed_cu_seq_lens": packed("cu_seq_lens_q"),
    "packed_all": packed("position_ids", "seq_idx", "cu_seq_lens_q", use_cache=True),
    "packed_with_a_mask_of_ones": packed_with_a_mask_of_ones,
    "packed_rows": packed_rows,
    "packed_and_padded": packed_and_padded,
    "mask_4d_bool": custom_mask("bool"),
    "mask_4d_infinity": custom_mask("infinity"),
    "mask_4d_minimum": custom_mask("minimum"),
}

# How many tokens the calls of a feed read, the last number repeating; the others read each document in one call.
PIECES = {
    "tokens_dynamic": (1,),
    "tokens_static": (1,),
    "chunks_dynamic": CHUNKS,
    "chunks_static": CHUNKS,
    "chunks_shifted_positions": CHUNKS,
    "left_dynamic": (9, 1),
    "left_static": (9, 1),
    "interior_dynamic": CHUNKS,
    "interior_static": CHUNKS,
}


def calls_of(feed: str, texts: Texts) -> list[list[int]] | None:
    """Return for each document how many of its tokens each call of a feed reads; None: all in one."""
    if feed not in PIECES:
        return None
    side = feed.split("_")[0]
    masks = pad(texts, side)[1] if side in ("left", "interior") else [torch.ones_like(text) for text in texts]
    counts = [[int(mask[piece].sum()) for piece in _pieces(len(mask), PIECES[feed])] for mask in masks]
    return [[count for count in row if count] for row in counts]
