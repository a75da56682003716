"""Files of a repository on the Hugging Face Hub, through the cache that every library there shares."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from alibi_hf.errors import CheckpointFileError, in_one_line

_TOKEN = "a token that may read it (HF_TOKEN, or `hf auth login`)"


def fetch(repo_id: str, patterns: Sequence[str], **options: Any) -> Path:
    """Return the folder of a snapshot; its name is the commit. What the cache lacks is downloaded.

    Args:
        repo_id: "owner/name".
        patterns: which files, such as "*.json".
        options: for `huggingface_hub.snapshot_download`: revision, token, cache_dir, local_files_only, force_download.

    Raises:
        CheckpointFileError: saying why they cannot be had.
    """
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns), **options))
    except Exception as error:  # the Hub client raises many kinds; all mean that there is nothing to read
        reason = _reason(error, options.get("revision") or "main")
        raise CheckpointFileError(
            f"{repo_id} is no local folder, and it could not be fetched from the Hub: {reason}."
        ) from error


def _reason(error: Exception, revision: str) -> str:
    """What went wrong, and what to do."""
    cause = next((found for found in _chain(error) if isinstance(found, HfHubHTTPError)), error)
    if isinstance(cause, GatedRepoError):
        return f"it is gated; accept its conditions on its page there, and give {_TOKEN}"
    if isinstance(cause, RepositoryNotFoundError):
        return f"there is no such repository, or it is private and needs {_TOKEN}"
    if isinstance(cause, RevisionNotFoundError):
        return f"it has no branch, tag or commit {revision!r}"
    if isinstance(cause, HFValidationError):
        return f"{in_one_line(cause).rstrip('.')}; an id there is owner/name"
    if isinstance(cause, HfHubHTTPError):
        answer = cause.response
        said = f"{answer.status_code} {answer.reason_phrase}"
        what = f"give {_TOKEN}" if answer.status_code in (401, 403) else "try again later, what has come is kept"
        return f"it answered {said}; {what}"
    return (
        f"{in_one_line(error).rstrip('.')}. Without network, give a local folder that holds config.json and the weights"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__


__all__ = ["fetch"]
