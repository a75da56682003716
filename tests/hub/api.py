"""The Hub's API, address by address, as huggingface_hub 1.31 to 2.4 speak it; `transfer` has what moves files."""

import base64
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.hub.calls import REPO, Answer, Call, as_json, readable, require_write, route, writable
from tests.hub.metadata import card_data, validate
from tests.hub.repositories import Commit, HubError, blob_id, is_large

if TYPE_CHECKING:
    from tests.hub.server import LoopbackHub


@route("GET", "/api/whoami-v2")
def _whoami(hub: "LoopbackHub", call: Call, _: tuple[str, ...]) -> Answer:
    if call.token is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "loopback", "role": hub.tokens[call.token], "createdAt": "2026-01-01T00:00:00.000Z"}
    orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in hub.organisations]
    said = {"type": "user", "name": hub.account, "fullname": hub.account, "orgs": orgs, "isPro": False}
    return as_json({**said, "auth": {"type": "access_token", "accessToken": token}})


@route("POST", "/api/validate-yaml")
def _validate_yaml(hub: "LoopbackHub", call: Call, _: tuple[str, ...]) -> Answer:
    errors, warnings = validate(call.json["content"])
    said = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return as_json(said, 400 if errors else 200)


@route("POST", "/api/repos/create")
def _create(hub: "LoopbackHub", call: Call, _: tuple[str, ...]) -> Answer:
    wanted = call.json
    if wanted.get("type") not in (None, "model"):
        raise HubError(400, f"no repositories of type {wanted['type']} here")
    require_write(hub, call, None)
    namespace = wanted.get("organization") or hub.account
    repo_id = f"{namespace}/{wanted['name']}"
    said = {"url": f"{hub.url}/{repo_id}", "name": repo_id, "id": blob_id(repo_id.encode())[:24]}
    if repo_id in hub.repositories:
        return as_json({**said, "error": "You already created this model repo"}, 409)
    require_write(hub, call, namespace)
    hub.create(repo_id, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return as_json(said)


@route("PUT", f"/api/models/{REPO}/settings")
def _settings(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    repository = writable(hub, call, found[0])
    repository.private = call.json.get("visibility") == "private" or bool(call.json.get("private"))
    return as_json({"private": repository.private})


@route("GET", f"/api/models/{REPO}(?:/revision/([^/]+))?")
def _info(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    repository = readable(hub, call, found[0])
    commit = repository.resolve(found[1] or "main")
    card = card_data(commit.files.get("README.md", b"").decode())
    return as_json({**repository.info(commit), **({"cardData": card} if card else {})})


@route("GET", f"/api/models/{REPO}/tree/([^/]+)(?:/(.+))?")
def _tree(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    commit = readable(hub, call, found[0]).resolve(found[1])
    entries = commit.tree(found[2], call.query.get("recursive", "").lower() in ("true", "1"))
    first = int(call.query.get("cursor", 0))
    page, rest = entries[first : first + hub.page_size], entries[first + hub.page_size :]
    address = call.path.partition("&cursor=")[0]
    link = f'<{hub.url}{address}&cursor={first + hub.page_size}>; rel="next"'
    return as_json(page, **({"Link": link} if rest else {}))


@route("POST", f"/api/models/{REPO}/paths-info/([^/]+)")
def _paths_info(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    commit = readable(hub, call, found[0]).resolve(found[1])
    given = call.json if call.body.startswith(b"{") else parse_qs(call.body.decode())
    return as_json([commit.entry(path) for path in given.get("paths", []) if path in commit.files])


@route("GET", f"/api/models/{REPO}/refs")
def _refs(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    return as_json(readable(hub, call, found[0]).references(call.query.get("include_prs") == "1"))


@route("GET", f"/api/models/{REPO}/commits/([^/]+)")
def _commits(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    return as_json(readable(hub, call, found[0]).resolve(found[1]).log())


@route("POST", f"/api/models/{REPO}/branch/([^/]+)")
def _branch(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    writable(hub, call, found[0]).branch(found[1], call.json.get("startingPoint", "main"))
    return as_json({})


@route("POST", f"/api/models/{REPO}/tag/([^/]+)")
def _tag(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    writable(hub, call, found[0]).branch(f"refs/tags/{call.json['tag']}", found[1])
    return as_json({})


@route("POST", f"/api/models/{REPO}/preupload/([^/]+)")
def _preupload(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    """How each file is to be sent, and the id of what is there now, so that a file that is the same is left out."""
    held = writable(hub, call, found[0]).resolve(found[1])
    files = []
    for file in call.json["files"]:
        large = is_large(file["path"], base64.b64decode(file["sample"]), file["size"])
        said = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if file["path"] in held.files:
            entry = held.entry(file["path"])
            said["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        files.append(said)
    return as_json({"files": files, "commitOid": held.sha})


@route("POST", f"/api/models/{REPO}/commit/([^/]+)")
def _commit(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    repository = writable(hub, call, found[0])
    lines = [json.loads(line) for line in call.body.splitlines() if line]
    header: dict[str, str] = {}
    changes: dict[str, bytes | None] = {}
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "header":
            header = value
        else:
            changes.update(_change(hub, repository.resolve(found[1]), key, value))
    readme = changes.get("README.md")
    if readme and (errors := validate(readme.decode())[0]):
        raise HubError(400, "Invalid metadata in README.md.\n- " + "\n- ".join(errors))
    commit, request = repository.commit(
        found[1],
        changes,
        header.get("summary", ""),
        header.get("description", ""),
        header.get("parentCommit"),
        call.query.get("create_pr") == "1",
    )
    said = {"success": True, "commitOid": commit.sha, "hookOutput": ""}
    said["commitUrl"] = f"{hub.url}/{repository.repo_id}/commit/{commit.sha}"
    if request:
        said["pullRequestUrl"] = f"{hub.url}/{repository.repo_id}/discussions/{request.number}"
    return as_json(said)


def _change(hub: "LoopbackHub", head: Commit, key: str, value: dict[str, Any]) -> dict[str, bytes | None]:
    """What one line of a commit does, by path."""
    path = value["path"]
    if key == "file":
        data = base64.b64decode(value["content"])
        if is_large(path, data[:512], len(data)) and data:
            raise HubError(400, f"Your push was rejected because it contains binary files: {path}")
        return {path: data}
    if key == "lfsFile":
        if value["oid"] not in hub.stored:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        return {path: hub.stored[value["oid"]]}
    if key == "deletedFile":
        if path not in head.files:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        return {path: None}
    if key == "deletedFolder":
        return dict.fromkeys(name for name in head.files if name.startswith(path.rstrip("/") + "/"))
    raise HubError(400, f"unknown operation {key}")
