"""`alibi-hf`: the package's verbs on the command line, each a thin call of the function of the same name.

Exit status: 0 done, 1 done but not proved, 2 bad input.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers.utils import logging

import alibi_hf
from alibi_hf import AlibiError, ConfigFieldError, NotProvedError
from alibi_hf.checkpoints.companions import mark_verified
from alibi_hf.checkpoints.export import TARGETS
from alibi_hf.display import Report, render
from alibi_hf.verification.report import LAYERWISE, PARTS, is_enough

app = typer.Typer(
    name="alibi-hf",
    help="Load, convert, prove and export ALiBi checkpoints as one modern Transformers decoder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Source = Annotated[str, typer.Argument(help="A folder in an upstream layout, or a Hub id (bigscience/bloom-560m).")]
Output = Annotated[Path, typer.Argument(help="The converted folder.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Device = Annotated[str, typer.Option(help="Where verification computes, such as cpu or cuda:0.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickles too, with weights_only=True.")]
Layerwise = Annotated[
    bool, typer.Option("--layerwise", help="Prove layer by layer: one layer in memory, whatever the model's size.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


@app.command("inspect")
def inspect_command(
    source: Source,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show family, sizes, slopes, memory needed and the fate of every tensor; write nothing."""
    with _errors():
        report = alibi_hf.inspect_checkpoint(source, revision=revision, allow_pickle=allow_pickle)
        _show(report, as_json, quiet)


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it is there.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Shards written at once; default: by processors and free memory.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Prove parity afterwards.")] = True,
    layerwise: Layerwise = False,
    allow_pickle: AllowPickle = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Take NaN and Inf as they are.")] = False,
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write SOURCE as a folder that loads with `trust_remote_code=True`, and prove that it computes the same."""
    with _errors(), _progress(quiet or as_json) as progress:
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
            command=shlex.join(["alibi-hf", *sys.argv[1:]]),
        )
        _show(report, as_json, quiet)
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it is there.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Shards written at once; default: by processors and free memory.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Check on a short text that the weights arrived.")] = True,
    allow_pickle: AllowPickle = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Take NaN and Inf as they are.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make an ALiBi model of SOURCE, which has learned or rotary positions. It computes something else: train it."""
    with _errors(), _progress(quiet or as_json) as progress:
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
            command=shlex.join(["alibi-hf", *sys.argv[1:]]),
        )
        _show(report, as_json, quiet)


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it is there.")] = False,
    tokenizer: Annotated[bool, typer.Option(help="Write the tokenizer into the gguf file.")] = True,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Take NaN and Inf as they are.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write FOLDER in the layout that other programs read: Transformers' own classes, llm-foundry's, or llama.cpp's."""
    with _errors(), _progress(quiet or as_json) as progress:
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
            command=shlex.join(["alibi-hf", *sys.argv[1:]]),
        )
        _show(report, as_json, quiet)


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
    with _errors(), _progress(quiet or as_json) as progress:
        parts = _parts(only, layerwise)
        report = alibi_hf.verify(
            source,
            output,
            revision=revision,
            lengths=_lengths(lengths),
            text=_text(text),
            device=device,
            allow_pickle=allow_pickle,
            progress=progress,
            only=parts,
        )
        partial = not is_enough(parts)
        if not partial:  # a part of the proof must not take the place of a whole one
            report.save(output)
            mark_verified(output, report.proved)
        _show(report, as_json, quiet)
        if partial and all(check.passed for check in report.checks):
            return
        if not report.proved:
            raise NotProvedError(f"parity of {output} is not proved; see {output / 'verification.md'}.")


@app.command()
def reach(
    source: Annotated[str, typer.Argument(help="An ALiBi model: a folder in any of the layouts, or a Hub id.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file to read, or several; default: the one shipped.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths in tokens; default: 256,1024,4096.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for reach.json, .csv, .html and .png.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it is there.")] = False,
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
    with _errors():
        with _progress(quiet or as_json) as progress:
            report = alibi_hf.reach(
                source,
                text,
                lengths=_lengths(lengths),
                revision=revision,
                dtype=dtype,
                device=device,
                allow_pickle=allow_pickle,
                output=output,
                overwrite=overwrite,
                progress=progress,
                command=shlex.join(["alibi-hf", *sys.argv[1:]]),
            )
        _show(report, as_json, quiet)


@app.command()
def families(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
) -> None:
    """List the families: what each covers, what it is proved against, and what upstream is known to get wrong."""
    with _errors():
        found = alibi_hf.list_families()
        if markdown:
            print(found.markdown(), end="")
        else:
            _show(found, as_json, quiet=False)


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it is there.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure perplexity against length, in non-overlapping and in sliding windows.

    A model that fails at a length is shown as failing there, with the reason.
    """
    with _errors(), _progress(quiet or as_json) as progress:
        report = alibi_hf.evaluate(
            models,
            text,
            _lengths(lengths),
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
            command=shlex.join(["alibi-hf", *sys.argv[1:]]),
        )
        _show(report, as_json, quiet)


def _lengths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 1 for part in parts):
        raise ConfigFieldError(f"--lengths {text} is no list of lengths above 1; write it like 256,1024.")
    return [int(part) for part in parts]


def _parts(only: str | None, layerwise: bool) -> Sequence[str]:
    if only is None:
        return LAYERWISE if layerwise else PARTS
    if layerwise:
        raise ConfigFieldError(f"--layerwise is --only {','.join(LAYERWISE)}, and --only {only} is given; give one.")
    return [part.strip() for part in only.split(",")]


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise alibi_hf.CheckpointFileError(f"--text {path} cannot be read as UTF-8 text: {error}.") from error


def _show(report: Report, as_json: bool, quiet: bool) -> None:
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    elif not quiet:
        Console().print(render(report))


@contextmanager
def _errors() -> Iterator[None]:
    """Turn the package's errors into one line on standard error and the exit status."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except NotProvedError as error:
        typer.echo(f"not proved: {error}", err=True)
        raise typer.Exit(1) from error
    except AlibiError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from error
    except OSError as error:  # a path that cannot be read or written
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from error


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """Yield the `progress(what, done, total)` callback that draws a bar, or None."""
    if quiet:
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")
        yield lambda what, done=0, total=0: bar.update(
            task, description=escape(what), completed=done, total=total or None
        )


if __name__ == "__main__":
    app()
