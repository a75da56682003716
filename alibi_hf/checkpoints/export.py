"""`export`: a folder in this package's layout back to one that other programs read.

* "bloom", "mpt", "falcon": Transformers' own classes. "llm-foundry": MPT's other config, for vLLM, TGI and llama.cpp's
  converter. "gguf": one file for llama.cpp.
* What a target cannot hold is refused by the name of the field, before anything is written.
* One tensor is held at a time. The folder appears by one rename; an error leaves nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from alibi_hf.checkpoints.carried import carried_bytes
from alibi_hf.checkpoints.conversion import own_command, versions
from alibi_hf.checkpoints.export_folder import plan_folder
from alibi_hf.checkpoints.export_gguf import plan_gguf
from alibi_hf.checkpoints.export_source import Converted
from alibi_hf.checkpoints.options import SLACK, Progress, keep_apart
from alibi_hf.checkpoints.writer import appearing, check_disk, parse_size, write_json
from alibi_hf.errors import ConfigFieldError

SCHEMA_VERSION = 1
FILE = "export.json"
TARGETS = ("bloom", "mpt", "llm-foundry", "falcon", "gguf")


@dataclass
class Export:
    """What was exported, from which files, to which.

    Attributes:
        output_path: the folder that was written.
        target: what it was exported to, one of `TARGETS`.
        architecture: upstream's class, or GGUF's architecture.
        source: path and files (name, sha256, bytes).
        output: files (name, sha256, bytes) of the weights.
        tensors: source names, target name, rule and fate ("used" or "padded") of every tensor.
        config: our config ("from") and the target's ("to").
        notes: what a reader of the output should know, one sentence each.
        versions: of Python and the packages that took part.
        command: what was run.
    """

    output_path: Path
    target: str
    architecture: str
    source: dict[str, Any]
    output: dict[str, Any]
    tensors: list[dict[str, Any]]
    config: dict[str, Any]
    notes: list[str]
    versions: dict[str, str]
    command: str

    def to_dict(self) -> dict[str, Any]:
        """The content of `export.json`."""
        shown = {name: value for name, value in vars(self).items() if name != "output_path"}
        return {"schema_version": SCHEMA_VERSION, **shown}

    def save(self, directory: str | Path) -> Path:
        """Write `export.json` into `directory` and return its path."""
        return write_json(Path(directory) / FILE, self.to_dict())


class Plan(Protocol):
    """What will be written; making it refuses what cannot be, writing it no longer does."""

    @property
    def architecture(self) -> str:
        """Upstream's class, or GGUF's architecture."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """Upstream's config.json, or GGUF's keys."""
        ...

    @property
    def notes(self) -> list[str]:
        """What a reader of the output should know."""
        ...

    @property
    def bytes(self) -> int:
        """Size of the weights in bytes."""
        ...

    def tensors(self) -> list[dict[str, Any]]:
        """Source names, target name, rule and fate of every tensor."""
        ...

    def write(self, folder: Path, progress: Progress | None) -> list[dict[str, Any]]:
        """Write weights, tokenizer and config into `folder`; name, sha256 and bytes of every weight file."""
        ...


def export(
    folder: str | Path,
    output: str | Path,
    to: str,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    tokenizer: bool = True,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Export:
    """Write a converted, fine-tuned or newly trained folder in the layout of `to`.

    What came from that layout goes back bit for bit, with upstream's own config.json where our config still says the
    same. Biases that the target has and the source lacks are written as zeros, which changes nothing.

    Args:
        folder: a folder in this package's layout, from `convert` or `save_pretrained`.
        output: the folder to write; must be absent or empty unless `overwrite`.
        to: "bloom", "mpt", "llm-foundry", "falcon" or "gguf".
        dtype: of the written weights, "float32", "bfloat16", "float16", for GGUF "q8_0" too; None keeps what is stored.
        max_shard_size: the most bytes of one weight file, a number or "5GB"; a GGUF file is always one.
        overwrite: replace what is in `output`.
        tokenizer: for GGUF, write the folder's tokenizer into the file; without one it takes token ids only.
        allow_nonfinite: take NaN and Inf weights as they are.
        progress: called with what is being done, bytes done and bytes in all.
        command: what to write down as the command; the process's own if not given.

    Raises:
        ConfigFieldError: naming a field that the target cannot hold, with what it can.
        AlibiError: its other subclasses, about the folder, its tensors, the tokenizer, the output or the disk. Nothing
            is left behind then.
    """
    if to not in TARGETS:
        raise ConfigFieldError(f"to={to!r} is no target; choose one of {', '.join(TARGETS)}.")
    out = Path(output).expanduser()
    source = Converted.open(folder)
    keep_apart(source.path, out)
    source.check_tie()
    carried = source.carried_files()  # refused before the weights are written
    plan: Plan
    if to == "gguf":
        plan = plan_gguf(source, dtype, tokenizer, allow_nonfinite)
    else:
        plan = plan_folder(source, to, dtype, parse_size(max_shard_size), allow_nonfinite)
    with appearing(out, overwrite) as partial:
        check_disk(partial, plan.bytes + (0 if to == "gguf" else carried_bytes(source.path, carried)) + SLACK)
        files = plan.write(partial, progress)
        report = Export(
            output_path=out,
            target=to,
            architecture=plan.architecture,
            source={"path": str(folder), "files": source.sha256()},
            output={"files": files},
            tensors=plan.tensors(),
            config={"from": json.loads(source.config.to_json_string()), "to": plan.config},
            notes=plan.notes,
            versions=versions(),
            command=command or own_command(),
        )
        report.save(partial)
    return report


__all__ = ["FILE", "TARGETS", "Export", "export"]
