"""A Hub on 127.0.0.1 for tests: the real huggingface_hub client talks to it over real sockets, in any process.

Two servers in threads, as in the world: the Hub itself, and the storage that large files go to and come from by signed
links, where no token belongs. Everything is held in memory. `api` and `transfer` say what each address answers.

    with LoopbackHub() as hub:
        sha = hub.commit("tester/tiny", folder)
        hub.run("from huggingface_hub import HfApi; print(HfApi().model_info('tester/tiny').sha)", home=tmp_path)
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from tests.hub import api, transfer  # noqa: F401 (they fill the table of routes)
from tests.hub.calls import Answer, Call, answer
from tests.hub.faults import CUTS, ERRORS, Fault, Faults
from tests.hub.repositories import Commit, HubError, PullRequest, Repository

WRITE_TOKEN = "hf_loopbackWriteTokenThatIsNoRealOne"
READ_TOKEN = "hf_loopbackReadTokenThatIsNoRealOne"


class Request(NamedTuple):
    """One request as it came: its method, its path with the query, and whether it carried a token."""

    method: str
    path: str
    token: bool


class LoopbackHub:
    """The Hub; a context manager that starts and stops it.

    Attributes:
        url: what HF_ENDPOINT must be.
        storage_url: where large files are, another origin.
        tokens: each valid token of the one account, and what it may: "write" or "read".
        account, organisations: whose repositories the account sees and, with a write token, writes.
        requests: every request so far, to the Hub and to its storage (whose paths begin with /storage/).
        ranges: path and Range header of every request for a part of a file.
        stored: the large files by SHA-256.
        page_size: entries of a listing that come in one answer.
        multipart_size: bytes from which on an upload is asked for in parts of that size; None: never.
        retry_after: seconds that an answer 429 or 503 asks to wait.
    """

    def __init__(self) -> None:
        self.tokens = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
        self.account, self.organisations = "tester", ["team"]
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[Request] = []
        self.ranges: list[tuple[str, str]] = []
        self.faults = Faults()
        self.page_size, self.retry_after = 1000, 0
        self.multipart_size: int | None = None
        self._servers = [_Server(self), _Server(self)]
        ports = [server.server_address[1] for server in self._servers]
        # Two names: clients tell origins apart by port (huggingface_hub 2.4) or by host name alone (1.33).
        self.url, self.storage_url = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"

    def __enter__(self) -> "LoopbackHub":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def create(self, repo_id: str, private: bool = False) -> Repository:
        """A new repository; 409 where there is one already."""
        if repo_id in self.repositories:
            raise HubError(409, "You already created this model repo")
        self.repositories[repo_id] = Repository(repo_id, private)
        return self.repositories[repo_id]

    def commit(self, repo_id: str, files: dict[str, bytes] | Path, revision: str = "main") -> str:
        """Put files on a branch (made where it is missing), or all of a folder; returns the commit's id.

        Of a dict, files that are not named stay; a folder replaces what was there.
        """
        repository = self.repositories.get(repo_id) or self.create(repo_id)
        if revision not in repository.refs:
            repository.branch(revision)
        changes: dict[str, bytes | None] = {}
        if isinstance(files, Path):
            changes = dict.fromkeys(set(repository.resolve(revision).files) - {".gitattributes"})
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        return repository.commit(revision, {**changes, **files}, "from the test")[0].sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Every file at a revision, the .gitattributes that each repository is born with included."""
        return dict(self.repositories[repo_id].resolve(revision).files)

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits of a branch, oldest first, from the one that made the repository on."""
        found: list[Commit] = []
        commit: Commit | None = self.repositories[repo_id].resolve(revision)
        while commit is not None:
            found.append(commit)
            commit = commit.parent
        return found[::-1]

    def pull_requests(self, repo_id: str) -> list[PullRequest]:
        """The pull requests, oldest first; the files of one are at its `revision`."""
        return list(self.repositories[repo_id].pull_requests)

    def fail(self, method: str, pattern: str, answer: int | str, times: int = 1) -> Fault:
        """Let the next `times` requests that fit fail.

        Args:
            method: such as "GET"; "*" is any.
            pattern: a regular expression that is searched in the path (query included).
            answer: a status; "truncate": half of the body (of the answer, or of an upload) passes, then the connection
                ends; "drop": the connection ends without an answer.
            times: how often.

        Returns:
            The fault; `seen` counts how often it struck.
        """
        return self.faults.add(method, pattern, answer, times)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """What a process needs in its environment to take this Hub for the real one, and `home` for its cache."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
        }
        given = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {**kept, **given, **quiet, **({"HF_TOKEN": token} if token else {})}

    def run(
        self, code_or_argv: str | Sequence[str | Path], home: Path, token: str | None = None, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run Python code, or a command, in a fresh process whose Hub is this one.

        Args:
            code_or_argv: code for `python -c`, or the whole command.
            home: its HF_HOME.
            token: its HF_TOKEN.
            options: for `subprocess.run`; `env` is added to the environment.
        """
        command = [sys.executable, "-c", code_or_argv] if isinstance(code_or_argv, str) else list(code_or_argv)
        environment = {**self.environment(home, token), **options.pop("env", {})}
        options = {"timeout": 600, "capture_output": True, "text": True, **options}
        return subprocess.run(command, env=environment, **options)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, and a connection that a fault cut, are no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def respond(self) -> None:
        """Answer one request, or do to it what a fault wants."""
        hub = self.server.hub
        given = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        hub.requests.append(Request(self.command, self.path, given is not None))
        if "Range" in self.headers:
            hub.ranges.append((self.path, self.headers["Range"]))
        fault = hub.faults.take(self.command, self.path)
        if fault in CUTS and self.command in ("PUT", "POST"):
            self._read(0.5 if fault == "truncate" else 1)
            return self._hang_up()
        body = self._read()
        if fault == "drop":
            return self._hang_up()
        try:
            if isinstance(fault, int):
                raise HubError(fault, ERRORS[fault])
            said = answer(hub, Call(self.command, self.path, dict(self.headers.items()), body, given))
        except HubError as error:
            said = _error(error, hub.retry_after)
        self._send(said, half=fault == "truncate")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond

    def _read(self, share: float = 1) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(int(self.headers.get("Content-Length", 0)) * share))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, said: Answer, half: bool) -> None:
        self.send_response(said.status)
        for name, value in {"Content-Length": str(len(said.body)), **said.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said.body[: len(said.body) // 2] if half else said.body)
        if half:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()


def _error(error: HubError, retry_after: int) -> Answer:
    headers = {"Content-Type": "application/json", "X-Error-Message": error.message.splitlines()[0]}
    if error.code:
        headers["X-Error-Code"] = error.code
    if error.status in (429, 503):
        headers["Retry-After"] = str(retry_after)
    return Answer(error.status, json.dumps({"error": error.message}).encode(), headers)


__all__ = ["READ_TOKEN", "WRITE_TOKEN", "LoopbackHub", "Request"]
