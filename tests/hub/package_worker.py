"""Reads models by id with the package installed; run by `test_pull`, which says what should come of it.

Its arguments: a file with the settings, and one for what it found.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import alibi_hf
from alibi_hf.cli import app

given = torch.load(sys.argv[1])
home = Path(sys.argv[2]).parent
found: dict = {}


def logits(name: str, **kwargs) -> torch.Tensor:
    """What the model of an id computes in this package."""
    with torch.no_grad():
        return alibi_hf.AlibiForCausalLM.from_pretrained(name, **kwargs).eval()(given["ids"]).logits


def attempt(call, *args, **kwargs):
    """What a call returns, or the kind and text of what it raises."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def loading() -> None:
    """`from_pretrained` and what it takes, in our layout and in upstream's."""
    for name in ("tester/moving", "tester/upstream"):
        said = {revision: logits(name, revision=revision) for revision in given["revisions"][name]}
        cache = {"cache_dir": home / "elsewhere"}
        said["not in this cache"] = attempt(logits, name, local_files_only=True, **cache)
        said["cache_dir"] = logits(name, **cache)
        said["local_files_only"] = logits(name, local_files_only=True, **cache)
        said["auto"] = type(AutoModelForCausalLM.from_pretrained(name, revision=given["revisions"][name][0])).__module__
        found[name] = said
    found["subfolder"] = [logits("tester/folders", subfolder=folder) for folder in ("ours", "deep/theirs")]


def verbs() -> None:
    """Inspect, convert and evaluate by id."""
    found["inspect"] = alibi_hf.inspect_checkpoint("tester/upstream", revision="v1").revision
    found["inspect ours"] = attempt(alibi_hf.inspect_checkpoint, "tester/converted")
    alibi_hf.convert("tester/upstream", home / "out", revision="v1", verify=False)
    found["conversion"] = json.loads((home / "out" / "conversion.json").read_text())["source"]
    found["converted"] = logits(str(home / "out"))
    (home / "text.txt").write_text("It is a text of some length. " * 20)
    names = ["tester/upstream", "tester/converted"]
    found["evaluation"] = alibi_hf.evaluate(names, home / "text.txt", [32]).to_dict()


def faults() -> None:
    """What cannot be had, and by which name it is told."""
    for name in given["refused"]:
        made = attempt(alibi_hf.convert, name, home / "never")
        found[name] = {
            "load": attempt(logits, name),
            "inspect": attempt(alibi_hf.inspect_checkpoint, name),
            "convert": made,
        }
    found["left behind"] = [path.name for path in home.iterdir() if "never" in path.name]
    found["no revision"] = attempt(alibi_hf.inspect_checkpoint, "tester/upstream", revision="v9")
    for name in given["faulty"]:
        first = attempt(logits, name)
        found[name] = [first, attempt(logits, name) if isinstance(first, str) else first]


def tokens() -> None:
    """The login of the Hub's client is what is used, and never shown."""
    found["with login"] = alibi_hf.inspect_checkpoint("tester/secret-2").source
    done = CliRunner().invoke(app, ["inspect", "someone/secret"])
    found["cli"] = (done.exit_code, done.output)
    token = os.environ.pop("HF_TOKEN")
    found["without login"] = attempt(alibi_hf.inspect_checkpoint, "tester/secret-3")
    found["token="] = logits("tester/secret-3", token=token)


loading()
verbs()
faults()
tokens()
torch.save(found, sys.argv[2])
