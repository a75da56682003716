"""What the tests of pulling put on the loopback Hub: models in each layout, with a history, with faults, with holes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

import alibi_hf
from alibi_hf.model.configuration_alibi import AUTO_MAP
from tests.builders import ids, mpt, tokenizer
from tests.hub.server import READ_TOKEN, LoopbackHub
from tests.model.cases import build

TRAINED = 24  # length; the prompt is longer
PROMPT = ids(length=40) % 61  # below every vocabulary here
CODE = Path(alibi_hf.__file__).parent / "model"


def code() -> dict[str, bytes]:
    """The code files that travel with a model."""
    return {path.name: path.read_bytes() for path in CODE.glob("*_alibi.py")}


class Models:
    """Folders made once, two models (old and new) in each layout, and one saved."""

    def __init__(self, root: Path) -> None:
        self.upstream, self.new_upstream = (
            tokenizer(mpt(root / name, seed=seed, length=TRAINED))
            for seed, name in enumerate(("upstream", "new_upstream"))
        )
        self.converted, self.new = root / "converted", root / "new"
        alibi_hf.convert(self.upstream, self.converted, verify=False)
        alibi_hf.convert(self.new_upstream, self.new, verify=False)
        self.shards = mpt(root / "shards", shards=2)
        self.converted_shards = root / "converted_shards"
        alibi_hf.convert(self.upstream, self.converted_shards, verify=False, max_shard_size="100KB")
        self.saved = root / "saved"
        build("twelve_grouped", torch.float32).save_pretrained(self.saved)


def marked(folder: Path, mark: str) -> dict[str, bytes]:
    """Files of a folder, the weights another file with the same tensors: storage knows files by what they hold."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return {**files, "model.safetensors": save(load_file(folder / "model.safetensors"), {"format": "pt", "mark": mark})}


def oid(hub: LoopbackHub, name: str) -> str:
    """The SHA-256 by which storage knows the weights of a repository."""
    return hashlib.sha256(hub.files(name)["model.safetensors"]).hexdigest()


def moving(hub: LoopbackHub, name: str, old: Path, new: Path) -> list[str]:
    """A repository with a history; returns revisions, the first three with the old weights."""
    sha = hub.commit(name, old)
    hub.repositories[name].branch("refs/tags/v1", sha)
    hub.repositories[name].open_pull_request("as it was")
    hub.commit(name, new, "next/step")
    hub.commit(name, new)
    return [sha, "v1", "refs/pr/1", "main", "next/step"]


def faulty(hub: LoopbackHub, faults: dict[str, tuple], folder: Path) -> list[str]:
    """Repositories that fail; returns their names."""
    for name, (method, pattern, *answers) in faults.items():
        hub.commit(name, marked(folder, name))
        for answer in answers:
            hub.fail(method, pattern.format(name=name, oid=oid(hub, name)), answer)
    return list(faults)


def broken(hub: LoopbackHub, prefix: str, folder: Path, shards: Path) -> list[str]:
    """Repositories that lack something; returns their names."""
    whole, parts = ({path.name: path.read_bytes() for path in held.iterdir()} for held in (folder, shards))
    last = max(name for name in parts if name.endswith(".safetensors"))
    lacking = {
        "no-config": {name: data for name, data in whole.items() if name != "config.json"},
        "no-shard": {name: data for name, data in parts.items() if name != last},
        "half": {**whole, "model.safetensors": whole["model.safetensors"][:-5000]},
    }
    for what, files in lacking.items():
        hub.commit(f"{prefix}-{what}", files)
    return [f"{prefix}-{what}" for what in lacking]


def fill(hub: LoopbackHub, models: Models) -> dict[str, Any]:
    """Commit all that the workers pull; returns their settings."""
    hub.commit("tester/converted", models.converted)
    hub.commit("tester/saved", models.saved)
    folders = {"ours": models.converted, "deep/theirs": models.upstream}
    files = {f"{name}/{path.name}": path.read_bytes() for name, folder in folders.items() for path in folder.iterdir()}
    hub.commit("tester/folders", files)
    revisions = {
        "tester/moving": moving(hub, "tester/moving", models.converted, models.new),
        "tester/upstream": moving(hub, "tester/upstream", models.upstream, models.new_upstream),
    }
    for name in ("tester/secret", "tester/secret-2", "tester/secret-3", "someone/secret"):
        hub.create(name, private=True)
        hub.commit(name, models.upstream if name != "tester/secret" else models.converted)
    return {
        "ids": PROMPT,
        "heads": list(AUTO_MAP)[1:],
        "token": READ_TOKEN,
        "revisions": revisions,
        **borrow(hub, models),
    }


def borrow(hub: LoopbackHub, models: Models) -> dict[str, str]:
    """A repository whose code is another's, and that one: first good code, then such as leaves a mark when it runs."""
    good = code()
    pinned = hub.commit("tester/code", good)
    evil = b"\nimport os, pathlib\npathlib.Path(os.environ['MARKER']).touch()\n"
    hub.commit("tester/code", {"configuration_alibi.py": good["configuration_alibi.py"] + evil})
    files = {path.name: path.read_bytes() for path in models.converted.iterdir() if path.is_file()}
    files = {name: data for name, data in files.items() if name not in good}
    config = json.loads(files["config.json"])
    config["auto_map"] = {auto: f"tester/code--{name}" for auto, name in AUTO_MAP.items()}
    weights = hub.commit("tester/borrowing", {**files, "config.json": json.dumps(config).encode()})
    return {"code": pinned, "weights": weights}
