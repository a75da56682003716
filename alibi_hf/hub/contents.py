"""What of a folder goes to the Hub: what the model needs and the reports about it; anything else stays, with a reason.

The list is of what goes, not of what stays: a file that nobody thought of is not published.
"""

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alibi_hf.checkpoints.carried import CARRIED
from alibi_hf.checkpoints.shards import SAFETENSORS, list_tensors
from alibi_hf.errors import CheckpointFileError
from alibi_hf.hub.card import CARD

CONFIG, CODE = "config.json", "*_alibi.py"
MODEL = (CONFIG, "generation_config.json", *CARRIED, "NOTICE*", CODE)
REPORTS = (
    CARD,
    "conversion.json",
    *(f"verification.{kind}" for kind in ("json", "md", "html")),
    *(f"retrofit.{kind}" for kind in ("json", "md")),
    "training.json",
    *(f"{report}.{kind}" for report in ("evaluation", "reach") for kind in ("json", "csv", "html")),
    "positions.csv",
    "*.png",
    "*.svg",
)
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
# What an earlier push may have left on the Hub: loaded in the place of what goes now, or a record of other weights.
_REPLACED = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|[a-z]+_alibi\.py|"
    r"adapter_config\.json|(conversion|retrofit|verification)\.(json|md|html)"
)


@dataclass(frozen=True)
class Entry:
    """A file that goes, by its path in the folder, and its size."""

    name: str
    bytes: int


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that stays, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Contents:
    """A folder divided into what goes and what stays.

    Attributes:
        folder: the folder.
        files: what goes, by name.
        left_out: what stays, by name.
        weights: the names of the weight files among `files`, without the index.
    """

    folder: Path
    files: list[Entry]
    left_out: list[LeftOut]
    weights: list[str]

    @property
    def bytes(self) -> int:
        """Size of what goes."""
        return sum(entry.bytes for entry in self.files)

    @property
    def names(self) -> set[str]:
        """The names of what goes."""
        return {entry.name for entry in self.files}

    def path(self, name: str) -> Path:
        """Where a file is."""
        return self.folder / name

    def to_dict(self) -> dict[str, Any]:
        """The two lists, as reports hold them."""
        return {"files": [asdict(entry) for entry in self.files], "left_out": [asdict(e) for e in self.left_out]}


def list_contents(folder: Path) -> Contents:
    """Divide a folder; what is needed and missing, or a link to elsewhere, is refused.

    Raises:
        CheckpointFileError: where weights are missing or damaged, index and shards disagree, or a needed file is a link
            out of the folder.
        UnsafeSourceError: where the weights are pickles.
    """
    weights = sorted({info.shard.name for info in list_tensors(folder).values()})
    index = [] if SAFETENSORS[1] in weights else [SAFETENSORS[0]]
    chosen = {*weights, *index, *_matching(folder, MODEL), *_matching(folder, REPORTS)}
    left_out = [LeftOut(name, reason) for name in sorted(_entries(folder)) if (reason := _reason(folder, name, chosen))]
    stays = {entry.name: entry.reason for entry in left_out}
    if lost := sorted({*weights, *index, CONFIG} & stays.keys()):
        raise CheckpointFileError(f"{folder / lost[0]} is {stays[lost[0]]}; put the file itself there (cp -L).")
    files = [Entry(name, (folder / name).stat().st_size) for name in sorted(chosen - stays.keys())]
    return Contents(folder, files, left_out, weights)


def stale(names: list[str], contents: Contents) -> list[str]:
    """Of the `names` on the Hub, the weights, code files and records that the folder no longer has."""
    return sorted(name for name in names if _REPLACED.fullmatch(name) and name not in contents.names)


def stage(contents: Contents, target: Path) -> None:
    """Put links to what goes into `target`, which is made; copies where the system allows no links."""
    for entry in contents.files:
        link, source = target / entry.name, contents.path(entry.name).resolve()
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(source)
        except OSError:
            shutil.copyfile(source, link)


def _matching(folder: Path, patterns: tuple[str, ...]) -> set[str]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix() for path in found if path.suffix not in PICKLES}


def _entries(folder: Path) -> set[str]:
    """Every file beside config.json, folders as one, and what is in the one folder that goes."""
    inner = folder / "additional_chat_templates"
    found = [*folder.iterdir(), *(inner.iterdir() if inner.is_dir() else ())]
    return {path.relative_to(folder).as_posix() for path in found if path != inner}


def _reason(folder: Path, name: str, chosen: set[str]) -> str:
    """Why a file stays; "" where it goes."""
    path = folder / name
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        return "a link out of the folder"
    if Path(name).name.startswith("."):
        return "hidden"
    if name in chosen:
        return ""
    if path.is_dir():
        return "a folder"
    if path.suffix in PICKLES:
        return "a pickle, which can run code when it is read"
    if path.suffix == ".safetensors":
        return "no part of these weights"
    return "neither model nor report"


__all__ = ["CODE", "CONFIG", "Contents", "Entry", "LeftOut", "list_contents", "stage", "stale"]
