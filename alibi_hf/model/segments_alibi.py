"""Padding and packing as work on documents: the cost is the sum of their squares, not the square of the row.

* Within one document, distance is the difference of the indices of its unmasked tokens; so each document is attended to
  as if it were alone, by whatever form serves whole rows. What lies between documents costs nothing.
* Documents of equal length, in any rows, go into one call.
* Tokens are taken by `split` and put back by `cat`: backward of a slice would fill a gradient of the size of the row
  with zeros for every document.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch

from .bias_alibi import Distances
from .positions_alibi import is_tracing

MIN_QUERIES = 32  # below, one call with a materialised bias costs less than a call for each length
HIDDEN = torch.iinfo(torch.int64).min  # in place of the document of a masked token

Spans = tuple[tuple[int, int], ...]  # (start, stop) of runs of tokens, in order
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Distances], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Segment:
    """The unmasked tokens of one document in one row; its queries are its last tokens.

    Attributes:
        queries: where they lie among the queries of the call.
        keys: where they lie among its keys: those that the last query sees.
    """

    queries: Spans
    keys: Spans

    @property
    def extent(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return _length(self.queries), _length(self.keys)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Consecutive rows of a batch that have their documents at the same places."""

    count: int
    segments: tuple[Segment, ...]


def find_segments(distances: Distances, batch: int) -> list[Rows] | None:
    """Return the documents of all rows, or None where attention is not a matter of documents alone.

    That is so with a custom mask, with rounded biases and while tracing; nor is there anything to gain without padding
    or packing, or for few queries. The answer is kept for the other layers; it costs one copy from the device.

    Args:
        batch: number of rows; `distances` may hold one for all of them.
    """
    special = distances.custom_mask is not None or distances.row is not None
    plain = distances.key_mask is None and distances.key_document is None
    if is_tracing() or special or plain or distances.query_index.numel() < MIN_QUERIES:
        return None
    return distances.once(("segments", batch), lambda: _find(distances, batch))


def _find(distances: Distances, batch: int) -> list[Rows]:
    labels, first = _labels_on_host(distances)
    changes = (labels[1:] != labels[:-1]).any(-1).nonzero().flatten() + 1
    bounds = [0, *changes.tolist(), labels.shape[0]]
    counts = [batch] if labels.shape[0] == 1 else [stop - start for start, stop in itertools.pairwise(bounds)]
    starts = zip(counts, bounds[:-1], strict=True)
    return [Rows(count, _segments_of_row(labels[start], first)) for count, start in starts]


def _labels_on_host(distances: Distances) -> tuple[torch.Tensor, int]:
    """Return the document of each key up to the last query, `HIDDEN` where masked, `[rows, keys]`; the first query."""
    documents, mask = distances.key_document, distances.key_mask
    if documents is None:
        documents = torch.zeros(1, 1, dtype=torch.int64, device=distances.slopes.device)
    labels = documents if mask is None else torch.where(mask, documents, HIDDEN)
    copied = torch.cat([labels.flatten(), distances.query_index[:1]]).cpu()
    first = int(copied[-1])
    return copied[:-1].view(labels.shape)[:, : first + distances.query_index.numel()], first


def _segments_of_row(labels: torch.Tensor, first: int) -> tuple[Segment, ...]:
    """Return the segments of one row, `labels` int64 `[keys]`, never falling but for `HIDDEN`."""
    kept = (labels != HIDDEN).nonzero().flatten()
    if kept.numel() == 0:
        return ()
    breaks = ((labels[kept].diff() != 0) | (kept.diff() != 1)).nonzero().flatten()
    starts = torch.cat([kept[:1], kept[breaks + 1]])
    stops = torch.cat([kept[breaks], kept[-1:]]) + 1
    spans = zip(labels[starts].tolist(), starts.tolist(), stops.tolist(), strict=True)
    segments = []
    for _, pieces in itertools.groupby(spans, key=lambda span: span[0]):
        keys = tuple((start, stop) for _, start, stop in pieces)
        queries = tuple((max(start, first) - first, stop - first) for start, stop in keys if stop > first)
        if queries:
            segments.append(Segment(queries, keys))
    return tuple(segments)


