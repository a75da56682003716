"""`Reach`: what each head of a model looks at, as `reach.json` holds it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from alibi_hf.evaluation.bias_alone import BiasRounding

SCHEMA_VERSION = 1
COLLAPSED = 0.5  # of the mass of late queries
LEAST = 1e-3  # tokens: a head of a huge slope attends to nothing but its own token


@dataclass(frozen=True)
class HeadReach:
    """One head of one layer, in a text of one length. Every mean and share is over all queries, unless said.

    Attributes:
        layer, head, slope: which; the slope as the model uses it.
        mean_distance: the attention-weighted distance in tokens: the sum of weight times distance, mean over queries.
        bias_distance: what it would be if all keys were alike to the head, by its bias alone.
        distance_50, distance_90: the smallest distance within which half of the mass, and 90 % of it, lies.
        first_token: share of the mass on the first token of the text, 0 to 1.
        late_first_token: likewise, of the queries in the second half of the text only.
        own_token: share of the mass on the query's own token.
        entropy: of a query's weights, in nats.
        collapsed: True where `late_first_token` is above `COLLAPSED`: a head that looks away from the text.
        gap: G of the bound in `window_alibi.py`, in nats; None where nothing is proved (see `LengthReach.plans`).
        window: keys farther away, in tokens, provably cannot matter; the length of the text where every key may.
        saved: share of all causal pairs of query and key that are farther away than that.
        planned: share of the pairs that sdpa on CPU leaves out, where windows are shared by groups of heads and rounded
            up to tiles, and left alone where they save too little.
    """

    layer: int
    head: int
    slope: float
    mean_distance: float
    bias_distance: float
    distance_50: int
    distance_90: int
    first_token: float
    late_first_token: float
    own_token: float
    entropy: float
    collapsed: bool
    gap: float | None
    window: int
    saved: float
    planned: float

    @property
    def over_bias(self) -> float:
        """`mean_distance` over `bias_distance`; of each, less than `LEAST` tokens count as that."""
        return max(self.mean_distance, LEAST) / max(self.bias_distance, LEAST)


@dataclass(frozen=True)
class LengthReach:
    """All heads in the first `length` tokens of the text.

    Attributes:
        heads: layer after layer.
        rounding: what 16 bits leave of each head's bias; the heads of all layers have the same.
        plans: how sdpa on CPU uses the windows, and why, a line a layer.
        seconds: of computing.
        peak_bytes: the most memory of the process (or of the GPU) meanwhile, weights included; None where it could not
            be measured.
    """

    length: int
    heads: list[HeadReach]
    rounding: list[BiasRounding]
    plans: list[str]
    seconds: float
    peak_bytes: int | None = None

    @property
    def mean_distance(self) -> float:
        """Mean over all heads, in tokens."""
        return sum(head.mean_distance for head in self.heads) / len(self.heads)

    @property
    def saved(self) -> float:
        """Share of all causal pairs, of all heads, outside the windows."""
        return sum(head.saved for head in self.heads) / len(self.heads)

    @property
    def planned(self) -> float:
        """Share of the pairs that sdpa on CPU leaves out, over all heads."""
        return sum(head.planned for head in self.heads) / len(self.heads)

    @property
    def collapsed(self) -> list[HeadReach]:
        """The heads that look at little but the first token."""
        return [head for head in self.heads if head.collapsed]


@dataclass(frozen=True)
class Reach:
    """What each head of a model looks at.

    Attributes:
        path_or_id, revision: where the model was loaded from.
        model: class, parameters, layers, heads, key_value_heads, head_dim, trained_length and the config's fields about
            distances and windows.
        dtype, device: of the computation; the windows are those of the dtype.
        text: name, sha256, bytes and characters of each file.
        lengths: by length, ascending.
        notes: what a reader has to know, such as a length that was left out, and why.
        machine: processor, threads, and GPU if one was used.
        versions: of Python and the packages that took part.
        command: what was run.
        seconds: of all.
    """

    path_or_id: str
    revision: str | None
    model: dict[str, Any]
    dtype: str
    device: str
    text: list[dict[str, Any]]
    lengths: list[LengthReach]
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    seconds: float = 0.0

    @property
    def longest(self) -> LengthReach:
        """What was found at the longest length."""
        return self.lengths[-1]

    def to_dict(self) -> dict[str, Any]:
        """The content of `reach.json`; every number is finite."""
        found = asdict(self)
        for entry, length in zip(found["lengths"], self.lengths, strict=True):
            entry |= {name: getattr(length, name) for name in ("mean_distance", "saved", "planned")}
        return {"schema_version": SCHEMA_VERSION, **found}

    def table(self) -> RenderableType:
        """Return the tables that the command line prints."""
        from alibi_hf.evaluation.reach_table import as_table

        return as_table(self)

    def save(self, directory: str | os.PathLike) -> Path:
        """Write `reach.json`, `reach.csv`, `reach.html` and `reach.png` to `directory`; return the path of the first.

        The picture, and figures of the page, need matplotlib; without it there is no `reach.png`.
        """
        from alibi_hf.evaluation.reach_files import write_files

        return write_files(self, Path(directory))


__all__ = ["COLLAPSED", "SCHEMA_VERSION", "HeadReach", "LengthReach", "Reach"]
