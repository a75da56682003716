"""Models pulled by id from the loopback Hub, in fresh processes without the package (code comes along) and with it."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save
from transformers import AutoTokenizer, MptForCausalLM

import alibi_hf
from alibi_hf.model.configuration_alibi import AUTO_MAP
from tests.builders import distance, ids, mpt, tokenizer
from tests.hidden import hidden
from tests.hub.server import READ_TOKEN, LoopbackHub
from tests.model.cases import build

pytestmark = pytest.mark.slow

TRAINED = 24  # length; the prompt is longer
PROMPT = ids(length=40) % 61  # below every vocabulary here
CODE = Path(alibi_hf.__file__).parent / "model"
CLEAN = Path(__file__).with_name("clean_worker.py")
PACKAGE = Path(__file__).with_name("package_worker.py")
# Repositories of which one request each is answered with a fault, or two in turn; ours, then such as are upstream's.
FAULTY = {
    "tester/busy": ("GET", "/storage/{oid}", 429),
    "tester/lost": ("GET", "/storage/{oid}", "truncate", 500),
    "tester/away": ("HEAD", "{name}/resolve/.*/config.json", 503),
}
UPSTREAM_FAULTY = {
    "tester/up-busy": ("GET", "/storage/{oid}", 429),
    "tester/up-lost": ("GET", "/storage/{oid}", "truncate", 500),
    "tester/up-away": ("HEAD", "{name}/resolve/.*/config.json", 503),
    "tester/up-limited": ("GET", "/api/models/{name}/tree", 429),
}


def logits(folder: Path) -> torch.Tensor:
    """What the model of a folder computes."""
    with torch.no_grad():
        return alibi_hf.AlibiForCausalLM.from_pretrained(folder).eval()(PROMPT).logits


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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Give the folders."""
    return Models(tmp_path_factory.mktemp("models"))


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


@pytest.fixture(scope="module")
def served(models: Models) -> Iterator[tuple[LoopbackHub, dict[str, Any]]]:
    """Give a Hub that holds all of it, and the settings."""
    with LoopbackHub() as hub:
        yield hub, fill(hub, models)


class Found(NamedTuple):
    """What the workers without the package found, online and then offline, and where they ran."""

    online: dict[str, Any]
    offline: dict[str, Any]
    home: Path


