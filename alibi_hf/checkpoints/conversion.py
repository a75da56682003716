"""`Conversion`: the record of one conversion, as `conversion.json` holds it."""

import importlib.metadata
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.checkpoints.source_card import read_source_card
from alibi_hf.checkpoints.writer import write_json
from alibi_hf.errors import redact
from alibi_hf.families._fields import defaults_used

SCHEMA_VERSION = 1
FILE = "conversion.json"
CONFIG = "config.json"
_PACKAGES = ("alibi-hf", "torch", "transformers", "safetensors", "huggingface_hub")


@dataclass
class Conversion:
    """What was converted, from which files, to which, and whether it was proved.

    Attributes:
        output_path: the folder that was written.
        source: path_or_id, revision, family, files (name, sha256, bytes), and what its card says of licence, language
            and data.
        output: files (name, sha256, bytes) of the weights.
        tensors: source, target names, rule, fate and reason of every tensor.
        config: upstream's config ("from"), ours ("to") and the defaults that upstream's code fills in ("defaults").
        notes: what a reader should know about the source, one sentence each.
        versions: of Python and the packages that took part.
        command: what was run.
        verified: True, False, or None where no verification was run.
        verification: the result of it, if one was run; not part of `conversion.json`.
    """

    output_path: Path
    source: dict[str, Any]
    output: dict[str, Any]
    tensors: list[dict[str, Any]]
    config: dict[str, Any]
    notes: list[str]
    versions: dict[str, str]
    command: str
    verified: bool | None = None
    verification: Any = None

    def to_dict(self) -> dict[str, Any]:
        """The content of `conversion.json`."""
        shown = {name: value for name, value in vars(self).items() if name not in ("output_path", "verification")}
        return {"schema_version": SCHEMA_VERSION, **shown}

    def save(self, directory: str | Path) -> Path:
        """Write `conversion.json` into `directory` and return its path."""
        return write_json(Path(directory) / FILE, self.to_dict())


def fates(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Source, target names, rule, fate and reason of every tensor.

    One that our config holds is used, too; the reason of one put together says how.
    """
    return [
        {
            "source": group.source,
            "target": [f"{CONFIG}: {name}" if group.fate == "config" else name for name in group.targets],
            "rule": group.rule.describe(),
            "fate": "used" if group.fate == "config" else group.fate,
            "reason": group.rule.reason or checkpoint.tensors[group.source].origin,
        }
        for group in checkpoint.groups
    ]


def record(
    checkpoint: Checkpoint, out: Path, files: list[dict[str, Any]], command: str | None, workers: int = 1
) -> Conversion:
    """The `Conversion` of a checkpoint whose weights went to `files`; `workers` threads hash the source."""
    return Conversion(
        output_path=out,
        source={
            "path_or_id": checkpoint.source,
            "revision": checkpoint.revision,
            "family": checkpoint.family_name,
            "files": checkpoint.sha256(workers),
            "card": read_source_card(checkpoint.path),
        },
        output={"files": files},
        tensors=fates(checkpoint),
        config={
            "from": checkpoint.raw,
            "to": json.loads(checkpoint.config.to_json_string()),
            "defaults": defaults_used(checkpoint.raw, checkpoint.family.FIELDS),
        },
        notes=checkpoint.notes,
        versions=versions(),
        command=command or own_command(),
    )


def own_command() -> str:
    """The command line of this process, without the folders of the program, and without tokens."""
    return redact(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))


def versions() -> dict[str, str]:
    """Version of Python and of every package that takes part in a conversion."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
            found[package] = "not installed"
    return found


__all__ = ["FILE", "Conversion", "fates", "own_command", "record", "versions"]
