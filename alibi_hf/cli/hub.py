"""The verb that publishes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

import alibi_hf
from alibi_hf.cli.options import AsJson, Quiet, given_command
from alibi_hf.cli.running import app, errors, progress_bar, show


@app.command()
def push(
    folder: Annotated[
        Path, typer.Argument(help="A folder in this package's layout: converted, or saved after training.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where on the Hub; made if it is not there.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make it private; an existing public one is refused.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to, made if it is not there, or refs/pr/N; default: main.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request against main.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list what would go, and contact nobody.")
    ] = False,
    unverified: Annotated[bool, typer.Option("--unverified", help="Push although parity is not proved.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Push FOLDER to the Hub, with code, card and reports, after it gave the same logits by its own code alone.

    The token is that of `hf auth login`, or HF_TOKEN. A push that was cut off is started again, and sends only what the
    Hub lacks. `push.json` in FOLDER then says what went.
    """
    with errors(), progress_bar(quiet or as_json) as progress:
        disable_progress_bars()  # two on one screen would write over each other
        if quiet:
            logging.set_verbosity_error()
        report = alibi_hf.push(
            folder,
            repo_id,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            dry_run=dry_run,
            unverified=unverified,
            message=message,
            progress=progress,
            command=given_command(),
        )
        if not dry_run:
            report.save(folder)
        show(report, as_json, quiet)
