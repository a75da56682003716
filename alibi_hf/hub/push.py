"""`push`: a folder in this package's layout to the Hub, after it was checked as its readers will use it."""

import tempfile
from functools import partial
from pathlib import Path

from alibi_hf.checkpoints.conversion import own_command, versions
from alibi_hf.checkpoints.options import Progress
from alibi_hf.errors import CheckpointFileError, NotProvedError
from alibi_hf.hub.card import CARD, write_card
from alibi_hf.hub.card_facts import CardFacts
from alibi_hf.hub.checks import check_card, check_layout, check_secrets, local_paths
from alibi_hf.hub.contents import Contents, list_contents, stage
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
    in the folder is the one that was pushed. Of weights, code and records that are on the Hub already, those that the
    folder no longer has are deleted, as they would be loaded in its place, or tell of other weights; other files there
    stay. A push that was cut off is started again, and sends only what the Hub lacks.

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
    say("reading and hashing", 0, 0)
    facts, contents = _checked(path, token, unverified)
    class_name, reason = facts.architecture, facts.why_not_proved
    with tempfile.TemporaryDirectory(prefix="alibi-hf-push-") as scratch:
        staged, workspace = Path(scratch) / "staged", Path(scratch) / "workspace"
        stage(contents, staged)
        workspace.mkdir()
        say("loading it by its own code alone", 0, 0)
        agreements = preflight(staged, class_name, workspace)
        uploaded = None
        if not dry_run:
            say(f"uploading {len(contents.files)} files to {repo_id}", 0, 0)
            make_card = partial(_card, facts, repo_id)
            make_card(None)  # what it cannot read stops the push here
            uploaded = upload(contents, staged, target, message or f"Upload {class_name} with alibi-hf", make_card)
            contents = list_contents(path)  # with the card
    return Push(
        folder=path,
        repo_id=repo_id,
        class_name=class_name,
        verdict=f"not proved: {reason}" if reason else "proved",
        files=contents.files,
        left_out=contents.left_out,
        preflight=agreements,
        notes=_notes(contents),
        dry_run=dry_run,
        uploaded=uploaded,
        versions=versions(),
        command=command or own_command(),
    )


def _checked(folder: Path, token: str | bool | None, unverified: bool) -> tuple[CardFacts, Contents]:
    """What a folder says of itself, and what of it goes."""
    if not folder.is_dir():
        raise CheckpointFileError(f"{folder} is no folder; give one that `alibi-hf convert` or save_pretrained wrote.")
    check_layout(folder)
    contents = list_contents(folder)
    check_secrets(contents, token)
    check_card(contents)
    facts = CardFacts.read(folder)
    if (reason := facts.why_not_proved) and not unverified:
        raise NotProvedError(
            f"{folder}: {reason}. Nothing was uploaded; --unverified (unverified=True) pushes it all the same."
        )
    return facts, contents


def _card(facts: CardFacts, repo_id: str, commit: str | None) -> Path:
    return write_card(facts.folder, repo_id=repo_id, commit=commit, facts=facts)


def _notes(contents: Contents) -> list[str]:
    notes = []
    if paths := local_paths(contents):
        notes.append(f"paths of this machine can be read in {', '.join(paths)}")
    if CARD not in contents.names:
        notes.append(f"{CARD}, which is missing, will be made")
    return notes


__all__ = ["push"]
