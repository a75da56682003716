"""The loopback Hub itself: what the real huggingface_hub client makes of it, in processes of their own."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.server import READ_TOKEN, WRITE_TOKEN, LoopbackHub

FILES = {"config.json": b"{}", "code/a b.py": b"x = 1\n", "model.safetensors": bytes(range(256)) * 500}


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """Give a Hub of its own."""
    with LoopbackHub() as running:
        yield running


def run(hub: LoopbackHub, home: Path, code: str, token: str | None = WRITE_TOKEN) -> dict:
    """Return the dict `said` that code fills; `api` and the whole client are at hand."""
    ahead = "import json\nfrom pathlib import Path\nfrom huggingface_hub import *\n"
    ahead += "from huggingface_hub.errors import *\napi, said = HfApi(), {}\n"
    ahead += "def kind(call, *args, **kwargs):\n    try:\n        call(*args, **kwargs)\n        return None\n"
    ahead += "    except Exception as error:\n        return type(error).__name__\n"
    done = hub.run(f"{ahead}{code}\nprint(json.dumps(said))", home, token)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def lay(folder: Path) -> Path:
    """Return a folder with FILES in it."""
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


PUSH = """
said["url"] = api.create_repo("tester/m", private=True).repo_id
said["again"] = kind(api.create_repo, "tester/m")
api.create_repo("tester/m", exist_ok=True)
first = api.upload_folder(repo_id="tester/m", folder_path=FOLDER)
said["first"] = first.oid
said["same"] = api.upload_folder(repo_id="tester/m", folder_path=FOLDER).oid
pr = api.upload_file(repo_id="tester/m", path_in_repo="n.txt", path_or_fileobj=b"pr", create_pr=True)
said["pr"] = [pr.pr_num, pr.pr_revision]
api.upload_file(repo_id="tester/m", path_in_repo="o.txt", path_or_fileobj=b"more", revision=pr.pr_revision)
api.create_branch("tester/m", branch="a/b")
api.create_tag("tester/m", tag="v1", revision=first.oid)
remove = [CommitOperationDelete("code/a b.py"), CommitOperationAdd("p.txt", b"branch")]
api.create_commit("tester/m", remove, commit_message="less", revision="a/b")
stale = [CommitOperationAdd("q.txt", b"q")]
api.create_commit("tester/m", stale, commit_message="on top", parent_commit=first.oid)
said["stale"] = kind(api.create_commit, "tester/m", stale[:0] + [CommitOperationAdd("q.txt", b"r")],
                     commit_message="late", parent_commit=first.oid)
