"""Writing safetensors shard by shard, value by value, and a folder that appears all at once.

`ShardWriter` needs names, shapes and dtypes beforehand, so that it writes each header first and then streams: it holds
one tensor, whatever the size. Format: github.com/huggingface/safetensors.
"""

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from alibi_hf.checkpoints.shards import DTYPE_NAMES
from alibi_hf.errors import CheckpointFileError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the values in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def parse_size(size: int | str) -> int:
    """Bytes of `size`, a number or a string such as "5GB" or "512MiB"; `CheckpointFileError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise CheckpointFileError(f"max_shard_size={size!r} is no size; write a number of bytes, or 5GB, 512MiB.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def split_shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """The entries in order, in shards of at most `max_bytes`; a larger tensor gets a shard of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


class ShardWriter:
    """Streams tensors into `model*.safetensors` in the order of `entries`; call `finish` at the end.

    Args:
        folder: where the shards go.
        entries: every tensor that will be added, in order.
        max_bytes: the most a shard holds.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], max_bytes: int) -> None:
        self.folder = folder
        self.shards = split_shards(entries, max_bytes)
        self.files: list[dict[str, Any]] = []
        self._pending = [entry for shard in self.shards for entry in shard][::-1]
        self._file: BinaryIO | None = None
        self._left = 0

    def name(self, number: int) -> str:
        """File name of a shard, counted from 0."""
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor; it must be the next of `entries`, with its shape and dtype."""
        expected = self._pending.pop()
        if (name, tuple(tensor.shape), tensor.dtype) != (expected.name, expected.shape, expected.dtype):
            raise AssertionError(f"expected {expected} to be written next, not {name} {list(tensor.shape)}.")
        if self._file is None:
            self._start()
        values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._write(values.data)
        self._left -= 1
        if self._left == 0:
            self._end()

    def finish(self) -> list[dict[str, Any]]:
        """Write the index, if there are several shards; returns name, SHA-256 and bytes of every file."""
        if self._pending or self._file is not None:
            raise AssertionError(f"{len(self._pending)} tensors were not written.")
        if len(self.shards) > 1:
            mapping = {entry.name: self.name(number) for number, shard in enumerate(self.shards) for entry in shard}
            total = sum(entry.bytes for shard in self.shards for entry in shard)
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": mapping})
        return self.files

    def _start(self) -> None:
        number = len(self.files)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in self.shards[number]:
            header[entry.name] = {
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.bytes],
            }
            offset += entry.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self.folder / self.name(number)).open("wb")
        self._digest = hashlib.sha256()
        self._left = len(self.shards[number])
        self._write(struct.pack("<Q", len(text)) + text)

    def _write(self, data: Any) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)

    def _end(self) -> None:
        assert self._file is not None
        size = self._file.tell()
        self._file.close()
        self.files.append({"name": self.name(len(self.files)), "sha256": self._digest.hexdigest(), "bytes": size})
        self._file = None

    def close(self) -> None:
        """Close the open file, if any; for the way out of an error."""
        if self._file is not None:
            self._file.close()


def write_json(path: Path, value: Any) -> Path:
    """Write JSON with two spaces and a newline at the end, making the folder if need be; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def check_disk(folder: Path, needed: int) -> None:
    """`CheckpointFileError` with both figures if `folder`'s disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointFileError(
            f"writing needs {needed / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free; make room, or choose "
            f"another disk."
        )


@contextmanager
def appearing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A working folder `.OUT.partial` that becomes `out` by one rename when the block ends.

    Any exception removes it; a kill leaves it, and `overwrite` then allows starting again.

    Raises:
        CheckpointFileError: if `out` is a file, or holds something and `overwrite` is false.
    """
    out = out.resolve()  # through links: what they point to is what is replaced
    partial, old = out.parent / f".{out.name}.partial", out.parent / f".{out.name}.replaced"
    if out == Path.cwd():
        raise CheckpointFileError(f"{out} is the current folder, which cannot be replaced; name another one.")
    if out.exists() and not out.is_dir():
        raise CheckpointFileError(f"{out} is a file; give a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CheckpointFileError(f"{out} exists and is not empty; --overwrite (overwrite=True) replaces it.")
    if partial.exists() and not overwrite:
        raise CheckpointFileError(f"{partial} is left from a run that was cut off; use --overwrite (overwrite=True).")
    made = [parent for parent in out.parents if not parent.exists()]  # the innermost first
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        _swap(partial, out, old)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            parent.rmdir()
        raise
    _sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _swap(partial: Path, out: Path, old: Path) -> None:
    """Put `partial` in the place of `out`; what was there waits as `old`, and comes back if that fails."""
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # folders cannot be opened elsewhere
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["INDEX", "Entry", "ShardWriter", "appearing", "check_disk", "parse_size", "split_shards", "write_json"]
