"""Loads models by id where the package is hidden; run by `test_pull`, which says what should come of it.

Its arguments: a file with the settings, and one for what it found.
"""

import os
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

given = torch.load(sys.argv[1])
found: dict = {}


def load(name: str, auto: str = "AutoModelForCausalLM", trust: bool = True, **kwargs):
    """The model of an id, its code run."""
    return getattr(transformers, auto).from_pretrained(name, trust_remote_code=trust, **kwargs).eval()


def logits(name: str, **kwargs) -> torch.Tensor:
    """What the model of an id computes."""
    with torch.no_grad():
        return load(name, **kwargs)(given["ids"]).logits


def attempt(call, *args, **kwargs):
    """What a call returns, or the kind and text of what it raises."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def whole(name: str, autos: list[str]) -> None:
    """Config and classes of the auto_map, and generation past the training length."""
    said: dict = {"autos": autos, "config": type(AutoConfig.from_pretrained(name, trust_remote_code=True)).__module__}
    with torch.no_grad():
        for auto in autos:
            model = load(name, auto)
            said[auto] = (model if auto == "AutoModel" else model.base_model)(given["ids"])[0]
            if auto == "AutoModelForCausalLM":
                said["module"], said["logits"] = type(model).__module__, model(given["ids"]).logits
                said["written"] = model.generate(given["ids"], max_new_tokens=40, min_new_tokens=40, do_sample=False)
    found[name] = said


def online() -> None:
    """All that needs the Hub."""
    whole("tester/converted", given["heads"])
    whole("tester/saved", ["AutoModelForCausalLM"])
    found["tokens"] = AutoTokenizer.from_pretrained("tester/converted")("ALiBi")["input_ids"]
    found["refused"] = [attempt(load, "tester/converted", trust=trust) for trust in (False, None)]
    found["revisions"] = {name: logits("tester/moving", revision=name) for name in given["revisions"]["tester/moving"]}
    code_moves()
    found["secret"] = attempt(logits, "tester/secret")
    found["secret with token"] = attempt(logits, "tester/secret", token=given["token"])
    for name in given["faulty"]:
        first = attempt(logits, name)
        found[name] = [first, attempt(logits, name) if isinstance(first, str) else first]
    for name in given["broken"]:
        found[name] = attempt(logits, name)


def code_moves() -> None:
    """The code is another repository's: `revision` pins the weights alone, `code_revision` the code."""
    marker, name = Path(os.environ["MARKER"]), "tester/borrowing"
    found["code pinned"] = logits(name, revision=given["weights"], code_revision=given["code"])
    found["ran when pinned"] = marker.exists()
    found["code not pinned"] = logits(name, revision=given["weights"])
    found["ran when not pinned"] = marker.exists()


def offline() -> None:
    """What is in the cache is enough."""
    found["offline"] = logits("tester/converted")
    found["offline pinned"] = logits("tester/moving", revision=given["revisions"]["tester/moving"][0])
    found["never seen"] = attempt(AutoModelForCausalLM.from_pretrained, "tester/never", trust_remote_code=True)


offline() if os.environ.get("HF_HUB_OFFLINE") else online()
torch.save(found, sys.argv[2])
