"""Exporting to a folder of config.json and safetensors that an upstream class loads."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from alibi_hf.checkpoints.carried import copy_carried
from alibi_hf.checkpoints.export_config import TARGETS, recorded, target_config
from alibi_hf.checkpoints.export_source import Converted
from alibi_hf.checkpoints.export_tensors import Item, Weights, make_items
from alibi_hf.checkpoints.options import Progress, cast, parse_dtype
from alibi_hf.checkpoints.plan import check_shapes, make_plan, meta_model
from alibi_hf.checkpoints.rules import Rule
from alibi_hf.checkpoints.writer import Entry, ShardWriter, write_json
from alibi_hf.model.configuration_alibi import AlibiConfig


@dataclass(frozen=True)
class FolderPlan:
    """A folder that will be written; see `Plan` of `alibi_hf.checkpoints.export`."""

    source: Converted
    weights: Weights
    items: list[Item]
    entries: list[Entry]
    dtype: torch.dtype | None
    max_bytes: int
    architecture: str
    config: dict[str, Any]
    notes: list[str]

    @property
    def bytes(self) -> int:
        """Size of the weights in bytes."""
        return sum(entry.bytes for entry in self.entries)

    def tensors(self) -> list[dict[str, Any]]:
        """As `Plan.tensors`."""
        return [item.to_dict() for item in self.items]

    def write(self, folder: Path, progress: Progress | None) -> list[dict[str, Any]]:
        """As `Plan.write`."""
        files = self._write_weights(ShardWriter(folder, self.entries, self.max_bytes), progress)
        copy_carried(self.source.path, self.source.carried_files(), folder)
        write_json(folder / "config.json", self.config)
        return files

    def _write_weights(self, writer: ShardWriter, progress: Progress | None) -> list[dict[str, Any]]:
        done = 0
        try:
            for item, entry in zip(self.items, self.entries, strict=True):
                writer.add(item.name, cast(item.name, self.weights.make(item, entry.dtype), self.dtype))
                done += entry.bytes
                if progress is not None:
                    progress("exporting", done, self.bytes)
            return writer.finish()
        finally:
            writer.close()


def plan_folder(
    source: Converted,
    to: str,
    dtype: str | torch.dtype | None,
    max_bytes: int,
    allow_nonfinite: bool,
) -> FolderPlan:
    """Make sure that the target can hold `source`, and list what will be written.

    Raises:
        ConfigFieldError: naming a field that the target cannot hold.
        TensorError: where the tensors would not be whole for the target.
    """
    raw, mapped, notes = target_config(source, to)
    target, wanted = TARGETS[to], parse_dtype(dtype)
    items = _items(source, target.family.rules(mapped), mapped)
    if recorded(source, to) is not None:
        items = _named_as_recorded(source, items)
    entries = [Entry(item.name, item.shape, wanted or _stored(source, item)) for item in items]
    groups = make_plan(target.family.rules(mapped), [entry.name for entry in entries], mapped.num_hidden_layers)
    check_shapes(groups, {entry.name: entry.shape for entry in entries}, mapped)
    _set_dtype(raw, str(wanted or source.dtype).removeprefix("torch."))
    return FolderPlan(
        source=source,
        weights=Weights(source, allow_nonfinite=allow_nonfinite),
        items=items,
        entries=entries,
        dtype=wanted,
        max_bytes=max_bytes,
        architecture=target.classes[source.class_name],
        config=raw,
        notes=notes,
    )


def _items(source: Converted, rules: list[Rule], mapped: AlibiConfig) -> list[Item]:
    if source.class_name == "AlibiForTokenClassification":  # whose head upstream calls `classifier`
        rules = [rule for rule in rules if rule.source != "score.weight"]
    expected = meta_model(mapped, source.class_name).state_dict()
    return make_items(rules, source, expected, mapped.num_hidden_layers)


def _named_as_recorded(source: Converted, items: list[Item]) -> list[Item]:
    """The items under the names that upstream's own files had: some have no "transformer." in front."""
    held = {row["source"] for row in source.record.get("tensors", [])}
    bare = [replace(item, name=item.name.removeprefix(item.rule.prefix)) for item in items]
    return [short if short.name in held else item for short, item in zip(bare, items, strict=True)]


def _stored(source: Converted, item: Item) -> torch.dtype:
    found = [source.tensors[name].dtype for name in item.sources if name in source.tensors]
    return found[0] if found else source.dtype


def _set_dtype(raw: dict[str, Any], dtype: str) -> None:
    """Say the dtype under the name that the config has for it."""
    raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = dtype


__all__ = ["FolderPlan", "plan_folder"]
