"""Pushes to a loopback Hub with the real client; run as `pushing.py FOLDER OUTPUT`, in a process of its own.

The client reads its environment on import, so that each part runs here, one after the other, and writes what it found
to OUTPUT/found.json. What was pushed is loaded in a third process, in which the package cannot be found.
"""

import json
import os
import sys
import time
from pathlib import Path

from tests.hidden import hidden
from tests.hub.server import READ_TOKEN, WRITE_TOKEN, LoopbackHub

FOLDER, OUTPUT = map(Path, sys.argv[1:])
HUB = LoopbackHub().__enter__()
os.environ.update(HUB.environment(OUTPUT / "home", WRITE_TOKEN))
os.environ.pop("HF_HUB_OFFLINE", None)
time.sleep = lambda seconds: None  # the client waits between its attempts

import torch
from transformers import Trainer, TrainingArguments

import alibi_hf
import alibi_hf.hub.push as module
from tests.model.cases import build

torch.set_num_threads(1)
found: dict = {}
IDS = torch.arange(3, 43)[None]


def push(repo_id: str, **options):
    """Return what was pushed, and the methods and paths that it took."""
    before = len(HUB.requests)
    report = alibi_hf.push(FOLDER, repo_id, **options)
    return report, [(request.method, request.path) for request in HUB.requests[before:]]


def puts(requests) -> list[str]:
    return sorted(path.split("/")[2].split("?")[0] for method, path in requests if method == "PUT")


def refused(repo_id: str, **options) -> str:
    try:
        alibi_hf.push(FOLDER, repo_id, **options)
    except alibi_hf.HubError as error:
        assert error.__context__ is None or error.__suppress_context__  # a traceback would quote it
        return str(error)
    raise AssertionError(f"{repo_id} was pushed")


def logs(repo_id: str, revision: str = "main") -> list[str]:
    return [commit.sha for commit in HUB.commits(repo_id, revision)]


def plain() -> dict:
    report, requests = push("tester/plain", private=True)
    report.save(OUTPUT)
    module.preflight = lambda *args: []  # once is enough: the folder is the same
    again, repeated = push("tester/plain", private=True)
    HUB.commit("tester/plain", {"notes.txt": b"mine"})
    other, _ = push("tester/plain")
    files = HUB.files("tester/plain")
    return {
        "preflight": [entry.name for entry in report.preflight],
        "commits": logs("tester/plain"),
        "pushed": [report.uploaded.commit, report.uploaded.card_commit],
        "again": [again.uploaded.commit, again.uploaded.card_commit],
        "other": [other.uploaded.commit, other.uploaded.card_commit],
        "files": sorted(files),
        "same": all(files[name] == (FOLDER / name).read_bytes() for name in files if (FOLDER / name).exists()),
        "card": files["README.md"].decode(),
        "puts": [puts(requests), puts(repeated)],
        "private": HUB.repositories["tester/plain"].private,
    }


def pull_request() -> dict:
    old = ("model-00001-of-00009.safetensors", "old_alibi.py", "adapter_config.json", "retrofit.json")
    HUB.commit("team/pr", dict.fromkeys((*old, "a/model.safetensors", "evaluation.json"), b"old"))
    before = HUB.files("team/pr")
    report, _ = push("team/pr", create_pr=True)
    number = [request.revision for request in HUB.pull_requests("team/pr")]
    once = logs("team/pr", number[0])
    more, _ = push("team/pr", revision=number[0])
    return {
        "revisions": [*number, report.uploaded.revision],
        "main": HUB.files("team/pr") == before,
        "commits": once[-2:] == [report.uploaded.commit, report.uploaded.card_commit],
        "again": logs("team/pr", number[0]) == once and more.uploaded.commit == once[-2],
        "deleted": report.uploaded.deleted,
        "left": sorted(name for name in before if name in HUB.files("team/pr", number[0])),
        "url": report.uploaded.url,
    }


def branch() -> dict:
    report, _ = push("tester/branch", revision="try/this", message="a try")
    commits = HUB.commits("tester/branch", "try/this")
    return {
        "main": sorted(HUB.files("tester/branch")),
        "titles": [commit.title for commit in commits],
        "revision": report.uploaded.revision,
        "files": sorted(HUB.files("tester/branch", "try/this")),
    }


def interrupted() -> dict:
    """One shard breaks off at every attempt; then the commit fails; then all is well."""
    oids = {file["sha256"] for file in json.loads((FOLDER / "conversion.json").read_text())["output"]["files"]}
    HUB.stored.clear()
    broken = sorted(oids)[0]
    HUB.fail("PUT", broken, "truncate", times=99)
    said = [refused("tester/cut")]
    held = sorted(HUB.stored)
    HUB.faults.clear()
    HUB.fail("POST", "tester/cut/commit", 500)
    start = len(HUB.requests)
    said.append(refused("tester/cut"))
    second = puts((request.method, request.path) for request in HUB.requests[start:])
    files = sorted(HUB.files("tester/cut"))
    _, requests = push("tester/cut")
    return {
        "said": said,
        "broken": broken,
        "others": sorted(oids - {broken}),
        "held": held,
        "second": second,
        "empty": files,
        "third": puts(requests),
        "commits": len(logs("tester/cut")),
        "whole": sorted(HUB.files("tester/cut")),
    }


def card_cut() -> dict:
    """The card is cut off; the next push adds it to the commit that is there."""
    HUB.fail("POST", "validate-yaml", "drop", times=99)
    said = refused("tester/card")
    HUB.faults.clear()
    once = logs("tester/card")
    report, requests = push("tester/card")
    return {
        "said": said,
        "pinned": [once[-1], report.uploaded.commit],
        "card": HUB.files("tester/card")["README.md"].decode(),
        "puts": puts(requests),
    }


