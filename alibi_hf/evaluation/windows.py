"""Which tokens of a text a window reads, and which of them count: the two protocols.

Both read one region of the text at every length, so that lengths differ in context and in nothing else:

* it ends where the longest length has its last whole window;
* non-overlapping windows cover it from its first token on;
* sliding windows predict its tokens from the first one that the longest length gives `length - stride` tokens of
  context, the same tokens at every length.

Non-overlapping and sliding windows: Press, Smith and Lewis, "Train Short, Test Long", arXiv:2108.12409, appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alibi_hf.errors import AlibiError
from alibi_hf.evaluation.report import Protocol


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop - 1` of the text are read; those from `first` on are predicted."""

    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Region:
    """What all lengths read: tokens 0 to `stop - 1`; the sliding protocol predicts those from `first` on."""

    first: int
    stop: int


def default_stride(length: int) -> int:
    """Return half the length: every token has half a window of context or more, at twice the cost of not sliding."""
    return max(1, length // 2)


def check_stride(lengths: Sequence[int], stride: int | None) -> None:
    """Refuse a stride that leaves a token without context.

    Raises:
        AlibiError: with both numbers.
    """
    if stride is not None and not 1 <= stride < min(lengths):
        raise AlibiError(
            f"a stride of {stride} does not fit windows of {min(lengths)} tokens: each predicts its last {stride}, and "
            f"needs one before them. Give a stride from 1 to {min(lengths) - 1}, or none for half of each length."
        )


def make_region(tokens: int, lengths: Sequence[int], stride: int | None = None) -> Region:
    """Return what all `lengths` read of a text of `tokens`; the longest must fit into it."""
    longest = max(lengths)
    return Region(longest - (stride or default_stride(longest)), tokens // longest * longest)


def make_windows(protocol: Protocol, length: int, region: Region, stride: int | None = None) -> list[Window]:
    """Return the windows of one length, in the order of the text; `stride` None means [`default_stride`]."""
    if protocol == "non-overlapping":
        starts = range(0, region.stop - length + 1, length)
        return [Window(start, start + length, start + 1) for start in starts]
    step = stride or default_stride(length)
    stops = ((first, min(first + step, region.stop)) for first in range(region.first, region.stop, step))
    return [Window(stop - length, stop, first) for first, stop in stops]


__all__ = ["Region", "Window", "check_stride", "default_stride", "make_region", "make_windows"]
