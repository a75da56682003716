"""BLOOM as Megatron-DeepSpeed saved it: one pickle a layer and tensor-parallel rank, put together while reading.

* `layer_03-model_01-model_states.pt` is rank 1 of the first layer; 01 holds the embedding and its norm, the last number
  the last norm. The names inside lack the layer, and a config.json of the Hub's kind has to lie beside the files.
* Matrices split by input columns are joined along dimension 1, everything else that is split along dimension 0.
* Norms and the biases of the two output projections are copies that drifted apart in training: their mean is taken, as
  the published checkpoints did, but in float64 and rounded once; equal copies stay as they are.

Source: Transformers before 5, `models/bloom/convert_bloom_original_checkpoint_to_pytorch.py`.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from alibi_hf.checkpoints.shards import PICKLES, SAFETENSORS, TensorInfo, load_pickle, require_pickle_allowed
from alibi_hf.errors import CheckpointFileError

PATTERN = "layer_*-model_*-model_states.pt"
_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt", re.ASCII)
_FIRST_LAYER = 3  # the number in the name of the first layer's files
_NAMES = {
    "word_embeddings.weight": "word_embeddings.weight",
    "word_embeddings.norm.weight": "word_embeddings_layernorm.weight",
    "word_embeddings.norm.bias": "word_embeddings_layernorm.bias",
    "weight": "ln_f.weight",
    "bias": "ln_f.bias",
}
_MEANS = re.compile(r"(layernorm\.(weight|bias)|ln_f\.(weight|bias)|(self_attention\.dense|dense_4h_to_h)\.bias)$")
_COLUMNS = re.compile(r"(self_attention\.dense|mlp\.dense_4h_to_h)\.weight$")
How = Literal["mean", "rows", "columns"]


@dataclass(frozen=True, kw_only=True)
class RankedTensor(TensorInfo):
    """A tensor that every rank's file has a part of.

    Attributes:
        stored: its name in the files.
        parts: the file of every rank, in order.
        how: "rows" or "columns" to join, "mean" of copies.
    """

    stored: str
    parts: tuple[Path, ...]
    how: How

    @property
    def files(self) -> tuple[Path, ...]:
        """As `TensorInfo.files`."""
        return self.parts

    @property
    def origin(self) -> str:
        """As `TensorInfo.origin`."""
        if len(self.parts) == 1:
            return f"{self.stored} in the file"
        done = {"mean": "copies, of which the float64 mean is taken", "rows": "rows", "columns": "columns"}[self.how]
        return f"{self.stored} in the files of {len(self.parts)} ranks: {done}"

    def assemble(self, held: Sequence[dict[str, Tensor]]) -> Tensor:
        """As `TensorInfo.assemble`."""
        parts = [part[self.stored] for part in held]
        if self.how == "mean":
            return _mean(parts)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=int(self.how == "columns"))


def _mean(copies: list[Tensor]) -> Tensor:
    if all(torch.equal(copies[0], copy) for copy in copies[1:]):
        return copies[0]
    return torch.stack([copy.double() for copy in copies]).mean(0).to(copies[0].dtype)


def layer_files(folder: Path) -> dict[int, dict[int, Path]]:
    """The files by layer number and rank; empty where there are none, or weights in a usual format as well."""
    if any(os.path.lexists(folder / name) for name in (*SAFETENSORS, *PICKLES)):
        return {}
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob(PATTERN)):
        if named := _FILE.fullmatch(path.name):
            ranks = found.setdefault(int(named[1]), {})
            if other := ranks.get(int(named[2])):
                raise CheckpointFileError(f"{other} and {path.name} are one layer and rank; remove the stale one.")
            ranks[int(named[2])] = path
    return found


def list_layer_files(folder: Path, allow_pickle: bool = False) -> dict[str, TensorInfo]:
    """Every tensor of the layer files, by BLOOM's name; the files are opened without their values.

    Raises:
        UnsafeSourceError: if `allow_pickle` is false.
        CheckpointFileError: where a rank's file is missing, or the ranks contradict each other.
    """
    files = layer_files(folder)
    require_pickle_allowed(folder, next(iter(files[min(files)].values())), allow_pickle)
    ranks = max(max(parts) for parts in files.values()) + 1
    tensors: dict[str, TensorInfo] = {}
    for number, parts in sorted(files.items()):
        if len(parts) < ranks:
            missing = next(rank for rank in range(ranks) if rank not in parts)
            raise CheckpointFileError(
                f"{folder} lacks layer_{number:02d}-model_{missing:02d}-model_states.pt; other layers have {ranks} "
                f"ranks. Download it."
            )
        for info in _layer(number, [parts[rank] for rank in range(ranks)]):
            if info.name in tensors:
                raise CheckpointFileError(
                    f"{info.shard.name} and {tensors[info.name].shard.name} both hold {info.name}; the "
                    f"folder mixes files of two checkpoints."
                )
            tensors[info.name] = info
    return tensors


def _layer(number: int, paths: list[Path]) -> list[RankedTensor]:
    """The tensors of one layer, from the headers of its files."""
    held = [load_pickle(path, device="meta") for path in paths]
    for path, names in zip(paths[1:], held[1:], strict=True):
        if differ := sorted(held[0].keys() ^ names.keys()):
            raise CheckpointFileError(
                f"{paths[0].name} and {path.name} disagree about {differ[0]}: only one holds it; download both again."
            )
    return [_ranked(number, stored, paths, [part[stored] for part in held]) for stored in held[0]]


def _ranked(number: int, stored: str, paths: list[Path], parts: list[Tensor]) -> RankedTensor:
    name = _bloom_name(number, stored, paths[0])
    how: How = "mean" if _MEANS.search(name) else "columns" if _COLUMNS.search(name) else "rows"
    joined = {"mean": -1, "rows": 0, "columns": 1}[how]
    kinds = {(part.dtype, *(size for dim, size in enumerate(part.shape) if dim != joined)) for part in parts}
    if len(kinds) > 1 or parts[0].dim() <= joined:
        shapes = [f"{list(part.shape)} {part.dtype}" for part in parts]
        raise CheckpointFileError(
            f"{stored} of {paths[0].name} and its other ranks do not fit together: {shapes}; download its files again."
        )
    shape = [sum(part.shape[dim] for part in parts) if dim == joined else n for dim, n in enumerate(parts[0].shape)]
    return RankedTensor(name, paths[0], tuple(shape), parts[0].dtype, stored=stored, parts=tuple(paths), how=how)


def _bloom_name(number: int, stored: str, path: Path) -> str:
    if stored in _NAMES:
        return _NAMES[stored]
    if number < _FIRST_LAYER:
        raise CheckpointFileError(
            f"{path} holds {stored}, which is a layer's, but layers begin with "
            f"layer_{_FIRST_LAYER:02d}; rename the files."
        )
    return f"h.{number - _FIRST_LAYER}.{stored}"


__all__ = ["PATTERN", "RankedTensor", "layer_files", "list_layer_files"]
