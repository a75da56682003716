"""The command line itself, and what every verb does around its call: errors, progress, the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from alibi_hf.display import Report, render
from alibi_hf.errors import AlibiError, NotProvedError, redact

app = typer.Typer(
    name="alibi-hf",
    help="Load, convert, prove and export ALiBi checkpoints as one modern Transformers decoder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def show(report: Report, as_json: bool, quiet: bool) -> None:
    """Print a report: as JSON, as tables, or not at all."""
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    elif not quiet:
        Console().print(render(report))


@contextmanager
def errors() -> Iterator[None]:
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
        typer.echo(redact(f"{type(error).__name__}: {error}"), err=True)
        raise typer.Exit(2) from error


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Any]:
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
