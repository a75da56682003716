"""The weight files of a folder: where they are, what they hold, and whether they are whole; nothing is loaded.

* safetensors first; pickles only when asked, with `weights_only=True`.
* Names in an index are file names beside it, never paths.
"""

import hashlib
import os
import re
import reprlib
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from alibi_hf.checkpoints.json_files import MAX_JSON, parse_json, read_json
from alibi_hf.errors import CheckpointFileError, UnsafeSourceError

# safetensors' dtype names, from its format description.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# (index file, single file) of each format, in the order Transformers looks for them.
SAFETENSORS = ("model.safetensors.index.json", "model.safetensors")
PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
_LONGEST_NAME = 255  # characters, of a file on the usual disks
MAX_HEADER = MAX_JSON  # bytes: some 130,000 tensors in one file, where safetensors itself allows six times that
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: its file and what the file says about it; `start` is its first byte there."""

    name: str
    shard: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0

    @property
    def bytes(self) -> int:
        """Size of the values in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that holds a part of it."""
        return (self.shard,)

    @property
    def origin(self) -> str:
        """How it comes out of the files, where that takes more than reading; for `conversion.json`."""
        return ""

    def assemble(self, held: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        """The tensor from the content of its `files`, in their order."""
        return held[0][self.name]


def list_tensors(folder: Path, allow_pickle: bool = False) -> dict[str, TensorInfo]:
    """Every tensor of the folder's weight files, by name, after checking files against each other.

    Raises:
        CheckpointFileError: where there are no weights, a shard is missing or truncated, or index and files disagree.
        UnsafeSourceError: where there are only pickles and `allow_pickle` is false.
    """
    read, found = safetensors_shard, _find(folder, SAFETENSORS)
    if found is None:
        read, found = _pickle_shard, _find(folder, PICKLES)
        if found is None:
            raise CheckpointFileError(
                f"{folder} holds neither {SAFETENSORS[1]} nor {SAFETENSORS[0]}; is it a model folder, and complete?"
            )
        require_pickle_allowed(folder, found[0], allow_pickle)
    entry, index = found
    if index is None:
        return read(entry)
    return _check_index(folder, entry, index, read)


def require_pickle_allowed(folder: Path, file: Path, allow_pickle: bool) -> None:
    """`UnsafeSourceError`, which names the pickle `file`, unless `allow_pickle`."""
    if not allow_pickle:
        raise UnsafeSourceError(
            f"{folder} holds its weights as pickles only ({file.name}). Reading them can be allowed with "
            f"--allow-pickle (allow_pickle=True); it uses weights_only=True, which runs no code."
        )


def _find(folder: Path, names: tuple[str, str]) -> tuple[Path, dict[str, Any] | None] | None:
    index, single = folder / names[0], folder / names[1]
    if os.path.lexists(single):
        return single, None
    if os.path.lexists(index):
        return index, read_json(index)
    return None


def require_files_beside(folder: Path) -> None:
    """`CheckpointFileError` where an index of `folder`, of any variant, names a file that is not beside it."""
    for kind in ("safetensors", "bin"):
        for path in sorted(folder.glob(f"*.{kind}.index*.json")):
            _weight_map(path, read_json(path))


def _weight_map(entry: Path, index: dict[str, Any]) -> dict[str, str]:
    """The file of each tensor by the index `entry`, which may name files beside it and no paths."""
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
        raise CheckpointFileError(f"{entry} has no weight_map of tensor names to file names.")
    for file in sorted(set(mapping.values())):
        if Path(file).name != file or "\\" in file or file in ("", ".", "..") or len(file) > _LONGEST_NAME:
            raise CheckpointFileError(f"{entry} names the file {file!r:.300}; only files beside the index are read.")
    return mapping


def _check_index(folder: Path, entry: Path, index: dict[str, Any], read: Any) -> dict[str, TensorInfo]:
    mapping = _weight_map(entry, index)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(mapping.values())):
        held = read(folder / file)
        if doubled := sorted(held.keys() & tensors.keys()):
            raise CheckpointFileError(f"{file} and {tensors[doubled[0]].shard.name} both hold {doubled[0]}.")
        tensors |= held
    for name, file in mapping.items():
        if name not in tensors:
            raise CheckpointFileError(f"{entry.name} puts {name} in {file}, which does not hold it.")
        if tensors[name].shard.name != file:
            raise CheckpointFileError(f"{entry.name} puts {name} in {file}, but {tensors[name].shard.name} holds it.")
    if extra := sorted(tensors.keys() - mapping.keys()):
        raise CheckpointFileError(
            f"{tensors[extra[0]].shard.name} holds {extra[0]} ({len(extra)} such tensors), which {entry.name} does not "
            f"list; the folder mixes files of two checkpoints, or the index is stale."
        )
    return tensors


def safetensors_shard(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, from its header; checks that the file is as long as the header says."""
    header, start = _safetensors_header(path)
    tensors, end = {}, 0
    for name, entry in header.items():
        _check_entry(path, name, entry)
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointFileError(
                f"{path}: {name} is stored as {entry['dtype']}, which is not read; expected one of "
                f"{', '.join(DTYPES)}. Use the unquantised checkpoint."
            )
        tensors[name] = TensorInfo(name, path, tuple(entry["shape"]), dtype, start + entry["data_offsets"][0])
        end = max(end, entry["data_offsets"][1])
    size = path.stat().st_size
    if size != start + end:
        raise CheckpointFileError(
            f"{path} is {size} bytes long, its header says {start + end}: truncated or damaged; download it again."
        )
    _check_places(path, tensors, {name: header[name]["data_offsets"] for name in tensors})
    return tensors


