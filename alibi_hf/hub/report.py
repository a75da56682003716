"""`Push`: the record of one push, as `push.json` holds it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alibi_hf.checkpoints.writer import write_json
from alibi_hf.hub.contents import Entry, LeftOut
from alibi_hf.hub.preflight import Agreement
from alibi_hf.hub.upload import Uploaded

SCHEMA_VERSION = 1
FILE = "push.json"


@dataclass
class Push:
    """What was pushed where, or with `dry_run` would be.

    Attributes:
        folder: what was pushed.
        repo_id: where to.
        class_name: the class that the folder was saved from.
        verdict: "proved", or why it is not.
        files: name and bytes of what goes.
        left_out: name of what stays, and why.
        preflight: what the folder's own code and this package gave alike, bit for bit.
        notes: what to know before others read it, one sentence each.
        dry_run: nothing was sent, and nobody asked.
        uploaded: commits, revision and address; None for a dry run.
        versions: of Python and the packages that took part.
        command: what was run.
    """

    folder: Path
    repo_id: str
    class_name: str
    verdict: str
    files: list[Entry]
    left_out: list[LeftOut]
    preflight: list[Agreement]
    notes: list[str]
    dry_run: bool
    uploaded: Uploaded | None
    versions: dict[str, str]
    command: str

    @property
    def bytes(self) -> int:
        """Size of what goes."""
        return sum(entry.bytes for entry in self.files)

    def to_dict(self) -> dict[str, Any]:
        """The content of `push.json`."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "folder": str(self.folder)}

    def save(self, directory: str | Path) -> Path:
        """Write `push.json` into `directory` and return its path; it is never pushed itself."""
        return write_json(Path(directory) / FILE, self.to_dict())


__all__ = ["FILE", "Push"]
