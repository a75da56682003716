"""The folders that the tests of this folder start from, made once for all of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import alibi_hf
from tests.builders import bloom, tokenizer
from tests.scratch import scratch_folder


@dataclass(frozen=True)
class Folders:
    """An upstream checkpoint with a tokenizer, what was converted of it, and a text."""

    source: Path
    converted: Path
    text: Path

    def copy(self, target: Path, folder: Path | None = None) -> Path:
        """Return a copy, of the source if nothing else is named."""
        return Path(shutil.copytree(folder or self.source, target))


def make_folders() -> Folders:
    """Return the folders, made anew."""
    root = scratch_folder("security-")
    source = tokenizer(bloom(root / "source", heads=4, raw={"seq_length": 64}))
    alibi_hf.convert(source, root / "converted", verify=False)
    text = root / "text.txt"
    text.write_text("The state of the union is tokens. " * 20, encoding="utf-8")
    return Folders(source, root / "converted", text)


__all__ = ["Folders", "make_folders"]
