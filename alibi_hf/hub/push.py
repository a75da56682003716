"""`push`: a folder in this package's layout to the Hub, after it was checked as its readers will use it."""

import tempfile
from functools import partial
from pathlib import Path

from alibi_hf.checkpoints.conversion import own_command, versions
from alibi_hf.checkpoints.options import Progress
from alibi_hf.errors import CheckpointFileError, NotProvedError
from alibi_hf.hub.card import write_card
from alibi_hf.hub.checks import check_layout, check_secrets, local_paths, why_not_proved
from alibi_hf.hub.contents import list_contents, stage
from alibi_hf.hub.preflight import preflight
from alibi_hf.hub.report import Push
from alibi_hf.hub.upload import Target, upload


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    dry_run: bool = False,
    unverified: bool = False,
    message: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Push:
    """Push a converted, fine-tuned or newly trained folder to the Hub.

    Nothing leaves before all of this holds: the layout is complete, with code for all heads; weights, config and code
    are those that were proved (unless `unverified`); no file holds a token; and, loaded with `trust_remote_code` in a
    fresh process where this package is hidden, the folder gives bit for bit what this package gives. That holds one
    model in memory at a time, in its stored dtype, on CPU.

    Then there are two commits: model and reports, and the card, which names the first as the revision to load. The card
    in the folder is the one that was pushed. Of weights and code that are on the Hub already, those that the folder no
    longer has are deleted, as they would be loaded in its place; other files there stay. A push that was cut off is
    started again, and sends only what the Hub lacks.

    Args:
        folder: a folder in this package's layout, from `convert` or `save_pretrained`.
        repo_id: "owner/name" on the Hub; made if it is not there.
        private: True makes a new repository private, and refuses an existing one that is public; None is the owner's
            default.
        revision: the branch, made if it is not there, or "refs/pr/N" to go on with a pull request; default: main.
        create_pr: open a pull request against main, with both commits.
        token: of the Hub; default: the one of `hf auth login` or HF_TOKEN. It is never written or shown.
        dry_run: check everything, and contact nobody.
        unverified: push although parity is not proved: after training there is none to prove.
        message: of the first commit.
        progress: called with what is being done.
        command: what to write down as the command; the process's own if not given.

    Raises:
        NotProvedError: where parity is not proved, or the folder's own code computes something else.
        SecretError: where a file holds a token.
        HubError: where the Hub or its client says no.
        AlibiError: its other subclasses, about the folder. Only after a HubError can something have been uploaded.
    """
    target = Target(repo_id, private, revision, create_pr, token)
    path = Path(folder).expanduser()
    say: Progress = progress or (lambda what, done, total: None)
    if not path.is_dir():
        raise CheckpointFileError(f"{path} is no folder; give one that `alibi-hf convert` or save_pretrained wrote.")
    class_name = check_layout(path)
    contents = list_contents(path)
    check_secrets(contents, token)
    say("hashing the weights", 0, 0)
    reason = why_not_proved(contents)
    if reason and not unverified:
        raise NotProvedError(
            f"{path}: {reason}. Nothing was uploaded; --unverified (unverified=True) pushes it all the same."
        )
    with tempfile.TemporaryDirectory(prefix="alibi-hf-push-") as scratch:
        staged = stage(contents, Path(scratch) / "staged")
        say("loading it by its own code alone", 0, 0)
        (workspace := Path(scratch) / "workspace").mkdir()
        agreements = preflight(staged, class_name, workspace)
        uploaded = None
        if not dry_run:
            say(f"uploading {len(contents.files)} files to {repo_id}", 0, 0)
            write_card(path, repo_id=repo_id)  # what it cannot read stops the push here
            make_card = partial(_card, path, repo_id)
            uploaded = upload(contents, staged, target, message or f"Upload {class_name} with alibi-hf", make_card)
    return Push(
        folder=path,
        repo_id=repo_id,
        class_name=class_name,
        verdict=f"not proved: {reason}" if reason else "proved",
        files=contents.files,
        left_out=contents.left_out,
        preflight=agreements,
        notes=_notes(local_paths(contents)),
        dry_run=dry_run,
        uploaded=uploaded,
        versions=versions(),
        command=command or own_command(),
    )


def _card(folder: Path, repo_id: str, commit: str) -> Path:
    return write_card(folder, repo_id=repo_id, commit=commit)


def _notes(paths: list[str]) -> list[str]:
    return [f"paths of this machine can be read in {', '.join(paths)}"] if paths else []


__all__ = ["push"]
