"""Folders for what several tests share, such as a converted checkpoint; gone when the process ends."""

import tempfile
from pathlib import Path

_ROOT = tempfile.TemporaryDirectory(prefix="alibi-hf-tests-")


def scratch_folder(prefix: str = "") -> Path:
    """Return a new empty folder."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=_ROOT.name))