@pytest.fixture(scope="module")
def clean(
    served: tuple[LoopbackHub, dict[str, Any]], models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Found:
    """Run the worker twice in one home: with the Hub, and without."""
    hub, settings = served
    home = tmp_path_factory.mktemp("clean")
    lacking = broken(hub, "tester/ours", models.converted, models.converted_shards)
    more = {"faulty": faulty(hub, FAULTY, models.converted), "broken": lacking}
    torch.save({**settings, **more}, home / "settings.pt")
    command = hidden(CLEAN.read_text(), home / "settings.pt", home / "found.pt")
    said = []
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        environment = {"PYTHONPATH": "", "MARKER": str(home / "marker"), **offline}
        done = hub.run(command, home, env=environment, cwd=home, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(torch.load(home / "found.pt"))
    return Found(*said, home)


@pytest.fixture(scope="module")
def package(
    served: tuple[LoopbackHub, dict[str, Any]], models: Models, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Run the worker that has the package."""
    hub, settings = served
    home = tmp_path_factory.mktemp("package")
    lacking = ["someone/secret", "tester/nowhere", *broken(hub, "tester/up", models.upstream, models.shards)]
    more = {"faulty": faulty(hub, UPSTREAM_FAULTY, models.upstream), "refused": lacking}
    torch.save({**settings, **more}, home / "settings.pt")
    environment = {"PYTHONPATH": str(Path(alibi_hf.__file__).parents[1])}
    command = [sys.executable, PACKAGE, home / "settings.pt", home / "found.pt"]
    done = hub.run(command, home, READ_TOKEN, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**torch.load(home / "found.pt", weights_only=False), "said": done.stdout + done.stderr, "home": home}


@pytest.mark.parametrize("name", ["converted", "saved"])
def test_every_class_loads_by_id_without_the_package(models: Models, clean: Found, name: str) -> None:
    found, folder = clean.online[f"tester/{name}"], getattr(models, name)
    model = alibi_hf.AlibiForCausalLM.from_pretrained(folder).eval()
    assert found["module"].startswith("transformers_modules.tester") and found["config"].startswith("transformers_mod")
    with torch.no_grad():
        hidden_states = model.base_model(PROMPT)[0]
        written = model.generate(PROMPT, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert torch.equal(found["logits"], logits(folder)) and torch.equal(found["written"], written)
    assert all(torch.equal(found[auto], hidden_states) for auto in found["autos"])
    assert name == "saved" or set(found["autos"]) == AUTO_MAP.keys() - {"AutoConfig"}


def test_what_came_by_id_computes_what_upstream_does(models: Models, clean: Found) -> None:
    """Independent of this package; as far as upstream goes, which is the training length."""
    with torch.no_grad():
        upstream = MptForCausalLM.from_pretrained(models.upstream)(PROMPT[:, :TRAINED]).logits
    assert distance(clean.online["tester/converted"]["logits"][:, :TRAINED], upstream) < 1e-5
    assert clean.online["tokens"] == AutoTokenizer.from_pretrained(models.upstream)("ALiBi")["input_ids"]


def test_code_is_not_run_unless_trusted(clean: Found) -> None:
    assert all(said.startswith("ValueError") and "trust_remote_code=True" in said for said in clean.online["refused"])


def test_a_revision_pins_weights(models: Models, clean: Found) -> None:
    """Commit, tag and pull request give the old weights; main and a branch with a slash in its name the new ones."""
    *old, main, branch = clean.online["revisions"].values()
    assert all(torch.equal(found, logits(models.converted)) for found in old)
    assert torch.equal(main, logits(models.new)) and torch.equal(branch, main) and not torch.equal(main, old[0])


def test_only_code_revision_pins_code_of_another_repository(models: Models, clean: Found) -> None:
    for name, ran in (("pinned", False), ("not pinned", True)):
        assert torch.equal(clean.online[f"code {name}"], logits(models.converted))
        assert clean.online[f"ran when {name}"] is ran


def test_a_private_repository_needs_a_token(models: Models, clean: Found) -> None:
    assert "OSError" in clean.online["secret"] and "token" in clean.online["secret"]
    assert torch.equal(clean.online["secret with token"], logits(models.converted))
    files = [path for path in clean.home.rglob("*") if path.is_file() and path.name != "settings.pt"]
    assert files and not any(READ_TOKEN.encode() in path.read_bytes() for path in files)


def test_without_a_trusted_whole_there_is_no_model(clean: Found) -> None:
    """A missing config, a missing shard and a file cut in half: an error, whatever was read before it."""
    assert "config.json" in clean.online["tester/ours-no-config"]
    assert "-of-" in clean.online["tester/ours-no-shard"]
    assert "SafetensorError" in clean.online["tester/ours-half"]


@pytest.mark.parametrize("worker", ["clean", "package"])
def test_faults_are_overcome_or_named_and_the_next_try_works(
    models: Models, worker: str, request: pytest.FixtureRequest
) -> None:
    """A cut download is named when the Hub then fails, and is never taken for whole."""
    found = request.getfixturevalue(worker)
    found, faults = (found.online, FAULTY) if worker == "clean" else (found, UPSTREAM_FAULTY)
    for name in faults:
        first, second = found[name]
        assert torch.equal(second, logits(models.converted)), name
        if "lost" in name:
            assert "500" in first
        else:
            assert torch.equal(first, second), name


def test_the_cache_is_enough_offline(models: Models, clean: Found) -> None:
    assert torch.equal(clean.offline["offline"], logits(models.converted))
    assert torch.equal(clean.offline["offline pinned"], logits(models.converted))
    assert clean.offline["never seen"].startswith("OSError")


@pytest.mark.parametrize("name", ["tester/moving", "tester/upstream"])
def test_from_pretrained_by_id_in_our_layout_and_in_upstreams(
    models: Models, package: dict[str, Any], served: tuple[LoopbackHub, dict[str, Any]], name: str
) -> None:
    found, old, new = package[name], logits(models.converted), logits(models.new)
    *first, main, branch = served[1]["revisions"][name]
    assert not torch.equal(old, new)
    assert all(torch.equal(found[revision], old) for revision in first)
    assert all(torch.equal(found[how], new) for how in (main, branch, "cache_dir", "local_files_only"))
    assert "OSError" in found["not in this cache"] or "CheckpointFileError" in found["not in this cache"]
    assert found["auto"].startswith("alibi_hf." if name == "tester/moving" else "transformers.")
    assert all(torch.equal(logits, old) for logits in package["subfolder"])


def test_the_verbs_take_an_id_and_write_down_its_commit(
    models: Models, package: dict[str, Any], served: tuple[LoopbackHub, dict[str, Any]]
) -> None:
    hub, settings = served
    pinned = settings["revisions"]["tester/upstream"][0]
    assert package["inspect"] == pinned and "converted already" in package["inspect ours"]
    assert (package["conversion"]["path_or_id"], package["conversion"]["revision"]) == ("tester/upstream", pinned)
    assert torch.equal(package["converted"], logits(models.converted))
    heads = [hub.commits(name)[-1].sha for name in ("tester/upstream", "tester/converted")]
    assert [model["revision"] for model in package["evaluation"]["models"]] == heads
    losses = [model["readings"][0]["loss"] for model in package["evaluation"]["models"]]
    assert losses[0] != losses[1]  # main is another model by now


def test_what_cannot_be_had_is_named_and_leaves_nothing(package: dict[str, Any]) -> None:
    said = {
        "someone/secret": "no such repository, or it is private and needs a token",
        "tester/nowhere": "no such repository, or it is private and needs a token",
        "tester/up-no-config": "config.json",
        "tester/up-no-shard": r"the shard .*model-00002-of-00002.safetensors is missing",
        "tester/up-half": r"model.safetensors is \d+ bytes long, its header says",
    }
    for name, pattern in said.items():
        for verb in ("inspect", "convert", "load"):
            found = package[name][verb]
            hidden = verb == "load" and ("secret" in name or "nowhere" in name)  # which Transformers names
            assert re.search(
                r"^OSError: .*token" if hidden else rf"^CheckpointFileError: .*{pattern}", found, re.DOTALL
            )
    assert package["no revision"].endswith("it has no branch, tag or commit 'v9'.") and package["left behind"] == []


def test_the_login_is_used_and_never_shown(models: Models, package: dict[str, Any]) -> None:
    assert package["with login"] == "tester/secret-2" and torch.equal(package["token="], logits(models.converted))
    assert re.search("private and needs a token", package["without login"])
    assert package["cli"][0] == 2 and "private and needs a token" in package["cli"][1]
    written = [path for path in package["home"].rglob("*") if path.is_file() and path.name != "settings.pt"]
    assert READ_TOKEN not in package["said"]
    assert written and not any(READ_TOKEN.encode() in path.read_bytes() for path in written)
