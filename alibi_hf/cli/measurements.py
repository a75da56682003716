"""The verbs that measure: perplexity against length, and what each head looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import alibi_hf
from alibi_hf.cli.options import AllowPickle, AsJson, Overwrite, Quiet, Resume, Revision, given_command, parse_lengths
from alibi_hf.cli.running import app, errors, progress_bar, show


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders or Hub ids of causal models; ALiBi models run in this package's decoder, others, and "
            "upstream:FOLDER, in Transformers' own class."
        ),
    ],
    text: Annotated[list[Path], typer.Option(help="A UTF-8 text, or a folder of *.txt; give it several times.")],
    output: Annotated[Path | None, typer.Option(help="The folder to write; default: only show what was found.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Of windows in tokens, such as 256,1024; default: 256 to 8192.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one sliding window to the next; default: half of each length.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read only the first so many; default: all.")] = None,
    name: Annotated[list[str] | None, typer.Option(help="What the report calls a model; once for each.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16, float64 or auto (as stored); default: float32 on CPU."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute, such as cpu or cuda:0.")] = "cpu",
    revision: Revision = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder whose tokenizer all models take.")] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run code of a local folder, or of a Hub id at a commit (--revision)."
        ),
    ] = False,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity against length, in non-overlapping and in sliding windows.

    A model that fails at a length is shown as failing there, with the reason.
    """
    with errors(), progress_bar(quiet or as_json) as progress:
        report = alibi_hf.evaluate(
            models,
            text,
            parse_lengths(lengths),
            stride=stride,
            max_tokens=max_tokens,
            names=name,
            dtype=dtype,
            device=device,
            revision=revision,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            output=output,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
            command=given_command(),
        )
        show(report, as_json, quiet)


@app.command()
def reach(
    source: Annotated[str, typer.Argument(help="An ALiBi model: a folder in any of the layouts, or a Hub id.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file to read, or several; default: the one shipped.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths in tokens; default: 256,1024,4096.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for reach.json, .csv, .html and .png.")] = None,
    overwrite: Overwrite = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: float32 on CPU, else as stored.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda:0.")] = "cpu",
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what each head looks at: distances, collapsed heads, provable windows, and what 16 bits do to the bias.

    Without --output nothing is written, only shown.
    """
    with errors():
        with progress_bar(quiet or as_json) as progress:
            report = alibi_hf.reach(
                source,
                text,
                lengths=parse_lengths(lengths),
                revision=revision,
                dtype=dtype,
                device=device,
                allow_pickle=allow_pickle,
                output=output,
                overwrite=overwrite,
                progress=progress,
                command=given_command(),
            )
        show(report, as_json, quiet)
