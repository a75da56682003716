"""Models pulled by id from the loopback Hub, in fresh processes without the package (code comes along) and with it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer, MptForCausalLM

import alibi_hf
from alibi_hf.model.configuration_alibi import AUTO_MAP
from tests.builders import distance
from tests.hidden import hidden
from tests.hub.pulled import PROMPT, TRAINED, Models, broken, faulty, fill
from tests.hub.server import READ_TOKEN, LoopbackHub

pytestmark = pytest.mark.slow

OLD_CLIENT = int(huggingface_hub.__version__.partition(".")[0]) < 2
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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Give the folders."""
    return Models(tmp_path_factory.mktemp("models"))


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
        elif isinstance(first, str) and OLD_CLIENT:  # which tries fewer answers again by itself
            assert any(status in first for status in ("429", "500", "503")), first
        else:
            assert torch.equal(first, second), name


def test_every_fault_struck(served: tuple[LoopbackHub, dict[str, Any]], clean: Found, package: dict[str, Any]) -> None:
    assert served[0].faults.asked and not any(fault.left for fault in served[0].faults.asked)


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
