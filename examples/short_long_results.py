"""`results.json` of `train_short_test_long.py`: which trainings are finished, and what they gave.

Only finished trainings are in it; it is replaced by one rename whenever another is. Results are added to only where
settings, text, versions and machine are the same.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alibi_hf.checkpoints.conversion import versions
from alibi_hf.checkpoints.writer import write_json
from alibi_hf.evaluation.machine import describe_machine
from short_long_training import Run

NAME = "results.json"
SCHEMA_VERSION = 1
PARTS = (("settings", dict), ("versions", dict), ("machine", dict), ("runs", list), ("step_costs", list))


@dataclass
class Results:
    """What has been found so far.

    Attributes:
        path: of the file.
        settings: those of the trainings, and a digest of the tokens.
        versions, machine: what ran, and where.
        runs: one entry a finished training, with what it cost and its `readings`.
        step_costs: of a training step, by encoding, length and attention implementation.
    """

    path: Path
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    step_costs: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def check(output: Path, overwrite: bool) -> None:
        """Refuse what is no folder, or holds results that cannot be read.

        Raises:
            ValueError: naming it.
        """
        if output.exists() and not output.is_dir():
            raise ValueError(f"{output} is not a folder; name another --output.")
        if not overwrite:
            _read(output / NAME)

    @classmethod
    def open(cls, output: Path, settings: dict[str, Any], overwrite: bool) -> Results:
        """Return the results in a folder, or none yet, which are then written to see that it can be done.

        Raises:
            ValueError: where they belong to other settings, naming the first that differs, with both values.
            OSError: where the folder cannot be written to.
        """
        new = cls(output / NAME, settings, versions(), describe_machine(settings["device"]))
        found = None if overwrite else _read(new.path)
        if found is None:
            new.save()
            return new
        for part in (name for name, kind in PARTS if kind is dict):
            before, now = found[part], getattr(new, part)
            for name in sorted({*before, *now}):
                if before.get(name) != now.get(name):
                    raise ValueError(
                        f"{new.path} was made with {name}={before.get(name)!r}, and this run has "
                        f"{name}={now.get(name)!r}; name another --output, or forget those results with --overwrite."
                    )
        new.runs, new.step_costs = found["runs"], found["step_costs"]
        return new

    def missing(self, runs: list[Run]) -> list[Run]:
        """Return those that are not finished."""
        finished = {(each["encoding"], each["length"], each["seed"]) for each in self.runs}
        return [run for run in runs if (run.encoding, run.length, run.seed) not in finished]

    def add(self, run: Run, figures: dict[str, Any]) -> None:
        """Keep a finished training."""
        self.runs.append({**asdict(run), **figures})
        self.runs.sort(key=lambda each: (each["seed"], each["length"], each["encoding"]))
        self.save()

    def save(self) -> None:
        """Write the file, all of it or nothing."""
        content = {name: value for name, value in vars(self).items() if name != "path"}
        written = write_json(self.path.with_name(f".{NAME}.partial"), {"schema_version": SCHEMA_VERSION, **content})
        os.replace(written, self.path)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        complete = found["schema_version"] == SCHEMA_VERSION and all(type(found[name]) is kind for name, kind in PARTS)
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{path} is not a file of results; name another --output, or replace it with --overwrite.")
    return found
