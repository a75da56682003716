"""What the verbs alike are given, and how it is read."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from alibi_hf.errors import CheckpointFileError, ConfigFieldError, redact
from alibi_hf.verification.report import LAYERWISE, PARTS

Source = Annotated[str, typer.Argument(help="A folder in an upstream layout, or a Hub id (bigscience/bloom-560m).")]
Output = Annotated[Path, typer.Argument(help="The converted folder.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Device = Annotated[str, typer.Option(help="Where verification computes, such as cpu or cuda:0.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickles too, with weights_only=True.")]
Layerwise = Annotated[
    bool, typer.Option("--layerwise", help="Prove layer by layer: one layer in memory, whatever the model's size.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it is there.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Take NaN and Inf as they are.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Shards written at once; default: by processors and free memory.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


def given_command() -> str:
    """Return what was typed, without tokens, for the report."""
    return redact(shlex.join(["alibi-hf", *sys.argv[1:]]))


def parse_lengths(text: str | None) -> list[int] | None:
    """Return the numbers of --lengths; None where it is not given."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 1 for part in parts):
        raise ConfigFieldError(f"--lengths {text} is no list of lengths above 1; write it like 256,1024.")
    return [int(part) for part in parts]


def parse_parts(only: str | None, layerwise: bool) -> Sequence[str]:
    """Return the parts of a proof that --only and --layerwise name."""
    if only is None:
        return LAYERWISE if layerwise else PARTS
    if layerwise:
        raise ConfigFieldError(f"--layerwise is --only {','.join(LAYERWISE)}, and --only {only} is given; give one.")
    return [part.strip() for part in only.split(",")]


def read_text(path: Path | None) -> str | None:
    """Return the content of the file of --text; None where it is not given."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointFileError(f"--text {path} cannot be read as UTF-8 text: {error}.") from error
