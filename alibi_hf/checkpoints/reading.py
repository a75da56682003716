"""Reading the values of a weight file, and noticing that the file is no longer the one that was opened."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from alibi_hf.checkpoints.shards import MAX_HEADER, TensorInfo
from alibi_hf.errors import CheckpointFileError


def read_tensor(info: TensorInfo, first: int = 0, count: int | None = None) -> torch.Tensor:
    """A tensor of a safetensors file, or `count` of its rows from row `first` on.

    The values are read, not mapped: a file that shrinks meanwhile gives an error, where a mapping ends the process.

    Raises:
        CheckpointFileError: if the file cannot be read, or ends too early.
    """
    shape = info.shape if count is None else (count, *info.shape[1:])
    values = torch.empty(shape, dtype=info.dtype)
    left = values.reshape(-1).view(torch.uint8).numpy().data
    skipped = first * (info.bytes // info.shape[0]) if first else 0
    try:
        with info.shard.open("rb", buffering=0) as file:
            file.seek(info.start + skipped)
            while left:
                read = file.readinto(left)
                if not read:
                    raise CheckpointFileError(
                        f"{info.shard} ends {len(left)} bytes before the end of {info.name}; it was longer when it was "
                        f"opened. Let what writes it finish, and start again."
                    )
                left = left[read:]
    except OSError as error:
        raise CheckpointFileError(f"{info.name} cannot be read from {info.shard}: {error}.") from error
    return values


@dataclass(frozen=True)
class FileState:
    """What tells that a file is still the one that was opened.

    Attributes:
        name, bytes: of the file.
        modified: time of the last change, in nanoseconds.
        header: SHA-256 of a safetensors header, empty for other files.
    """

    name: str
    bytes: int
    modified: int
    header: str = ""

    @classmethod
    def of(cls, path: Path, with_header: bool = False) -> "FileState":
        """The state of a file now; `CheckpointFileError` if it is gone."""
        try:
            status = path.stat()
            header = _header_sha256(path) if with_header and path.suffix == ".safetensors" else ""
        except OSError as error:
            raise CheckpointFileError(f"{path} cannot be read any more: {error}.") from error
        return cls(path.name, status.st_size, status.st_mtime_ns, header)

    def __str__(self) -> str:
        header = f", header {self.header[:8]}" if self.header else ""
        return f"{self.bytes} bytes, modified at {self.modified / 1e9:.6f}{header}"


def require_same(path: Path, before: FileState) -> None:
    """`CheckpointFileError` with both states if the file is not what it was."""
    now = FileState.of(path, with_header=bool(before.header))
    if now != before:
        raise CheckpointFileError(
            f"{path} changed while it was read: {before} when it was opened, {now} now. Let what writes it finish, and "
            f"start again."
        )


def _header_sha256(path: Path) -> str:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return hashlib.sha256(file.read(min(length, MAX_HEADER))).hexdigest()


__all__ = ["FileState", "read_tensor", "require_same"]
