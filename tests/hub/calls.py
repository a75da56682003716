"""A request to the loopback Hub, an answer, the table of routes, and who may do what."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.repositories import HubError, Repository

if TYPE_CHECKING:
    from tests.hub.server import LoopbackHub


@dataclass
class Call:
    """A request: `path` with its query; `token` as given, valid or not."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    token: str | None

    @property
    def query(self) -> dict[str, str]:
        """The last value of each parameter of the query."""
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """What is sent back."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


Route = Callable[["LoopbackHub", Call, tuple[str, ...]], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
REPO = r"([^/]+/[^/]+?)"


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Enter a function into the table; it is given the unquoted groups of `pattern`, "" for one that is not there."""

    def add(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return add


def answer(hub: "LoopbackHub", call: Call) -> Answer:
    """The answer of the route that fits; `HubError` 404 where none does."""
    if call.token is not None and call.token not in hub.tokens:
        raise HubError(401, "Invalid credentials in Authorization header")
    path = urlsplit(call.path).path
    for method, pattern, function in ROUTES:
        if method == call.method.replace("HEAD", "GET") and (found := pattern.fullmatch(path)):
            return function(hub, call, tuple(unquote(group or "") for group in found.groups()))
    raise HubError(404, f"Sorry, we can't find {call.method} {path}")


def namespaces(hub: "LoopbackHub") -> set[str]:
    """Whose private repositories the tokens show, and which they may write."""
    return {hub.account, *hub.organisations}


def readable(hub: "LoopbackHub", call: Call, repo_id: str) -> Repository:
    """A repository that the caller may see: the Hub does not say whether a private one exists."""
    repository = hub.repositories.get(repo_id)
    visible = repository and (not repository.private or (call.token and repository.namespace in namespaces(hub)))
    if repository is None or not visible:
        if call.token is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")
    return repository


def require_write(hub: "LoopbackHub", call: Call, namespace: str | None) -> None:
    """Refuse who may not write; a namespace of None is any, as for a pull request."""
    if call.token is None:
        raise HubError(401, "Invalid username or password.")
    if hub.tokens[call.token] != "write":
        raise HubError(403, "Forbidden: you must use a write token to write to a repository.")
    if namespace is not None and namespace not in namespaces(hub):
        raise HubError(403, f'You don\'t have the rights to write under the namespace "{namespace}"')


def writable(hub: "LoopbackHub", call: Call, repo_id: str) -> Repository:
    """A repository that the caller may write to, or open a pull request in if that is what is asked."""
    repository = readable(hub, call, repo_id)
    require_write(hub, call, None if call.query.get("create_pr") == "1" else repository.namespace)
    return repository
