"""What the loopback Hub keeps: repositories with commits, branches, tags and pull requests, all in memory."""

import hashlib
import re
import threading
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".onnx", ".pt", ".zip")
LFS_SIZE = 10_000_000  # bytes; from here on any file
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
_NAME = re.compile(r"[\w.-]{1,96}")
_DATE = "2026-01-01T00:00:00.000Z"


class HubError(Exception):
    """An answer that is no success: its status, the Hub's X-Error-Code (or ""), and what it says."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def blob_id(data: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str, sample: bytes, size: int) -> bool:
    """Whether the Hub keeps a file in its large file storage: binary, or long."""
    return path.endswith(LFS_SUFFIXES) or b"\0" in sample or size > LFS_SIZE


def pointer(data: bytes) -> bytes:
    """What git holds in place of a large file."""
    oid = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()


def check_path(path: str) -> None:
    """`HubError` 400 for a path that is not one of a repository."""
    parts = PurePosixPath(path).parts
    if not parts or path != "/".join(parts) or path.startswith("/") or {"..", ".", ".git"} & set(parts) or "\\" in path:
        raise HubError(400, f"Invalid path: {path}")


@dataclass(frozen=True)
class Commit:
    """One commit: its id, the one before it, and every file of it."""

    sha: str
    parent: "Commit | None"
    files: dict[str, bytes] = field(repr=False)
    title: str
    description: str = ""

    def entry(self, path: str) -> dict[str, Any]:
        """What a listing says of one file."""
        data = self.files[path]
        if not is_large(path, data[:512], len(data)):
            return {"type": "file", "oid": blob_id(data), "size": len(data), "path": path}
        held = pointer(data)
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": len(held)}
        return {"type": "file", "oid": blob_id(held), "size": len(data), "path": path, "lfs": lfs}

    def tree(self, under: str, recursive: bool) -> list[dict[str, Any]]:
        """Every file and folder under a folder ("" is the root), by name."""
        prefix = f"{under}/" if under else ""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.files):
            if not path.startswith(prefix):
                continue
            inner = path.removeprefix(prefix).split("/")
            for depth in range(1, len(inner) if recursive else min(len(inner), 2)):
                folder = prefix + "/".join(inner[:depth])
                found[folder] = {"type": "directory", "oid": blob_id(folder.encode()), "size": 0, "path": folder}
            if recursive or len(inner) == 1:
                found[path] = self.entry(path)
        if under and not found:
            raise HubError(404, f"{under} does not exist on {self.sha}", "EntryNotFound")
        return [found[path] for path in sorted(found)]

    def log(self) -> list[dict[str, Any]]:
        """This commit and those before it, the newest first."""
        found: list[dict[str, Any]] = []
        commit: Commit | None = self
        while commit is not None:
            said = {"id": commit.sha, "title": commit.title, "message": commit.description, "date": _DATE}
            found.append({**said, "authors": [{"user": "tester"}]})
            commit = commit.parent
        return found


@dataclass
class PullRequest:
    """A pull request: its number, its title, and its branch (`refs/pr/N`)."""

    number: int
    title: str
    revision: str


class Repository:
    """One model repository; born, as on the Hub, with a commit that holds .gitattributes."""

    def __init__(self, repo_id: str, private: bool = False) -> None:
        namespace, _, name = repo_id.partition("/")
        if not _NAME.fullmatch(namespace) or not _NAME.fullmatch(name):
            raise HubError(400, f"Invalid repo id: {repo_id}")
        self.repo_id, self.namespace, self.private = repo_id, namespace, private
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}  # "main", "refs/tags/v1" and "refs/pr/1" to the id of a commit
        self.pull_requests: list[PullRequest] = []
        self._lock = threading.RLock()
        self.refs["main"] = self._add(None, {".gitattributes": GITATTRIBUTES}, "initial commit").sha

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request or id."""
        for name in (revision, f"refs/tags/{revision}", revision.removeprefix("refs/heads/")):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def file(self, revision: str, path: str) -> tuple[Commit, bytes]:
        """One file at a revision, and the commit."""
        commit = self.resolve(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        return commit, commit.files[path]

    def commit(
        self,
        revision: str,
        changes: dict[str, bytes | None],
        title: str,
        description: str = "",
        parent: str | None = None,
        create_pr: bool = False,
    ) -> tuple[Commit, PullRequest | None]:
        """Add a commit to a branch, or to a new pull request; a file whose change is None goes away."""
        with self._lock:
            head = self.resolve(parent if create_pr and parent else revision)
            if revision not in self.refs or revision.startswith("refs/tags/"):
                raise HubError(400, f"{revision} is no branch; commits go to a branch.")
            if parent is not None and not create_pr and not head.sha.startswith(parent):
                raise HubError(412, f"A commit has happened since {parent}; {revision} is at {head.sha}.")
            files = dict(head.files)
            for path, data in changes.items():
                check_path(path)
                if data is None:
                    files.pop(path, None)
                else:
                    files[path] = data
            made = self._add(head, files, title, description)
            request = self.open_pull_request(title) if create_pr else None
            self.refs[request.revision if request else revision] = made.sha
            return made, request

    def open_pull_request(self, title: str) -> PullRequest:
        """A new pull request, at the head of main."""
        with self._lock:
            number = len(self.pull_requests) + 1
            request = PullRequest(number, title, f"refs/pr/{number}")
            self.pull_requests.append(request)
            self.refs[request.revision] = self.refs["main"]
            return request

    def branch(self, name: str, start: str = "main") -> None:
        """A new branch or, with `refs/tags/` before its name, a new tag."""
        with self._lock:
            if name in self.refs:
                raise HubError(409, f"Reference {name} already exists")
            self.refs[name] = self.resolve(start).sha

    def info(self, commit: Commit) -> dict[str, Any]:
        """What the API says of the repository at a commit."""
        return {
            "_id": blob_id(self.repo_id.encode())[:24],
            "id": self.repo_id,
            "modelId": self.repo_id,
            "author": self.namespace,
            "sha": commit.sha,
            "private": self.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "createdAt": _DATE,
            "lastModified": _DATE,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def references(self, pull_requests: bool) -> dict[str, Any]:
        """What the API says of branches, tags and pull requests."""
        kinds: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
        for name, sha in self.refs.items():
            ref = name if name.startswith("refs/") else f"refs/heads/{name}"
            kind = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[ref.split("/")[1]]
            kinds[kind].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": sha})
        return kinds if pull_requests else {**kinds, "pullRequests": []}

    def _add(self, parent: Commit | None, files: dict[str, bytes], title: str, description: str = "") -> Commit:
        """A commit whose id depends on all that it holds and on its place in the history."""
        told = [parent.sha if parent else "", title, description, str(len(self.commits))]
        told += [f"{path} {blob_id(data)}" for path, data in sorted(files.items())]
        sha = hashlib.sha1("\n".join([self.repo_id, *told]).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, files, title, description)
        return self.commits[sha]
