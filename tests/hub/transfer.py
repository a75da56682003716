"""Files on the way: uploads to storage (git LFS, basic and in parts) and downloads, ranges of them too."""

import hashlib
import re
from typing import TYPE_CHECKING, Any

from tests.hub.calls import REPO, Answer, Call, as_json, readable, require_write, route
from tests.hub.repositories import HubError

if TYPE_CHECKING:
    from tests.hub.server import LoopbackHub


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def _lfs_batch(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    """Where large files are to be put: nowhere if they are there, in one piece, or in parts."""
    repository = readable(hub, call, found[0])
    require_write(hub, call, None)
    objects = []
    for wanted in call.json["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        said = {"oid": oid, "size": size}
        if oid not in hub.stored:
            verify = {"href": f"{hub.url}/{repository.repo_id}.git/info/lfs/objects/verify"}
            said["actions"] = {"upload": _upload(hub, repository.repo_id, oid, size), "verify": verify}
        objects.append(said)
    return as_json({"transfer": "basic", "objects": objects})


def _upload(hub: "LoopbackHub", repo_id: str, oid: str, size: int) -> dict[str, Any]:
    link, part_size = f"{hub.storage_url}/storage/{oid}", hub.multipart_size
    if part_size is None or size <= part_size:
        return {"href": f"{link}?signature={oid[:8]}"}
    count = -(-size // part_size)
    parts = {str(number): f"{link}/{number}?signature={oid[:8]}" for number in range(1, count + 1)}
    return {"href": f"{hub.url}/api/complete_multipart/{oid}", "header": {"chunk_size": str(part_size), **parts}}


@route("PUT", r"/storage/([0-9a-f]{64})(?:/(\d+))?")
def _put(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    """Storage keeps what it is sent, whole; a signed link needs no token."""
    oid, part = found
    if call.query.get("signature") != oid[:8] or call.token is not None:
        raise HubError(403, "Storage takes a signed link, and no token.")
    if part:
        hub.parts.setdefault(oid, {})[int(part)] = call.body
        return Answer(200, headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})
    return _store(hub, oid, call.body)


@route("POST", r"/api/complete_multipart/([0-9a-f]{64})")
def _complete(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    held = hub.parts.pop(found[0], {})
    told = {part["partNumber"]: part["etag"].strip('"') for part in call.json["parts"]}
    if told != {number: hashlib.md5(data).hexdigest() for number, data in held.items()}:
        raise HubError(400, "the parts named are not the parts held")
    return _store(hub, found[0], b"".join(held[number] for number in sorted(held)))


def _store(hub: "LoopbackHub", oid: str, data: bytes) -> Answer:
    if hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, f"what came is not {oid}")
    hub.stored[oid] = data
    return Answer(200)


@route("POST", rf"/{REPO}\.git/info/lfs/objects/verify")
def _verify(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    if len(hub.stored.get(call.json["oid"], b"")) != call.json["size"]:
        raise HubError(404, f"{call.json['oid']} is not here in full")
    return as_json({})


@route("GET", f"/{REPO}/resolve/([^/]+)/(.+)")
def _resolve(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    """A small file itself; of a large one where storage has it."""
    commit, data = readable(hub, call, found[0]).file(found[1], found[2])
    entry = commit.entry(found[2])
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
    if "lfs" not in entry:
        return _ranged(call, data, headers)
    oid = entry["lfs"]["oid"]
    hub.stored[oid] = data
    headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
    headers["Location"] = f"{hub.storage_url}/storage/{oid}?signature={oid[:8]}"
    return Answer(302, headers=headers)


@route("GET", r"/storage/([0-9a-f]{64})")
def _get(hub: "LoopbackHub", call: Call, found: tuple[str, ...]) -> Answer:
    if call.query.get("signature") != found[0][:8] or call.token is not None:
        raise HubError(403, "Storage takes a signed link, and no token.")
    return _ranged(call, hub.stored[found[0]], {"ETag": f'"{found[0]}"', "Accept-Ranges": "bytes"})


def _ranged(call: Call, data: bytes, headers: dict[str, str]) -> Answer:
    """All of it, or from where the caller has it: `Range: bytes=N-` and `bytes=N-M`."""
    asked = {name.lower(): value for name, value in call.headers.items()}.get("range", "")
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
    if not found:
        return Answer(200, data, headers)
    first, last = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
    if first >= len(data):
        raise HubError(416, f"{asked} of {len(data)} bytes")
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return Answer(206, data[first : last + 1], headers)