def _check_places(path: Path, tensors: dict[str, TensorInfo], places: dict[str, list[int]]) -> None:
    """Each tensor has room for its shape, and they follow one another without gap or overlap."""
    for name, (begin, end) in places.items():
        if end - begin != tensors[name].bytes:
            raise CheckpointFileError(
                f"{path}: {name} of shape {list(tensors[name].shape)} takes {tensors[name].bytes} bytes, its place in "
                f"the file has {end - begin}; the header is damaged, download it again."
            )
    for (_, left), (right, _) in pairwise([(0, 0), *sorted(map(tuple, places.values()))]):
        if left != right:
            raise CheckpointFileError(
                f"{path}: one tensor ends at byte {left}, the next begins at {right}; the header is damaged, download "
                f"it again."
            )


def _check_entry(path: Path, name: str, entry: Any) -> None:
    whole = isinstance(entry, dict) and isinstance(entry.get("dtype"), str)
    for key in ("shape", "data_offsets"):
        numbers = entry.get(key) if whole else None
        whole = isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
    if not whole or len(entry["data_offsets"]) != 2 or len(entry["shape"]) > _MAX_DIMENSIONS:
        raise CheckpointFileError(
            f"{path}: the header's entry of {name} is {reprlib.repr(entry)}, which describes no tensor of a model (a "
            f"dtype, at most {_MAX_DIMENSIONS} dimensions, two data_offsets); the file is damaged, or no checkpoint."
        )


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's entries by tensor name, and the first byte after it."""
    _require_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise CheckpointFileError(
                f"{path} ({size} bytes) has no whole safetensors header, which would take {length} bytes after the "
                f"first 8: truncated or damaged; download it again."
            )
        if length > MAX_HEADER:
            raise CheckpointFileError(
                f"{path} has a header of {length} bytes, and at most {MAX_HEADER} are read: no checkpoint holds that "
                f"many tensors. Split the file if this one does."
            )
        try:
            return _header_entries(file.read(length)), 8 + length
        except ValueError as error:
            raise CheckpointFileError(f"{path} has a damaged safetensors header: {error}.") from error


