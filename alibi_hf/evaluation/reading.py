"""One model read at one length by one protocol: from windows to a `Reading`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from alibi_hf.errors import in_one_line
from alibi_hf.evaluation.losses import LossReader
from alibi_hf.evaluation.peak import measure_peak
from alibi_hf.evaluation.positions import find_position_table
from alibi_hf.evaluation.report import Protocol, Reading, Span
from alibi_hf.evaluation.text import Tokens
from alibi_hf.evaluation.windows import Region, Window, default_stride, make_windows

BATCH_TOKENS = 8192  # of several windows read at once

Progress = Callable[[int, int], None]


def read(
    reader: LossReader,
    tokens: Tokens,
    length: int,
    protocol: Protocol,
    region: Region,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Reading:
    """Read the region of a text in windows of `length` tokens.

    A model that fails, or gives a loss that is not finite, is what the reading then says: nothing is raised.

    Args:
        reader: the model.
        tokens: the text.
        length, protocol, region, stride: as in [`make_windows`].
        progress: is told how many windows are read, of how many.
    """
    windows = make_windows(protocol, length, region, stride)
    step = length if protocol == "non-overlapping" else stride or default_stride(length)
    sums = _Sums(length)
    started = time.perf_counter()
    with measure_peak(reader.model.device) as peak:
        failure = _too_long(reader.model, length) or _read_all(reader, tokens, windows, sums, progress)
    seconds = time.perf_counter() - started
    if failure:
        return Reading(length, protocol, step, None, None, None, 0, 0, [], seconds, peak.bytes, failure)
    return Reading(
        length=length,
        protocol=protocol,
        stride=step,
        loss=sums.loss,
        bits_per_byte=sums.bits_per_byte,
        standard_error=sums.standard_error,
        tokens=sums.tokens,
        windows=len(windows),
        spans=sums.spans() if protocol == "non-overlapping" else [],
        seconds=seconds,
        peak_bytes=peak.bytes,
    )


class _Sums:
    """The losses of windows, added up."""

    def __init__(self, length: int) -> None:
        self.by_position = torch.zeros(length, dtype=torch.float64)
        self.counts = torch.zeros(length, dtype=torch.int64)
        self.windows: list[tuple[float, int]] = []  # sum and number of each
        self.bytes = 0

    def add(self, losses: torch.Tensor, first: int, in_bytes: int) -> None:
        """Add windows, `[windows, predicted]`, whose first predicted token is at position `first`."""
        losses = losses.double().cpu()
        self.by_position[first:] += losses.sum(0)
        self.counts[first:] += len(losses)
        self.windows += [(float(total), losses.shape[1]) for total in losses.sum(1)]
        self.bytes += in_bytes

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.windows)

    @property
    def loss(self) -> float:
        return math.fsum(total for total, _ in self.windows) / self.tokens

    @property
    def bits_per_byte(self) -> float | None:
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean over all tokens, as a ratio of two sums over windows; None of one window."""
        number, mean = len(self.windows), self.loss
        if number < 2:
            return None
        squares = math.fsum((total - mean * count) ** 2 for total, count in self.windows)
        return math.sqrt(squares * number / (number - 1)) / self.tokens

    def spans(self) -> list[Span]:
        """Return the loss by position, from 1 on, in spans that double."""
        found = []
        start = 1
        while start < len(self.counts):
            stop = min(2 * start, len(self.counts))
            count = int(self.counts[start:stop].sum())
            found.append(Span(start, stop, float(self.by_position[start:stop].sum()) / count, count))
            start = stop
        return found


def _too_long(model: Any, length: int) -> str:
    """Return why a GPU must not be asked: reading past a table stops it for good, where a CPU raises an error."""
    table = find_position_table(model) if model.device.type == "cuda" else None
    if table is None or length <= table[1]:
        return ""
    return f"its table of learned positions ({table[0]}) has {table[1]} rows"


def _read_all(
    reader: LossReader, tokens: Tokens, windows: Sequence[Window], sums: _Sums, progress: Progress | None
) -> str:
    """Add the losses of all windows to `sums`; returns what was wrong, or nothing."""
    for number, batch in _batches(windows):
        window = batch[0]
        try:
            ids = torch.stack([tokens.ids[each.start : each.stop] for each in batch])
            losses = reader.losses(ids, window.first - window.start)
        except Exception as error:  # whatever a model does past its length
            return _reason(error, reader.model, window.stop - window.start)
        if not torch.isfinite(losses).all():
            row, position = (~torch.isfinite(losses)).nonzero()[0].tolist()
            return f"loss is not finite from position {window.first - window.start + position} of window {number + row}"
        sums.add(losses, window.first - window.start, sum(int(tokens.bytes[w.first : w.stop].sum()) for w in batch))
        if progress is not None:
            progress(number + len(batch), len(windows))
    return ""


def _batches(windows: Sequence[Window]) -> Iterator[tuple[int, list[Window]]]:
    """Yield windows of the same shape, `BATCH_TOKENS` together, and the number of the first."""
    number = 0
    for _, alike in groupby(windows, lambda window: (window.stop - window.start, window.first - window.start)):
        group = list(alike)
        size = max(1, BATCH_TOKENS // (group[0].stop - group[0].start))
        for start in range(0, len(group), size):
            yield number + start, group[start : start + size]
        number += len(group)


def _reason(error: Exception, model: Any, length: int) -> str:
    """Return the first line of an error; where a model's positions are in a table that is too short, that too."""
    said = in_one_line(error)
    table = find_position_table(model)
    short = table is not None and length > table[1]
    return f"{said} (its table of learned positions has {table[1]} rows)" if short and table else said


__all__ = ["read"]
