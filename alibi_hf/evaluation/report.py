"""`Evaluation`: how well models read at each length, as `evaluation.json` holds it."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType

from alibi_hf.compact import finite
from alibi_hf.errors import AlibiError
from alibi_hf.evaluation.files import write_files
from alibi_hf.evaluation.table import as_table

SCHEMA_VERSION = 1
Protocol = Literal["non-overlapping", "sliding"]
PROTOCOLS: tuple[Protocol, ...] = ("non-overlapping", "sliding")


@dataclass(frozen=True)
class Span:
    """The loss of tokens whose position in their window is `start` to `stop - 1`.

    Attributes:
        loss: mean over all windows, in nats a token.
        tokens: how many were predicted.
    """

    start: int
    stop: int
    loss: float
    tokens: int


@dataclass(frozen=True)
class Reading:
    """One model read at one length by one protocol.

    Attributes:
        length: tokens of a window.
        protocol: "non-overlapping": consecutive windows, each token but a window's first is predicted, with what
            context its window gives it. "sliding": windows that overlap by all but `stride` tokens; only the last
            `stride` tokens of each are predicted, so that every one has at least `length - stride` tokens of context.
        stride: tokens from one window to the next.
        loss: mean in nats a token; None where the model failed.
        bits_per_byte: of the text that was predicted: to compare models with different tokenizers; None as `loss`.
        standard_error: of `loss`, over windows; None where there is one window.
        tokens, windows: how many tokens were predicted, in how many windows.
        spans: the loss by position in the window, in spans that double in width; of the sliding protocol none.
        seconds: of computing.
        peak_bytes: the most memory of the process (or of the GPU) meanwhile; None where it could not be measured.
        failure: why there is no number: the model's own error, or what was not finite and where; empty where it read.
    """

    length: int
    protocol: Protocol
    stride: int
    loss: float | None
    bits_per_byte: float | None
    standard_error: float | None
    tokens: int
    windows: int
    spans: list[Span]
    seconds: float
    peak_bytes: int | None
    failure: str = ""

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Reading:
        """Return the reading that `asdict`, or `to_dict` of its evaluation, was made of."""
        fields = {name: value for name, value in raw.items() if name != "perplexity"}
        return cls(**{**fields, "spans": [Span(**span) for span in raw["spans"]]})

    @property
    def perplexity(self) -> float | None:
        """exp(loss); infinite where that is past a float's range, None where the model failed."""
        if self.loss is None:
            return None
        return math.inf if self.loss >= 709 else math.exp(self.loss)


@dataclass(frozen=True)
class ModelEvaluation:
    """One model and its readings.

    Attributes:
        name: what tables and pictures call it, unlike any other of the evaluation.
        path_or_id, revision: where it was loaded from.
        model_class: the class that ran, such as "AlibiForCausalLM".
        positions: in words, such as "ALiBi", "RoPE (theta 10000)", "learned".
        trained_length: tokens it was trained at, as its config says; None where it does not.
        parameters: how many.
        dtype, device: of the computation.
        vocabulary: size of the tokenizer's.
        tokens: of the text, by its tokenizer.
        failure: why the model could not be read at all, at no length; empty where it could.
        readings: by length and protocol.
        notes: what a reader has to know, such as a length that was left out, and why.
    """

    name: str
    path_or_id: str
    revision: str | None
    model_class: str
    positions: str
    trained_length: int | None
    parameters: int
    dtype: str
    device: str
    vocabulary: int
    tokens: int
    failure: str = ""
    readings: list[Reading] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """Perplexity against length.

    Attributes:
        lengths: those asked for, ascending.
        text: name, sha256, bytes and characters of each file.
        models: one entry a model.
        notes: what a reader has to know about all of them.
        machine: processor, threads, and GPU if one was used.
        versions: of Python and the packages that took part.
        command: what was run.
        seconds: of all.
    """

    lengths: list[int]
    text: list[dict[str, Any]]
    models: list[ModelEvaluation]
    notes: list[str]
    machine: dict[str, Any]
    versions: dict[str, str]
    command: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The content of `evaluation.json`: the attributes, and the perplexity of each reading.

        Numbers that are not finite become null, as the perplexity of a loss past 709 does, whose loss says what it is.
        """
        shown = asdict(self)
        for model, entry in zip(self.models, shown["models"], strict=True):
            for reading, found in zip(model.readings, entry["readings"], strict=True):
                found["perplexity"] = reading.perplexity
        return finite({"schema_version": SCHEMA_VERSION, **shown})

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Evaluation:
        """Return the evaluation that `to_dict` was made of, as `evaluation.json` holds it.

        Raises:
            AlibiError: where it was written by another version.
        """
        if raw.get("schema_version") != SCHEMA_VERSION:
            raise AlibiError(
                f"the evaluation has schema_version {raw.get('schema_version')}, this version reads {SCHEMA_VERSION}; "
                "evaluate again."
            )
        fields = {name: value for name, value in raw.items() if name != "schema_version"}
        models = [
            ModelEvaluation(**{**model, "readings": [Reading.from_dict(reading) for reading in model["readings"]]})
            for model in fields["models"]
        ]
        return cls(**{**fields, "models": models})

    def table(self) -> RenderableType:
        """Return what the command line prints."""
        return as_table(self)

    def save(self, directory: str | os.PathLike) -> Path:
        """Write what was found to `directory`, which is made if need be, and return the path of the first file.

        `evaluation.json` and `evaluation.csv` (one row a model, protocol and length) hold all figures, `positions.csv`
        the loss by position; `evaluation.png` and the page `evaluation.html` show them. Without matplotlib the page has
        no figures, there is no picture, and both are said.
        """
        return write_files(self, Path(directory))


__all__ = ["PROTOCOLS", "SCHEMA_VERSION", "Evaluation", "ModelEvaluation", "Protocol", "Reading", "Span"]