refs = api.list_repo_refs("tester/m", include_pull_requests=True)
said["refs"] = [[r.name for r in refs.branches], [r.name for r in refs.tags], [r.ref for r in refs.pull_requests]]
said["log"] = [c.title for c in api.list_repo_commits("tester/m")]
said["files"] = api.list_repo_files("tester/m", revision="a/b")
said["who"] = api.whoami()["name"]
found = api.get_paths_info("tester/m", ["config.json", "model.safetensors"])
said["lfs"] = [file.lfs.sha256 if file.lfs else None for file in found]
"""


def test_pushing_branches_tags_and_pull_requests(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.page_size, hub.multipart_size = 2, 50_000
    said = run(hub, tmp_path, PUSH.replace("FOLDER", repr(str(lay(tmp_path / "m")))))
    assert said["url"] == "tester/m" and said["again"] == "HfHubHTTPError" and said["stale"] == "HfHubHTTPError"
    assert said["same"] == said["first"]
    assert hub.files("tester/m", said["first"]).items() >= FILES.items()
    assert said["pr"] == [1, "refs/pr/1"] and hub.files("tester/m", "refs/pr/1")["o.txt"] == b"more"
    assert "n.txt" not in hub.files("tester/m") and hub.pull_requests("tester/m")[0].number == 1
    assert said["refs"] == [["main", "a/b"], ["v1"], ["refs/pr/1"]]
    assert said["log"] == ["on top", "Upload folder using huggingface_hub", "initial commit"]
    assert said["files"] == [".gitattributes", "config.json", "model.safetensors", "p.txt"]
    assert said["who"] == "tester" and said["lfs"][0] is None and len(said["lfs"][1]) == 64
    parts = [request for request in hub.requests if request.method == "PUT"]
    assert len(parts) == 3 and not any(request.token for request in parts)  # signed links: no token leaves the Hub


PULL = """
name = "tester/m"
folder = Path(snapshot_download(name))
said["files"] = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
said["sha"], said["bytes"] = folder.name, (folder / "model.safetensors").read_bytes().hex()
said["missing"] = kind(hf_hub_download, name, "no.txt")
said["revision"] = kind(hf_hub_download, name, "config.json", revision="no")
said["repo"] = kind(hf_hub_download, "tester/no", "config.json")
said["private"] = kind(hf_hub_download, "tester/p", "config.json")
said["with_token"] = Path(hf_hub_download("tester/p", "config.json", token=READ)).read_text()
said["not_mine"] = kind(api.upload_file, repo_id=name, path_in_repo="x", path_or_fileobj=b"", token=READ)
said["wrong_token"] = kind(api.model_info, "tester/p", token="hf_wrong")
"""


def test_pulling_and_what_is_not_there(hub: LoopbackHub, tmp_path: Path) -> None:
    sha = hub.commit("tester/m", lay(tmp_path / "m"))
    hub.commit("tester/p", {"config.json": b"{}"})
    hub.repositories["tester/p"].private = True
    hub.fail("GET", "/resolve/.*config.json", 429)
    said = run(hub, tmp_path, PULL.replace("READ", repr(READ_TOKEN)), token=None)
    assert said["sha"] == sha and said["files"] == sorted([".gitattributes", *FILES])
    assert bytes.fromhex(said["bytes"]) == FILES["model.safetensors"]
    assert said["missing"] == "RemoteEntryNotFoundError" and said["revision"] == "RevisionNotFoundError"
    assert said["repo"] == said["private"] == "RepositoryNotFoundError" and said["with_token"] == "{}"
    assert said["not_mine"] == said["wrong_token"] == "HfHubHTTPError"
    assert not any(request.token for request in hub.requests if request.path.startswith("/storage/"))


RESUME = """
said["first"] = kind(hf_hub_download, "tester/m", "big.bin")
cache = Path(constants.HF_HUB_CACHE)
said["whole"] = [path.name for path in cache.rglob("*.bin")]
said["found"] = len(Path(hf_hub_download("tester/m", "big.bin")).read_bytes())
"""


def test_a_cut_download_is_never_taken_for_whole_and_goes_on_where_it_stopped(hub: LoopbackHub, tmp_path: Path) -> None:
    """The client reads in chunks of 10 MB: of half of 24 MB one chunk is kept, and asked for no more."""
    hub.commit("tester/m", {"big.bin": bytes(24 << 20)})
    faults = [hub.fail("GET", "^/storage/", answer) for answer in ("truncate", 500)]
    said = run(hub, tmp_path, "from huggingface_hub import constants\n" + RESUME)
    assert [fault.seen for fault in faults] == [1, 1]
    assert said["first"] == "HfHubHTTPError" and said["whole"] == [] and said["found"] == 24 << 20
    assert hub.ranges[0][1] == f"bytes={10 << 20}-"


CARDS = {
    "good": "---\nlicense: mit\nlanguage:\n- en\nbase_model: bigscience/bloom-560m\n---\n# x\n",
    "license": "---\nlicense: my own\n---\n",
    "language": "---\nlanguage: English\n---\n",
    "base_model": "---\nbase_model: some model\n---\n",
    "index": "---\nmodel-index:\n- name: m\n  results:\n  - task: {type: text-generation}\n    metrics: []\n---\n",
    "yaml": "---\na: b: c\n---\n",
    "twice": "---\na: 1\na: 2\n---\n",
    "none": "# no metadata\n",
}
CHECK = """
for name, card in CARDS.items():
    said[name] = kind(api.upload_file, repo_id="tester/m", path_in_repo="README.md", path_or_fileobj=card.encode())
"""


def test_metadata_is_checked(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.create("tester/m")
    said = run(hub, tmp_path, CHECK.replace("CARDS", repr(CARDS)))
    assert {name for name, kind in said.items() if kind == "ValueError"} == CARDS.keys() - {"good", "none"}
    assert said["good"] is said["none"] is None and hub.files("tester/m")["README.md"] == CARDS["none"].encode()


def test_an_upload_that_fails_is_tried_again(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.create("tester/m")
    faults = [hub.fail("PUT", "^/storage/", answer) for answer in ("truncate", 503)]
    run(hub, tmp_path, f"api.upload_folder(repo_id='tester/m', folder_path={str(lay(tmp_path / 'm'))!r})")
    assert [fault.seen for fault in faults] == [1, 1] and hub.files("tester/m").items() >= FILES.items()