def errors() -> dict:
    said = {
        "401": refused("tester/e", token="hf_noSuchTokenAtAllxxxxxxxxxxxxxx"),
        "403": refused("tester/e", token=READ_TOKEN),
        "other": refused("stranger/e"),
        "404": refused("tester/plain", revision="refs/pr/99"),
    }
    HUB.commit("tester/open", {"a.txt": b"a"})
    said["public"] = refused("tester/open", private=True)
    for name, status in {"429": 429, "503": 503}.items():
        HUB.fail("POST", "tester/open/(preupload|commit)", status, times=99)
        said[name] = refused("tester/open")
        HUB.faults.clear()
    HUB.fail("POST", "repos/create", "drop", times=99)
    said["drop"] = refused("tester/e")
    HUB.faults.clear()
    return {"said": said, "made": "tester/e" in HUB.repositories, "open": sorted(HUB.files("tester/open"))}


def every_class() -> dict:
    """`push_to_hub` of every class, of a model with an FSDP-like class, of a merged adapter, and of Trainer."""
    heads = {auto: getattr(alibi_hf, name.rpartition(".")[2]) for auto, name in alibi_hf.AlibiConfig().auto_map.items()}
    alibi_hf.AlibiConfig().push_to_hub("tester/config")
    truth = {}
    for auto, cls in heads.items():
        if auto != "AutoConfig":
            model = build("six", torch.float32, cls=cls)
            model.push_to_hub(f"tester/{auto.lower()}", private=True)
            truth[f"tester/{auto.lower()}"] = (auto, model)
    model = build("six", torch.float32)
    own, kind = type(model), torch.distributed.fsdp.FSDPModule
    model.__class__ = type("FSDPAlibiForCausalLM", (kind, own), {"__module__": kind.__module__})
    model.push_to_hub("tester/fsdp")
    model.__class__ = own
    truth["tester/fsdp"] = ("AutoModelForCausalLM", model)
    again = alibi_hf.AlibiForCausalLM.from_pretrained(FOLDER)
    again.push_to_hub("tester/resaved")
    truth["tester/plain"] = truth["tester/resaved"] = ("AutoModelForCausalLM", again)
    truth["tester/merged"] = ("AutoModelForCausalLM", merged())
    truth["tester/trained"] = ("AutoModelForCausalLM", trained())
    outputs = {}
    for repo_id, (auto, model) in truth.items():
        with torch.no_grad():
            outputs[repo_id] = (auto, model.eval()(IDS)[0])
    torch.save(outputs, OUTPUT / "truth.pt")
    pushed = {repo_id: HUB.files(repo_id) for repo_id in truth.keys() - {"tester/plain"} | {"tester/config"}}
    return {repo_id: (sorted(files), files["README.md"].decode()) for repo_id, files in pushed.items()}


def merged():
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build("six", torch.float32), LoraConfig(init_lora_weights=False))
    model = adapted.merge_and_unload()
    model.push_to_hub("tester/merged")
    return model


def trained():
    options = {"push_to_hub": True, "hub_model_id": "tester/trained", "report_to": "none", "max_steps": 1}
    model = build("six", torch.float32)
    data = [{"input_ids": IDS[0], "labels": IDS[0]}]
    settings = TrainingArguments(OUTPUT / "trained", save_strategy="no", use_cpu=True, disable_tqdm=True, **options)
    trainer = Trainer(model, settings, train_dataset=data)
    trainer.train()
    trainer.push_to_hub()
    return model


# Runs where the package cannot be found: what was pushed is loaded by its id, and one is pushed from there.
LOADER = """
import json, sys
from pathlib import Path

import torch, transformers

torch.set_num_threads(1)
output, commit = Path(sys.argv[1]), sys.argv[2]
ids, equal = torch.arange(3, 43)[None], {}
for repo_id, (auto, truth) in torch.load(output / "truth.pt").items():
    pinned = {"revision": commit, "code_revision": commit} if repo_id == "tester/plain" else {}
    model = getattr(transformers, auto).from_pretrained(repo_id, trust_remote_code=True, **pinned).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    with torch.no_grad():
        equal[repo_id] = torch.equal(model(ids)[0], truth)
model.push_to_hub("tester/again")
again = transformers.AutoModelForCausalLM.from_pretrained("tester/again", trust_remote_code=True).eval()
with torch.no_grad():
    equal["tester/again"] = torch.equal(again(ids)[0], model(ids)[0])
text = "To the Hub."
tokens = transformers.AutoTokenizer.from_pretrained("tester/plain", revision=commit)(text)["input_ids"]
config = transformers.AutoConfig.from_pretrained("tester/config", trust_remote_code=True)
said = {"equal": equal, "tokens": len(tokens), "config": type(config).__name__}
(output / "loaded.json").write_text(json.dumps(said))
"""


def loaded() -> dict:
    command = hidden(LOADER, OUTPUT, found["plain"]["pushed"][0])
    environment = {"HF_MODULES_CACHE": str(OUTPUT / "modules"), "PYTHONPATH": ""}
    done = HUB.run(command, OUTPUT / "fresh", WRITE_TOKEN, env=environment, cwd=OUTPUT)
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads((OUTPUT / "loaded.json").read_text()), "again": sorted(HUB.files("tester/again"))}


for part in (plain, pull_request, branch, interrupted, card_cut, errors, every_class, loaded):
    found[part.__name__] = part()
(OUTPUT / "found.json").write_text(json.dumps(found))
HUB.__exit__()
