"""What a verification found: dataclasses, and the three files they are written to.

`verification.json` is for programs, `verification.md` and `verification.html` for people; all say the same.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from alibi_hf.compact import compact_json, finite
from alibi_hf.verification.page import as_page
from alibi_hf.verification.render import as_markdown, as_table

SCHEMA_VERSION = 1
PARTS = ("bias", "tensors", "layers", "model")
LAYERWISE = ("bias", "tensors", "layers")  # what proves a model too large to be run whole


def is_enough(parts: Collection[str]) -> bool:
    """True if `parts`, a choice of `PARTS`, can prove: bias, tensors, and the model whole or layer by layer."""
    return {"bias", "tensors"} <= set(parts) and bool({"layers", "model"} & set(parts))


@dataclass(frozen=True)
class Check:
    """One comparison with the truth.

    Attributes:
        name: what was compared.
        dtype: dtype of the computation.
        length: tokens a row, 0 where it means nothing.
        ours: our error in `metric`, in the unit of the values compared; None if there is no number.
        upstream: upstream's own error against the same truth; None where upstream is itself what we compare with.
        limit: the largest `ours` that passes; None if the line is shown and not gated.
        passed: False fails the verdict; a line that is not gated is True.
        metric: "max" or "rms", the figure that is gated; "differ" counts what is not equal.
        detail: all figures, by "ours" and "upstream": max, rms, kl (nats), argmax (share of positions that agree).
        note: what a reader has to know.
        layer: the layer that was compared by itself, from 0; None where it is not one layer.
    """

    name: str
    dtype: str
    length: int
    ours: float | None
    upstream: float | None
    limit: float | None
    passed: bool
    metric: str = "max"
    detail: dict[str, dict[str, float | None]] = field(default_factory=dict)
    note: str = ""
    layer: int | None = None


@dataclass(frozen=True)
class Control:
    """A conversion made wrong on purpose. `caught` is True if `check` refuses it, as it must."""

    name: str
    check: str
    error: float
    limit: float
    caught: bool


@dataclass(frozen=True)
class BiasSample:
    """The bias of the last of `length` tokens in float32, at a few distances, for the page; none where not checked.

    Attributes:
        length: tokens of the row, without padding.
        distances: tokens between the query and each key, ascending from 1, `[n]`.
        ours, upstream: the bias there, relative to that of the query's own key, `[heads][n]`.
    """

    length: int
    distances: list[int]
    ours: list[list[float]]
    upstream: list[list[float]]


@dataclass(frozen=True)
class Verification:
    """The result of `verify`: proved if every check passed and every wrong conversion was caught.

    `parts` says what was checked; `bias` is None where the bias was not.
    """

    source: str
    output: str
    family: str
    reference: dict[str, str]
    text: str
    checks: list[Check]
    negative_controls: list[Control]
    versions: dict[str, str]
    seconds: float = 0.0
    parts: tuple[str, ...] = PARTS
    bias: BiasSample | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def proved(self) -> bool:
        """True if enough was checked, with controls, and all of it came out as it must."""
        checks, controls = self.checks, self.negative_controls
        if not (checks and controls and is_enough(self.parts)):
            return False
        return all(c.passed for c in checks) and all(c.caught for c in controls)

    @property
    def verdict(self) -> str:
        """ "proved" or "not proved"."""
        return "proved" if self.proved else "not proved"

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `verification.json`; numbers that are not finite become null."""
        return finite({"schema_version": SCHEMA_VERSION, "verdict": self.verdict, **asdict(self)})

    def table(self) -> Table:
        """Return the table that the command line prints."""
        return as_table(self)

    def save(self, directory: str | os.PathLike) -> Path:
        """Write `verification.json`, `.md` and `.html` to `directory` and return the path of the second."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "verification.json").write_text(compact_json(self.to_dict()), encoding="utf-8")
        (folder / "verification.md").write_text(as_markdown(self), encoding="utf-8")
        (folder / "verification.html").write_text(as_page(self), encoding="utf-8")
        return folder / "verification.md"
