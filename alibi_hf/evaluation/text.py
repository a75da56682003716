"""Text files as one stream of tokens, read and tokenised piece by piece.

A piece is tokenised together with the text around it, and of the result only the tokens that begin inside are kept: the
ids are those of the whole file tokenised at once. Two neighbours have to agree on the text that both have seen; where
they do not, or where a tokenizer does not say where its tokens begin, the file is tokenised at once after all.
"""

from __future__ import annotations

import codecs
import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from alibi_hf.errors import CheckpointFileError

BLOCK = 2**16  # bytes read at a time
PIECE = 2**16  # characters
CONTEXT = 2**10  # characters of the neighbours that a piece is tokenised with


@dataclass(frozen=True)
class TextFile:
    """A text file as it was when it was opened."""

    path: Path
    sha256: str
    bytes: int
    characters: int

    def to_dict(self) -> dict[str, Any]:
        """Return what a report says about it."""
        return {"name": self.path.name, "sha256": self.sha256, "bytes": self.bytes, "characters": self.characters}


@dataclass(frozen=True)
class Tokens:
    """A text in the tokens of one tokenizer.

    Attributes:
        ids: int32 `[tokens]`.
        bytes: int32 `[tokens]`, the bytes of text that each stands for; the sum is that of the text.
        notes: what a reader has to know about how it came about.
    """

    ids: torch.Tensor
    bytes: torch.Tensor
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


def open_texts(paths: Sequence[str | Path]) -> list[TextFile]:
    """Read the files through once; a folder stands for its `*.txt`, by name.

    Raises:
        CheckpointFileError: a file or folder that is missing or empty, or is not UTF-8.
    """
    files: list[Path] = []
    for path in (Path(path).expanduser() for path in paths):
        inside = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not inside:
            raise CheckpointFileError(f"{path} holds no file that ends in .txt; give text files, or a folder of them.")
        files += inside
    if not files:
        raise CheckpointFileError("no text was given; give text files, or a folder of them.")
    return [_open(path) for path in files]


def read_text(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in blocks; line ends stay as they are.

    Raises:
        CheckpointFileError: where it cannot be read, or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield decoder.decode(block)
                done += len(block)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise CheckpointFileError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} near byte {done + error.start} "
            f"({error.reason}). Convert it first, as with iconv -t UTF-8."
        ) from error
    except OSError as error:
        raise CheckpointFileError(f"{path} cannot be read: {error.strerror}; give a text file.") from error


def tokenize(
    tokenizer: Any, files: Sequence[TextFile], most: int | None = None, progress: Callable[[int], None] | None = None
) -> Tokens:
    """Return the tokens of all files, the tokenizer's end token between two of them; no start token.

    Args:
        tokenizer: of Transformers.
        files: from `open_texts`.
        most: stop after this many tokens.
        progress: is told how many bytes of text were tokenised.
    """
    found = _Found()
    for number, file in enumerate(files):
        if number and tokenizer.eos_token_id is not None:
            found.add([tokenizer.eos_token_id], [0])
        before, in_bytes = len(found.ids), found.in_bytes
        try:
            for ids, sizes in _in_pieces(tokenizer, file.path):
                found.add(ids, sizes)
                if progress is not None:
                    progress(found.in_bytes)
                if most is not None and len(found.ids) >= most:
                    return found.tokens(most)
        except _NotLocalError as error:
            found.forget(before, in_bytes)
            found.notes.append(f"{file.path.name} was tokenised at once: {error}.")
            found.add(*_at_once(tokenizer, file))
    return found.tokens(most)


class _NotLocalError(Exception):
    """The tokens of a piece cannot be told from the piece and what is around it."""


