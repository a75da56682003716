"""The journal of a conversion, so that a run that was cut off can be continued.

It lies in the working folder and names the source's files, the options and every finished shard with its SHA-256. Going
on needs the same source and the same options; a finished shard that no longer has its hash is written again.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.checkpoints.reading import FileState, require_same
from alibi_hf.checkpoints.shards import sha256_of
from alibi_hf.checkpoints.writer import JOURNAL
from alibi_hf.errors import CheckpointFileError

SCHEMA_VERSION = 1
_AGAIN = "--overwrite (overwrite=True) starts again"


class Journal:
    """What a run is made from, and which shards are finished.

    Args:
        folder: the working folder.
        files: state of every source file.
        options: whatever else decides what is written.
    """

    def __init__(self, folder: Path, files: list[FileState], options: dict[str, Any]) -> None:
        self.folder, self.files = folder, files
        self.plan = {"files": [asdict(state) for state in files], "options": json.loads(json.dumps(options))}
        self.finished: dict[str, dict[str, Any]] = {}
        self._lock = Lock()

    def read(self) -> None:
        """Take over the finished shards of a run that was cut off, if there was one.

        Raises:
            CheckpointFileError: with both values where that run had another source or other options.
        """
        path = self.folder / JOURNAL
        if not path.exists():
            return
        left = read_json(path)
        try:
            files = {entry["name"]: FileState(**entry) for entry in left["plan"]["files"]}
            options = dict(left["plan"]["options"])
            finished = {str(entry["name"]): {**entry} for entry in left["finished"]}
            if not all(isinstance(entry.get("bytes", 0), int) for entry in finished.values()):
                raise TypeError("bytes that are no number")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointFileError(f"{path} is no journal of this version; {_AGAIN}.") from error
        now = {entry["name"]: FileState(**entry) for entry in self.plan["files"]}
        for name in sorted(files.keys() | now.keys()):
            _need_same(f"the source's {name}", files.get(name), now.get(name))
        for name in sorted(options.keys() | self.plan["options"].keys()):
            _need_same(name, options.get(name), self.plan["options"].get(name))
        self.finished = finished

    @property
    def bytes(self) -> int:
        """Bytes of the finished shards."""
        return sum(file.get("bytes", 0) for file in self.finished.values())

    def require_same_source(self, source: Path) -> None:
        """`CheckpointFileError` where a file of the source is no longer what it was when the run started."""
        for state in self.files:
            require_same(source / state.name, state)

    def write(self) -> None:
        """Write the journal, whole or not at all."""
        made = {"schema_version": SCHEMA_VERSION, "plan": self.plan, "finished": list(self.finished.values())}
        path = self.folder / JOURNAL
        new = path.with_suffix(".new")
        new.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
        os.replace(new, path)

    def add(self, file: dict[str, Any]) -> None:
        """Write down a finished shard: its name, SHA-256 and bytes."""
        with self._lock:
            self.finished[file["name"]] = file
            self.write()

    def intact(self, name: str) -> dict[str, Any] | None:
        """What was written down about a shard if it is finished and its bytes still have that hash, else None."""
        file, path = self.finished.get(name), self.folder / name
        if file is None or not path.is_file() or path.stat().st_size != file.get("bytes"):
            return None
        return file if sha256_of(path) == file.get("sha256") else None


def _need_same(what: str, before: Any, now: Any) -> None:
    if before != now:
        raise CheckpointFileError(
            f"{what} is not as in the run that was cut off: {_words(before)} then, {_words(now)} now. Use the same to "
            f"go on; {_AGAIN}."
        )


def _words(value: Any) -> str:
    return "not there" if value is None else str(value)


__all__ = ["Journal"]
