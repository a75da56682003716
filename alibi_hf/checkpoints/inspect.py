"""`inspect_checkpoint`: what a checkpoint is and what converting it takes; writes nothing.

Of the weight files only the headers are read, and the slopes where they are stored.
"""

import json
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from alibi_hf.checkpoints.conversion import fates
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.checkpoints.writer import write_json
from alibi_hf.families._layout import head_sizes
from alibi_hf.model.bias_alibi import config_slopes

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Inspection:
    """What an upstream checkpoint is.

    Attributes:
        source, revision, family: what was inspected.
        class_name: our class with the checkpoint's head.
        reference: the upstream class that it is verified against; `reference_note` where that is not Transformers'.
        position: the position scheme in words.
        notes: what else a reader should know, one sentence each.
        slopes: one a query head, as the model uses them.
        parameters: number of values, tied ones once.
        dtype: of most of the weights.
        files: name and bytes of every weight file.
        memory_to_load: bytes of the weights in that dtype.
        memory_to_convert: bytes of the largest tensor before and after conversion.
        cache_per_token: bytes of keys and values that one more token costs in that dtype.
        disk_to_convert: bytes of the converted weights.
        config: our config.
        tensors: source, target names, rule, fate and reason of every tensor, with shape and dtype.
    """

    source: str
    revision: str | None
    family: str
    class_name: str
    reference: str
    reference_note: str
    position: str
    notes: list[str]
    slopes: list[float]
    parameters: int
    dtype: str
    files: list[dict[str, Any]]
    memory_to_load: int
    memory_to_convert: int
    cache_per_token: int
    disk_to_convert: int
    config: dict[str, Any]
    tensors: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """The content of `inspection.json`."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def save(self, directory: str | Path) -> Path:
        """Write `inspection.json` into `directory` and return its path."""
        return write_json(Path(directory) / "inspection.json", self.to_dict())


def inspect_checkpoint(source: str | Path, revision: str | None = None, allow_pickle: bool = False) -> Inspection:
    """Family, position scheme, sizes, slopes, memory, disk and the fate of every tensor of a checkpoint.

    Args:
        source: a folder, or a Hub id.
        revision: branch, tag or commit of a Hub id.
        allow_pickle: read `pytorch_model*.bin` where there are no safetensors.

    Raises:
        AlibiError: its subclasses, as `Checkpoint.open`.
    """
    checkpoint = Checkpoint.open(source, revision=revision, allow_pickle=allow_pickle)
    config = checkpoint.config
    reference = checkpoint.family.reference(config)
    used = [checkpoint.tensors[group.source] for group in checkpoint.groups if group.fate == "used"]
    _, kv_heads, head_dim = head_sizes(config)
    cached = 2 * config.num_hidden_layers * kv_heads * head_dim
    return Inspection(
        source=checkpoint.source,
        revision=checkpoint.revision,
        family=checkpoint.family_name,
        class_name=checkpoint.class_name,
        reference=reference.class_name,
        reference_note=reference.reason,
        position=_position(checkpoint),
        notes=checkpoint.notes,
        slopes=[float(slope) for slope in config_slopes(config)],
        parameters=checkpoint.parameters,
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        files=[{"name": path.name, "bytes": path.stat().st_size} for path in checkpoint.shards],
        memory_to_load=checkpoint.parameters * checkpoint.dtype.itemsize,
        memory_to_convert=2 * max(info.bytes for info in used),
        cache_per_token=cached * checkpoint.dtype.itemsize,
        disk_to_convert=sum(info.bytes for info in used),
        config=json.loads(config.to_json_string()),
        tensors=_tensors(checkpoint),
    )


def _position(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    kind = "the slopes of config.json" if config.alibi_slopes else f"2^(-{config.alibi_bias_max} i / heads)"
    if any(group.fate == "config" for group in checkpoint.groups):
        kind = "the slopes stored in the checkpoint"
    if config.alibi_scaling is not None:
        kind += f" divided as alibi_scaling={config.alibi_scaling} says"
    return f"ALiBi, {config.alibi_distance} distance, {kind}, trained at {config.max_position_embeddings} tokens"


def _tensors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    rows = fates(checkpoint)
    for row in rows:
        info = checkpoint.tensors[row["source"]]
        row |= {"shape": list(info.shape), "dtype": str(info.dtype).removeprefix("torch."), "values": prod(info.shape)}
    return rows


__all__ = ["Inspection", "inspect_checkpoint"]