def attend_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    distances: Distances,
    rows: Sequence[Rows],
    attend: Attend,
) -> torch.Tensor:
    """Return attention output `[batch, heads, queries, dim]`; masked queries get zeros.

    Args:
        query, key, value: `[batch, heads or key/value heads, queries or keys, dim]`.
        rows: what `find_segments` found in `distances`.
        attend: attention for documents of one length, on slices of query, key and value with distances by index.
    """
    counts = [group.count for group in rows]
    queries = _take(query, counts, [[segment.queries for segment in group.segments] for group in rows])
    keys, values = (
        _take(states, counts, [[segment.keys for segment in group.segments] for group in rows])
        for states in (key, value)
    )
    first_rows = itertools.accumulate(counts, initial=0)
    segments = [(row, segment) for row, group in zip(first_rows, rows, strict=False) for segment in group.segments]
    alike: dict[tuple[int, int], list[int]] = {}
    for index, (_, segment) in enumerate(segments):
        alike.setdefault(segment.extent, []).append(index)
    outputs = list(queries)
    for extent, members in alike.items():
        q, k, v = (_join([pieces[index] for index in members], dim=0) for pieces in (queries, keys, values))
        output = attend(q, k, v, _by_index(distances, *extent, *segments[members[0]]))
        for index, piece in zip(members, output.split([queries[index].shape[0] for index in members]), strict=True):
            outputs[index] = piece
    return _put_back(outputs, rows, query.shape[2], value.new_zeros(1, query.shape[1], 1, value.shape[3]))


def _by_index(distances: Distances, queries: int, keys: int, row: int, segment: Segment) -> Distances:
    """Return the distances of a document of which the last `queries` of `keys` tokens are queries.

    Args:
        row, segment: one such document, and the row it is in: all of them have its slopes, scaled by length or not.
    """
    kept = distances._kept
    if (queries, keys, "alone") not in kept:
        offset = keys - queries
        kept[queries, keys, "alone"] = Distances(
            slopes=distances.slopes_at(row, segment.queries[0][0]),
            query_index=torch.arange(queries, device=distances.slopes.device) + offset,
            num_keys=keys,
            offset=offset,
            rounded=distances.rounded,
            sqrt=distances.sqrt,
            biased=distances.biased,
            window=distances.window,
            window_eps=distances.window_eps,
        )
    return kept[queries, keys, "alone"]


def _take(states: torch.Tensor, counts: Sequence[int], segments: Iterable[Sequence[Spans]]) -> list[torch.Tensor]:
    """Return the tokens of each segment, `[rows, heads, tokens, dim]`; all rows and all segments in order."""
    taken = []
    for group, group_segments in zip(states.split(list(counts)), segments, strict=True):
        edges = [0, *(edge for spans in group_segments for span in spans for edge in span), states.shape[2]]
        pieces = iter(group.split([stop - start for start, stop in itertools.pairwise(edges)], dim=2)[1::2])
        taken += [_join(list(itertools.islice(pieces, len(spans))), dim=2) for spans in group_segments]
    return taken


def _put_back(outputs: Sequence[torch.Tensor], rows: Sequence[Rows], queries: int, zero: torch.Tensor) -> torch.Tensor:
    """Return the outputs of all segments in their places, zeros between, `[batch, heads, queries, dim]`."""
    remaining, groups = iter(outputs), []
    for group in rows:
        pieces, end = [], 0
        own = itertools.islice(remaining, len(group.segments))
        for segment, output in zip(group.segments, own, strict=True):
            lengths = [stop - start for start, stop in segment.queries]
            for (start, stop), piece in zip(segment.queries, output.split(lengths, dim=2), strict=True):
                pieces += [zero.expand(group.count, -1, start - end, -1), piece]
                end = stop
        pieces.append(zero.expand(group.count, -1, queries - end, -1))
        # Tokens before heads, as the projection that follows wants them.
        groups.append(_join([piece.transpose(1, 2) for piece in pieces if piece.shape[2]], dim=1))
    return _join(groups, dim=0).transpose(1, 2)


def _join(pieces: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=dim)


def _length(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)
