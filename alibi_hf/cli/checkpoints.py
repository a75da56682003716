"""The verbs about checkpoints: look at them, convert them, prove it, and send them back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import alibi_hf
from alibi_hf.checkpoints.export import TARGETS
from alibi_hf.cli.options import (
    AllowNonfinite,
    AllowPickle,
    AsJson,
    Device,
    Layerwise,
    Output,
    Overwrite,
    Quiet,
    Resume,
    Revision,
    Source,
    Workers,
    given_command,
    parse_lengths,
    parse_parts,
    read_text,
)
from alibi_hf.cli.running import app, errors, progress_bar, show
from alibi_hf.errors import NotProvedError
from alibi_hf.hub.card import mark_verified
from alibi_hf.verification.report import PARTS, is_enough


@app.command("inspect")
def inspect_command(
    source: Source,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show family, sizes, slopes, memory needed and the fate of every tensor; write nothing."""
    with errors():
        report = alibi_hf.inspect_checkpoint(source, revision=revision, allow_pickle=allow_pickle)
        show(report, as_json, quiet)


@app.command()
def convert(
    source: Source,
    output: Output,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB or 5GB.")] = "5GB",
    revision: Revision = None,
    rounding: Annotated[
        str,
        typer.Option("--alibi-rounding", help="exact, or bloom, falcon, baichuan or jais: upstream's own."),
    ] = "exact",
    overwrite: Overwrite = False,
    resume: Resume = False,
    workers: Workers = None,
    verify: Annotated[bool, typer.Option(help="Prove parity afterwards.")] = True,
    layerwise: Layerwise = False,
    allow_pickle: AllowPickle = False,
    allow_nonfinite: AllowNonfinite = False,
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write SOURCE as a folder that loads with `trust_remote_code=True`, and prove that it computes the same."""
    with errors(), progress_bar(quiet or as_json) as progress:
        report = alibi_hf.convert(
            source,
            output,
            dtype=dtype,
            max_shard_size=max_shard_size,
            revision=revision,
            overwrite=overwrite,
            resume=resume,
            workers=workers,
            verify=verify,
            layerwise=layerwise,
            allow_pickle=allow_pickle,
            allow_nonfinite=allow_nonfinite,
            alibi_rounding=rounding,
            device=device,
            progress=progress,
            command=given_command(),
        )
        show(report, as_json, quiet)
        if report.verified is False:
            raise NotProvedError(f"{output} was written, but parity is not proved; see {output / 'verification.md'}.")


@app.command()
def retrofit(
    source: Annotated[str, typer.Argument(help="A GPT-2, Llama or Mistral checkpoint: a folder, or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    bias_max: Annotated[float, typer.Option(help="The slopes are 2 ** (-bias_max * i / heads).")] = 8.0,
    length: Annotated[
        int | None, typer.Option(help="max_position_embeddings of the result; default: the source's.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB or 5GB.")] = "5GB",
    revision: Revision = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    workers: Workers = None,
    check: Annotated[bool, typer.Option(help="Check on a short text that the weights arrived.")] = True,
    allow_pickle: AllowPickle = False,
    allow_nonfinite: AllowNonfinite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make an ALiBi model of SOURCE, which has learned or rotary positions. It computes something else: train it."""
    with errors(), progress_bar(quiet or as_json) as progress:
        report = alibi_hf.retrofit(
            source,
            output,
            bias_max=bias_max,
            length=length,
            dtype=dtype,
            max_shard_size=max_shard_size,
            revision=revision,
            overwrite=overwrite,
            resume=resume,
            workers=workers,
            check=check,
            allow_pickle=allow_pickle,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            command=given_command(),
        )
        show(report, as_json, quiet)


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(help="A folder in this package's layout: converted, or saved after training.")
    ],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help=f"{', '.join(TARGETS[:-1])} or {TARGETS[-1]}.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, for gguf q8_0 too; default: as stored.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest weight file, such as 500MB or 5GB; gguf has one.")
    ] = "5GB",
    overwrite: Overwrite = False,
    tokenizer: Annotated[bool, typer.Option(help="Write the tokenizer into the gguf file.")] = True,
    allow_nonfinite: AllowNonfinite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write FOLDER in the layout that other programs read: Transformers' own classes, llm-foundry's, or llama.cpp's."""
    with errors(), progress_bar(quiet or as_json) as progress:
        report = alibi_hf.export(
            folder,
            output,
            to,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            tokenizer=tokenizer,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            command=given_command(),
        )
        show(report, as_json, quiet)


@app.command()
def verify(
    source: Source,
    output: Output,
    revision: Revision = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths in tokens, such as 256,1024.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file to read instead of the one shipped.")] = None,
    only: Annotated[str | None, typer.Option(help=f"Parts to check, of {','.join(PARTS)}; default: all.")] = None,
    layerwise: Layerwise = False,
    device: Device = "cpu",
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare OUTPUT with the upstream class on SOURCE, write verification.json, .md and .html into OUTPUT.

    With --only, just those parts are checked and shown; nothing is written unless they are enough to prove it.
    """
    with errors(), progress_bar(quiet or as_json) as progress:
        parts = parse_parts(only, layerwise)
        report = alibi_hf.verify(
            source,
            output,
            revision=revision,
            lengths=parse_lengths(lengths),
            text=read_text(text),
            device=device,
            allow_pickle=allow_pickle,
            progress=progress,
            only=parts,
        )
        partial = not is_enough(parts)
        if not partial:  # a part of the proof must not take the place of a whole one
            report.save(output)
            mark_verified(output, report.proved)
        show(report, as_json, quiet)
        if partial and all(check.passed for check in report.checks):
            return
        if not report.proved:
            raise NotProvedError(f"parity of {output} is not proved; see {output / 'verification.md'}.")


@app.command()
def families(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
) -> None:
    """List the families: what each covers, what it is proved against, and what upstream is known to get wrong."""
    with errors():
        found = alibi_hf.list_families()
        if markdown:
            print(found.markdown(), end="")
        else:
            show(found, as_json, quiet=False)
