"""The environments of the matrix: which there are, and how each is made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCH = "2.13.0"
OLDEST, NEWEST = "5.17.0", "5.23.0"
HUB = {OLDEST: "1.33.0", NEWEST: "2.4.0"}  # of huggingface_hub; the others take the newest that they allow
WITH_OLD_PYTHON = "5.20.2"  # the last Transformers for Python 3.10


@dataclass(frozen=True)
class Environment:
    """Torch and Transformers, and nothing of this package, for one Python (None: the one that runs this)."""

    transformers: str
    torch: str = TORCH
    python: str | None = None

    @property
    def folder(self) -> Path:
        """Where it lives, beside `.venv`."""
        torch = "" if self.torch == TORCH else f"-torch{self.torch}"
        return ROOT / f".venv-matrix-{self.transformers}{torch}{f'-{self.python}' if self.python else ''}"

    @property
    def requirements(self) -> tuple[str, ...]:
        """What pip is asked for."""
        wanted = (f"torch=={self.torch}", f"transformers=={self.transformers}")
        hub = HUB.get(self.transformers)
        return (*wanted, f"huggingface_hub=={hub}") if hub else wanted

    def missing(self) -> str | None:
        """Return why it cannot be made here; None if it can."""
        if self.python is not None and shutil.which(self.python) is None:
            return f"{self.python} is not on the path"
        old = self.python is None and sys.version_info < (3, 11)
        if old and tuple(map(int, self.transformers.split("."))) >= (5, 21):
            return f"Transformers {self.transformers} needs Python 3.11"
        return None

    def make(self) -> Path:
        """Make it if it is not there, and return its Python."""
        return make(self.folder, self.requirements, self.python or sys.executable)


# CPU builds of torch are at hand for the first two; with the others pip may draw gigabytes of CUDA libraries.
QUICK = (Environment(OLDEST), Environment(NEWEST))
FULL = (
    *QUICK,
    *map(Environment, ("5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2")),
    *(Environment(version, torch="2.11.0") for version in (OLDEST, NEWEST)),
    Environment(WITH_OLD_PYTHON, python="python3.10"),
    *(Environment(NEWEST, python=f"python3.{minor}") for minor in (12, 13)),
)


def make(folder: Path, requirements: Sequence[str], python: str) -> Path:
    """Make a virtual environment with `requirements`, unless it has them already, and return its Python.

    All else comes in the versions of constraints.txt.
    """
    found, stamp = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(requirements)
    if stamp.exists() and stamp.read_text() == wanted:
        return found
    shutil.rmtree(folder, ignore_errors=True)
    run([python, "-m", "venv", str(folder)])
    asked = {line.split("==")[0] for line in requirements}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(line for line in lines if line.split("==")[0] not in asked))
    run([*pip(found), "install", "-q", "--no-compile", "-c", str(constraints), *requirements])
    stamp.write_text(wanted)
    return found


def pip(python: Path) -> list[str]:
    """Return how pip of an environment is called."""
    return [str(python), "-m", "pip", "--disable-pip-version-check"]


def run(command: Sequence[str], **kwargs: object) -> str:
    """Run a program, and return what it printed; where it fails, stop with what it said."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **kwargs)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout
