"""The talk with the Hub, through huggingface_hub: repository, branch, two commits; its errors in this package's words.

An upload that was cut off is pushed again: the client asks the Hub which files it has, and sends the others.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import DEFAULT_REVISION, ENDPOINT
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from alibi_hf.errors import AlibiError, HubError, in_one_line, redact
from alibi_hf.hub.card import CARD
from alibi_hf.hub.contents import Contents, stale

_COMMIT = re.compile(r"\b[0-9a-f]{40}\b")
_AGAIN = "Push again; files that the Hub has are not sent again."
_ADVICE = {
    400: "The Hub takes something in the files or their names for wrong.",
    401: "The token is missing, expired, or not the Hub's: log in (`hf auth login`), or set HF_TOKEN.",
    403: "The token may not write there: it needs the role write, and its owner the right to that name.",
    404: "There is no such repository or revision, or the token may not see it.",
    409: f"Someone else wrote there at the same time. {_AGAIN}",
    412: f"Someone else wrote there at the same time. {_AGAIN}",
    413: "A file is larger than the Hub takes; convert with a smaller --max-shard-size.",
    429: f"Wait some minutes. {_AGAIN}",
}


@dataclass(frozen=True)
class Target:
    """Where a push goes: see `push`."""

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    token: str | bool | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise HubError(f"{self.repo_id!r} is no Hub id: {in_one_line(error)}") from None
        if self.repo_id.count("/") != 1:
            raise HubError(f"{self.repo_id!r} is no Hub id; write it as USER/NAME.")
        if self.revision and self.create_pr:
            raise HubError(
                f"create_pr opens a pull request against {DEFAULT_REVISION}, and revision={self.revision!r} names "
                f"where to commit; give one. To go on with pull request N: revision='refs/pr/N'."
            )
        if self.revision and _COMMIT.fullmatch(self.revision):
            raise HubError(f"revision={self.revision!r} is a commit; give the name of a branch.")


@dataclass
class Uploaded:
    """What the Hub made of a push.

    Attributes:
        commit: the commit with model and reports, which the card names; an older one where none of them changed since.
        card_commit: the commit with the card, the same where the card there was right already.
        private: whether the repository is.
        revision: the branch, or "refs/pr/N".
        url: of what was written.
        deleted: weights, code files and records of an earlier push that were taken away.
    """

    commit: str
    card_commit: str
    private: bool
    revision: str
    url: str
    deleted: list[str]


def upload(
    contents: Contents, staged: Path, target: Target, message: str, make_card: Callable[[str], Path]
) -> Uploaded:
    """Upload what is in `staged`, then the card that names the commit which that made.

    Args:
        contents: what goes.
        staged: a folder with nothing else in it; its card is not read.
        target: where it goes; repository and branch are made if need be.
        message: of the first commit.
        make_card: writes the card that names a commit, and returns its path.

    Raises:
        HubError: whatever goes wrong; it never holds the token.
    """
    with _named_errors(target):
        api = HfApi(token=target.token, library_name="alibi-hf")
        private = _prepare(api, target)
        before = api.repo_info(target.repo_id, revision=target.revision).sha
        gone = stale(api.list_repo_files(target.repo_id, revision=target.revision), contents)
        first = api.upload_folder(
            repo_id=target.repo_id,
            folder_path=staged,
            ignore_patterns=[CARD],
            delete_patterns=[escape(name) for name in gone] or None,
            revision=target.revision,
            create_pr=target.create_pr,
            commit_message=message,
        )
        revision = first.pr_revision or target.revision or DEFAULT_REVISION
        pin = _kept_pin(api, target.repo_id, first.oid, make_card) if first.oid == before else first.oid
        last = api.upload_file(
            path_or_fileobj=make_card(pin),
            path_in_repo=CARD,
            repo_id=target.repo_id,
            revision=revision,
            create_pr=target.create_pr and not first.pr_revision,
            commit_message="Add the card",
        )
        url = first.pr_url or last.pr_url or f"{ENDPOINT}/{target.repo_id}/tree/{revision}"
        return Uploaded(pin, last.oid, private, last.pr_revision or revision, url, gone)


def _prepare(api: HfApi, target: Target) -> bool:
    """Make repository and branch where there are none; whether the repository is private."""
    api.create_repo(target.repo_id, private=target.private, exist_ok=True)
    private = bool(api.repo_info(target.repo_id).private)
    if target.private and not private:
        raise HubError(
            f"{target.repo_id} exists and is public, and private=True was asked for. Make it private in its settings "
            f"first, or push without --private. Nothing was uploaded."
        )
    if target.revision and target.revision != DEFAULT_REVISION and not target.revision.startswith("refs/"):
        api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)
    return private


def _kept_pin(api: HfApi, repo_id: str, last: str, make_card: Callable[[str], Path]) -> str:
    """The commit to name where nothing but the card may have changed: the one that is named there if all else is right.

    Otherwise each push would make another commit, which names the one before it.
    """
    try:
        there = Path(api.hf_hub_download(repo_id, CARD, revision=last)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return last
    named = (pin for pin in _COMMIT.findall(there) if make_card(pin).read_text(encoding="utf-8") == there)
    return next(named, last)


@contextmanager
def _named_errors(target: Target) -> Iterator[None]:
    """Turn what the client raises into `HubError`; the cause is cut off, which may quote what was sent."""
    try:
        yield
    except AlibiError:
        raise
    except LocalTokenNotFoundError:
        raise HubError(f"{target.repo_id}: {_ADVICE[401]}") from None
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so the Hub cannot be reached; unset it to push.") from None
    except HfHubHTTPError as error:
        raise HubError(_without_token(_describe(error, target), target)) from None
    except Exception as error:  # sockets, timeouts, a card that the Hub refuses: the client raises many kinds
        refused = isinstance(error, ValueError)  # with its reasons in the lines after the first
        reason, advice = (" ".join(redact(str(error)).split()), "") if refused else (in_one_line(error), _AGAIN)
        said = f"pushing to {target.repo_id} at {ENDPOINT} failed ({reason}). {advice}".strip()
        raise HubError(_without_token(said, target)) from None


def _describe(error: HfHubHTTPError, target: Target) -> str:
    status = error.response.status_code
    advice = _ADVICE.get(status, _AGAIN if status >= 500 else "")
    said = (error.server_message or "").strip().splitlines()
    answer = f"{status} {error.response.reason_phrase}".strip() + (f": {said[0].rstrip('.')}" if said else "")
    return f"pushing to {target.repo_id}, the Hub answered {answer}. {advice}".strip()


def _without_token(text: str, target: Target) -> str:
    token = target.token if isinstance(target.token, str) else get_token()
    return text.replace(token, "(token)") if token else text


__all__ = ["Target", "Uploaded", "upload"]
