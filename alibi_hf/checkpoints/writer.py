"""Writing safetensors shard by shard, value by value, and a folder that appears all at once.

`ShardFile` needs names, shapes and dtypes beforehand, so that it writes the header first and then streams: it holds one
tensor, whatever the size. Format: github.com/huggingface/safetensors.
"""

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alibi_hf.checkpoints.shards import DTYPE_NAMES
from alibi_hf.errors import CheckpointFileError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
INDEX = "model.safetensors.index.json"
JOURNAL = ".resume.json"  # in a working folder only; see resume.py


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


class ShardFile:
    """One safetensors file that is being written: its header at once, then tensor after tensor in the given order."""

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self.path = path
        self._pending = list(entries)[::-1]
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._write(_header(entries))

    @property
    def complete(self) -> bool:
        """Whether every tensor was added."""
        return not self._pending

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor; it must be the next of the entries, with its shape and dtype."""
        expected = self._pending.pop()
        if (name, tuple(tensor.shape), tensor.dtype) != (expected.name, expected.shape, expected.dtype):
            raise AssertionError(f"expected {expected} to be written next, not {name} {list(tensor.shape)}.")
        self._write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish(self) -> dict[str, Any]:
        """Close the file; returns its name, SHA-256 and bytes."""
        if self._pending:
            raise AssertionError(f"{len(self._pending)} tensors of {self.path.name} were not written.")
        size = self._file.tell()
        self.close()
        return {"name": self.path.name, "sha256": self._digest.hexdigest(), "bytes": size}

    def close(self) -> None:
        """Close the file as it is; for the way out of an error."""
        self._file.close()

    def _write(self, data: Any) -> None:
        self._file.write(data)
        self._digest.update(data)


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def shard_names(number: int) -> list[str]:
    """File names of `number` shards."""
    if number == 1:
        return ["model.safetensors"]
    return [f"model-{index:05d}-of-{number:05d}.safetensors" for index in range(1, number + 1)]


def write_index(folder: Path, shards: Sequence[Sequence[Entry]]) -> None:
    """Write the index, if there are several shards."""
    if len(shards) > 1:
        names = shard_names(len(shards))
        mapping = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.bytes for shard in shards for entry in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": mapping})


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
        self._file: ShardFile | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor; it must be the next of `entries`, with its shape and dtype."""
        if self._file is None:
            number = len(self.files)
            self._file = ShardFile(self.folder / shard_names(len(self.shards))[number], self.shards[number])
        self._file.add(name, tensor)
        if self._file.complete:
            self.files.append(self._file.finish())
            self._file = None

    def finish(self) -> list[dict[str, Any]]:
        """Write the index, if there are several shards; returns name, SHA-256 and bytes of every file."""
        if len(self.files) != len(self.shards):
            raise AssertionError(f"{len(self.shards) - len(self.files)} shards were not written.")
        write_index(self.folder, self.shards)
        return self.files

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


def partial_of(out: Path) -> Path:
    """The working folder of an output, beside it."""
    out = out.resolve()  # through links: what they point to is what is replaced
    return out.parent / f".{out.name}.partial"


@contextmanager
def appearing(
    out: Path, overwrite: bool, resume: bool = False, keep: Callable[[], bool] = lambda: False
) -> Iterator[Path]:
    """A working folder `.OUT.partial` that becomes `out` by one rename when the block ends.

    An error removes it, unless it was resumed, or `keep` then says that what is finished is worth going on with; a kill
    leaves it, and so does Ctrl-C where there is a journal. `resume` then allows going on in it, `overwrite` starting
    again.

    Raises:
        CheckpointFileError: if `out` is a file, holds something and `overwrite` is false, or cannot be made.
    """
    out, partial = out.resolve(), partial_of(out)
    old = out.parent / f".{out.name}.replaced"
    _refuse_links(partial, old)
    if old.exists() and not out.exists():
        old.rename(out)  # the last run was killed between the two renames of `_swap`
    _refuse(out, partial, overwrite, resume)
    made = [parent for parent in out.parents if not parent.exists()]  # the innermost first
    shutil.rmtree(old, ignore_errors=True)
    resume = resume and (partial / JOURNAL).exists()  # without one, what is there belongs to no conversion
    if not resume:
        shutil.rmtree(partial, ignore_errors=True)
    _make(partial, exist_ok=resume)
    try:
        yield partial
        _sync(partial)
        (partial / JOURNAL).unlink(missing_ok=True)
        _swap(partial, out, old)
    except BaseException as error:
        worth_keeping = resume or isinstance(error, KeyboardInterrupt) or keep()
        if not (worth_keeping and (partial / JOURNAL).exists()):
            shutil.rmtree(partial, ignore_errors=True)
            for parent in made:
                parent.rmdir()
        raise
    _sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _refuse(out: Path, partial: Path, overwrite: bool, resume: bool) -> None:
    if out == Path.cwd():
        raise CheckpointFileError(f"{out} is the current folder, which cannot be replaced; name another one.")
    if out.exists() and not out.is_dir():
        raise CheckpointFileError(f"{out} is a file; give a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CheckpointFileError(f"{out} exists and is not empty; --overwrite (overwrite=True) replaces it.")
    if partial.exists() and not (overwrite or resume):
        kept = (partial / JOURNAL).exists()
        how = "use --resume (resume=True) to go on, or --overwrite (overwrite=True) to start again" if kept else ""
        raise CheckpointFileError(
            f"{partial} is left from a run that was cut off; {how or 'use --overwrite (overwrite=True)'}."
        )


def _refuse_links(partial: Path, old: Path) -> None:
    """What lies beside the output is removed, renamed and written to: not through a link that somebody put there."""
    inside = partial.iterdir() if partial.is_dir() and not partial.is_symlink() else []
    if links := [path for path in (partial, old, *inside) if path.is_symlink()]:
        raise CheckpointFileError(
            f"{links[0]} is a link to {os.readlink(links[0])}; no run makes one there. Remove it, and see who made it."
        )


def _make(partial: Path, exist_ok: bool) -> None:
    try:
        partial.mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise CheckpointFileError(f"{partial} cannot be made: {error}. Choose a folder that can be written.") from error


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


__all__ = [
    "INDEX",
    "JOURNAL",
    "Entry",
    "ShardFile",
    "ShardWriter",
    "appearing",
    "check_disk",
    "parse_size",
    "partial_of",
    "shard_names",
    "split_shards",
    "write_index",
    "write_json",
]