def _header_entries(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise ValueError(f"it begins with {text[:8]!r}, not with an opening brace")
    header = parse_json(text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"its __metadata__ is {reprlib.repr(metadata)}, which is no mapping of texts to texts")
    return header


def _require_file(path: Path) -> None:
    """`CheckpointFileError` where there is nothing, or a folder, a pipe or a device, which could be read for ever."""
    if not os.path.lexists(path):
        raise CheckpointFileError(f"the shard {path} is missing; download it again.")
    if not os.path.isfile(path):
        raise CheckpointFileError(f"the shard {path} is no file, or a link to none; download it again.")


def load_pickle(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of one pickle, memory-mapped where its format allows, with `weights_only=True`."""
    _require_file(path)
    _refuse_compressed(path)
    for mmap in (True, False):
        try:
            held = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
            break
        except RuntimeError as error:
            if "weights_only=True" in str(error):
                raise _more_than_tensors(path, error) from error
            if not mmap or "mmap" not in str(error):
                raise CheckpointFileError(f"{path} cannot be read: {error}.") from error
        except UnpicklingError as error:
            raise _more_than_tensors(path, error) from error
        except Exception as error:  # torch raises whatever the unpickler meets
            reason = f"{type(error).__name__} {error}".strip()
            raise CheckpointFileError(f"{path} cannot be read ({reason}): truncated or damaged.") from error
    if not isinstance(held, dict) or not all(isinstance(name, str) for name in held):
        raise CheckpointFileError(f"{path} holds a {type(held).__name__}, not a state dict.")
    tensors = {name: value.detach() for name, value in held.items() if isinstance(value, torch.Tensor)}
    for name, tensor in tensors.items():
        _require_stored(path, name, tensor)
    return tensors


def _refuse_compressed(path: Path) -> None:
    """PyTorch stores a pickle's parts as they are; compressed ones could unpack to any size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointFileError(f"{path} cannot be read ({error}): truncated or damaged.") from error
    if packed:
        raise UnsafeSourceError(
            f"{path} is compressed: {packed[0].filename} has {packed[0].compress_size} bytes and claims to unpack to "
            f"{packed[0].file_size}. torch.save stores its parts as they are; save it again with it."
        )


def _require_stored(path: Path, name: str, tensor: torch.Tensor) -> None:
    """`CheckpointFileError` for a tensor that is not simply there: sparse, quantised, or larger than its file."""
    size, held = path.stat().st_size, tensor.numel() * tensor.element_size()
    if tensor.layout != torch.strided or tensor.is_quantized or held > size:
        raise CheckpointFileError(
            f"{path} ({size} bytes) holds {name} of shape {list(tensor.shape)} in {tensor.dtype}, layout "
            f"{tensor.layout}: {held} bytes when read. Save it as a plain tensor."
        )


def _more_than_tensors(path: Path, error: Exception) -> UnsafeSourceError:
    """The error without torch's advice, which is to set `weights_only` to false."""
    found = re.search(r"GLOBAL [\w.]+|Unsupported operand \d+|legacy \.tar format|TorchScript archives", str(error))
    return UnsafeSourceError(
        f"{path} holds more than tensors ({found[0] if found else 'no pickle of torch'}) and is not read: it could run "
        f"code. Ask its owner for safetensors, or for a plain state dict."
    )


def _pickle_shard(path: Path) -> dict[str, TensorInfo]:
    held = load_pickle(path, device="meta")
    return {name: TensorInfo(name, path, tuple(value.shape), value.dtype) for name, value in held.items()}


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in blocks of one MiB."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Name, SHA-256 and size in bytes of a file, as records hold them."""
    return {"name": path.name, "sha256": sha256_of(path), "bytes": path.stat().st_size}


def main_dtype(infos: Iterable[TensorInfo]) -> torch.dtype:
    """The dtype of most of the values of some tensors."""
    sizes: dict[torch.dtype, int] = {}
    for info in infos:
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "MAX_HEADER",
    "PICKLES",
    "SAFETENSORS",
    "TensorInfo",
    "describe_file",
    "list_tensors",
    "load_pickle",
    "main_dtype",
    "read_json",
    "require_files_beside",
    "require_pickle_allowed",
    "sha256_of",
]