class _Found:
    """The tokens so far, their bytes, and notes."""

    def __init__(self) -> None:
        self.ids, self.sizes = array("i"), array("i")
        self.in_bytes = 0
        self.notes: list[str] = []

    def add(self, ids: Sequence[int], sizes: Sequence[int]) -> None:
        self.ids.extend(ids)
        self.sizes.extend(sizes)
        self.in_bytes += sum(sizes)

    def forget(self, tokens: int, in_bytes: int) -> None:
        """Go back to when there were only so many."""
        del self.ids[tokens:], self.sizes[tokens:]
        self.in_bytes = in_bytes

    def tokens(self, most: int | None) -> Tokens:
        if not self.ids:  # a buffer of nothing is refused
            return Tokens(torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32), self.notes)
        ids, sizes = (torch.frombuffer(values, dtype=torch.int32)[:most] for values in (self.ids, self.sizes))
        return Tokens(ids, sizes, self.notes)


def _open(path: Path) -> TextFile:
    digest, size, characters, blank = hashlib.sha256(), 0, 0, True
    for text in read_text(path):
        encoded = text.encode()
        digest.update(encoded)
        size, characters = size + len(encoded), characters + len(text)
        blank = blank and not text.strip()
    if blank:
        raise CheckpointFileError(f"{path} is empty ({size} bytes without a word); there is nothing to read in it.")
    return TextFile(path, digest.hexdigest(), size, characters)


def _in_pieces(tokenizer: Any, path: Path) -> Iterator[tuple[list[int], list[int]]]:
    """Yield ids and bytes of the tokens that begin in each piece of a file.

    Raises:
        _NotLocalError: where that would not be what the whole file gives.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise _NotLocalError("its tokenizer does not say where tokens begin")
    seen: list[tuple[int, int]] = []  # ids, and where they begin, of tokens after the end of the piece before
    blocks, text, start, reached, ended = read_text(path), "", 0, 0, False
    while not ended:
        while len(text) < start + PIECE + CONTEXT and not ended:
            block = next(blocks, None)
            ended, text = block is None, text + (block or "")
        stop = len(text) if ended else start + PIECE
        ids, starts, ends = _encode(tokenizer, text[: stop + CONTEXT])
        first = bisect_left(starts, start) if start else 0
        last = len(ids) if ended else bisect_left(starts, stop)
        if seen != _placed(ids, starts, first, first + len(seen), start):
            raise _NotLocalError("neighbouring pieces do not agree on the tokens between them")
        seen = _placed(ids, starts, last, bisect_left(starts, stop + CONTEXT // 2), stop)
        sizes, reached = _byte_sizes(text, ends[first:last], reached)
        yield ids[first:last], sizes
        dropped = max(0, stop - CONTEXT)
        text, start, reached = text[dropped:], stop - dropped, reached - dropped


def _placed(ids: list[int], starts: list[int], first: int, last: int, origin: int) -> list[tuple[int, int]]:
    """Return some tokens and at which character after `origin` each begins."""
    return [(token, at - origin) for token, at in zip(ids[first:last], starts[first:last], strict=True)]


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """Return ids, and at which character each begins and ends, neither ever going back."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, ends = zip(*encoded["offset_mapping"], strict=True) if encoded["input_ids"] else ((), ())
    return list(encoded["input_ids"]), list(accumulate(starts, max)), list(accumulate(ends, max))


def _byte_sizes(text: str, ends: list[int], reached: int) -> tuple[list[int], int]:
    """Return the bytes from each end to the next, beginning at character `reached`, and the last end."""
    codes = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    widths = 1 + (codes >= 0x80).int() + (codes >= 0x800).int() + (codes >= 0x10000).int()
    until = torch.cat([torch.zeros(1, dtype=torch.int64), widths.cumsum(0)])
    marks = until[torch.tensor([reached, *ends]).clamp(min=reached)]
    return marks.diff().tolist(), max([reached, *ends[-1:]])


def _at_once(tokenizer: Any, file: TextFile) -> tuple[list[int], list[int]]:
    """Return the ids of a whole file; its bytes are dealt out evenly."""
    ids = list(tokenizer("".join(read_text(file.path)), add_special_tokens=False, verbose=False)["input_ids"])
    marks = [file.bytes * number // max(1, len(ids)) for number in range(len(ids) + 1)]
    return ids, [stop - start for start, stop in pairwise(marks)]


__all__ = ["TextFile", "Tokens", "open_texts", "read_text", "tokenize"]
