"""Tokens of the Hub appear nowhere: not in output, errors, debug logs, tracebacks, or files that are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import alibi_hf
from alibi_hf.checkpoints.conversion import own_command
from alibi_hf.cli.options import given_command
from alibi_hf.errors import AlibiError, CheckpointFileError, UnsafeSourceError, in_one_line, redact
from tests.security.folders import Folders

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz12345678"[:34]

# Runs commands, prints what each raises as a whole traceback; then the functions, which the command line shortens.
WORKER = """
import json, logging, sys, traceback
import alibi_hf
from alibi_hf.cli import app
commands, folder = json.loads(sys.argv[1])
for command in commands:
    if command == ["debug"]:
        logging.basicConfig(level=logging.DEBUG)
        continue
    try:
        print("ran", command[0], app(command, standalone_mode=False) or 0, flush=True)
    except BaseException:
        traceback.print_exc()
for call in (alibi_hf.inspect_checkpoint, alibi_hf.AlibiForCausalLM.from_pretrained):
    try:
        call("owner/plain")
    except Exception as error:
        print("raised", type(error).__name__)
        traceback.print_exc()
        while error is not None:
            print(repr(error), error.args)
            error = error.__cause__ or error.__context__
model = alibi_hf.AlibiForCausalLM.from_pretrained(folder, token=sys.argv[3])
model.save_pretrained(sys.argv[2])
print(repr(model.config), "done")
"""


class Refusing(BaseHTTPRequestHandler):
    """A Hub that lets nobody in; for owner/echo it repeats the token that it was given."""

    seen: list[str]

    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "")
        self.seen.append(given)
        said = f"no entry for {given}" if "echo" in self.path else "no entry"
        body = json.dumps({"error": said}).encode()
        self.send_response(403)
        self.send_header("X-Error-Message", said)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a Hub and the Authorization header of each request."""
    seen: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Refusing,), {"seen": seen}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def written(folder: Path) -> list[Path]:
    """Return the files under a folder that hold the token."""
    return [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.slow
def test_no_verb_shows_the_token(hub: tuple[str, list[str]], folders: Folders, tmp_path: Path) -> None:
    """The token is in the environment and on the command line; the verbs succeed, fail here, and fail at the Hub."""
    url, seen = hub
    out, text = tmp_path / "out", ["--text", folders.text, "--lengths", "16", "--output"]
    commands = [
        ["inspect", folders.source, "--revision", TOKEN, "--json"],
        ["convert", folders.source, out, "--revision", TOKEN, "--no-verify", "--json"],
        ["verify", folders.source, out, "--revision", TOKEN, "--only", "tensors"],
        ["export", out, tmp_path / "back", "--to", "bloom", "--json"],
        ["evaluate", out, *text, tmp_path / "evaluated", "--revision", TOKEN],
        ["reach", out, *text, tmp_path / "reached", "--revision", TOKEN],
        ["inspect", f"https://user:{TOKEN}@huggingface.co/owner/name"],
        ["convert", f"owner/{TOKEN}", tmp_path / "none"],
        ["convert", folders.source, tmp_path / "none", "--dtype", TOKEN],
        ["evaluate", folders.source, "--text", f"/{TOKEN}"],
        ["inspect", "owner/name", "--revision", TOKEN],
        ["inspect", "owner/echo"],
        ["debug"],
        ["inspect", "owner/plain"],
        ["evaluate", "owner/plain", "--text", folders.text],
        ["reach", "owner/plain", "--text", folders.text],
        ["retrofit", "owner/plain", tmp_path / "none"],
    ]
    shown = json.dumps([[[str(word) for word in command] for command in commands], str(folders.source)])
    removed = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"HF_TOKEN": TOKEN, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_DEBUG": "1"}
    environment |= {"PYTHONPATH": str(Path(alibi_hf.__file__).parents[1]), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, shown, tmp_path / "saved", TOKEN],
        env=environment,
        capture_output=True,
        text=True,
    )
    ran = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert [status for _, status in ran] == ["0"] * 6 + ["2"] * 10, (ran, done.stderr[-3000:])
    assert done.stdout.endswith("done\n"), done.stderr[-3000:]
    assert f"Bearer {TOKEN}" in seen  # it was sent, so that it could have been shown
    assert "send_request_headers" in done.stderr  # the log is at debug level
    assert TOKEN not in done.stdout
    assert [line for line in done.stderr.splitlines() if TOKEN in line] == []
    assert written(tmp_path) == []
    commands_written = [json.loads(path.read_text()).get("command", "") for path in tmp_path.glob("*/*.json")]
    assert any("[hidden]" in command for command in commands_written)


SIGN_IN = "hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzY29wZSI6WyJvcGVuaWQiXX0.abc-DEF_ghi"
SHOWN = [TOKEN, f"a {TOKEN}.", f"--token={TOKEN}", f"https://{TOKEN}@hub/x", f"https://hub/x?token%3D{TOKEN}"]
SHOWN += ["api_org_" + "a" * 34, SIGN_IN, SIGN_IN.replace("oauth", "jwt") + "."]


@pytest.mark.parametrize("text", SHOWN)
def test_errors_and_commands_hide_tokens(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = next(part for part in (TOKEN, "a" * 34, "abc-DEF_ghi") if part in text)
    for error in (AlibiError, CheckpointFileError, UnsafeSourceError):
        raised = error(f"cannot read {text}")
        assert secret not in str(raised) and secret not in repr(raised) and "[hidden]" in str(raised)
    monkeypatch.setattr(sys, "argv", ["alibi-hf", "convert", text])
    for said in (given_command(), own_command(), in_one_line(OSError(text))):
        assert secret not in said and "[hidden]" in said


def test_what_is_no_token_stays() -> None:
    for text in (
        "hf_model",
        "alibi_hf_tests_of_the_conversion",
        "https://huggingface.co/a/b",
        "owner/name@main",
        "hf_" * 9,
    ):
        assert redact(text) == text
    assert redact("https://me:word@hub/a https://hub/b@c") == "https://[hidden]@hub/a https://hub/b@c"
