"""The saved folder stands alone: all five heads load where the package cannot be imported, and save it again."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import alibi_hf
from alibi_hf.model.configuration_alibi import AUTO_MAP
from tests.hidden import hidden
from tests.model.cases import build, documents

HEADS = {
    AutoModel: alibi_hf.AlibiModel,
    AutoModelForCausalLM: alibi_hf.AlibiForCausalLM,
    AutoModelForSequenceClassification: alibi_hf.AlibiForSequenceClassification,
    AutoModelForTokenClassification: alibi_hf.AlibiForTokenClassification,
    AutoModelForQuestionAnswering: alibi_hf.AlibiForQuestionAnswering,
}
CASES = dict(zip(HEADS, ("rope", "twelve_grouped", "hybrid", "learned", "sinusoidal"), strict=True))
CODE = {path.name for path in Path(alibi_hf.__file__).parent.joinpath("model").glob("*_alibi.py")}
TEXT = documents(50)[0][None]

# Runs in a fresh process in which the package cannot be found.
WORKER = """
import sys
from pathlib import Path
import torch, transformers

source, output = map(Path, sys.argv[1:])
given, found = torch.load(source / "given.pt"), {}
for auto, folder in given["folders"].items():
    model = getattr(transformers, auto).from_pretrained(source / folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    with torch.no_grad():
        first = model(given["text"])[0]
        if auto == "AutoModelForCausalLM":
            written = model.generate(given["text"], max_new_tokens=5, min_new_tokens=5, do_sample=False)
            found["written"] = written
            model.set_attn_implementation("eager")
            model.set_attn_implementation("sdpa")
    model.save_pretrained(output / folder)
    again = getattr(transformers, auto).from_pretrained(output / folder, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(given["text"])[0], first)
    found[auto] = first
# A head that was not saved: the body is the file's, the head is new.
folder = source / given["folders"]["AutoModelForCausalLM"]
for auto in given["folders"]:
    getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
torch.save(found, output / "found.pt")
"""


def files(folder: Path) -> set[str]:
    """Return the names of the code files in a folder."""
    return {path.name for path in folder.glob("*.py")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one saved model a head, and what each computes."""
    source = tmp_path_factory.mktemp("saved")
    truth, folders = {}, {}
    for auto, cls in HEADS.items():
        model = build(CASES[auto], torch.float32, cls=cls)
        folders[auto.__name__] = auto.__name__.lower()
        model.save_pretrained(source / folders[auto.__name__])
        with torch.no_grad():
            truth[auto.__name__] = model(TEXT)[0]
            if auto is AutoModelForCausalLM:
                truth["written"] = model.generate(TEXT, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    torch.save({"text": TEXT, "folders": folders}, source / "given.pt")
    torch.save(truth, source / "truth.pt")
    return source


def test_saving_writes_the_code_and_the_whole_auto_map(saved: Path) -> None:
    assert CODE
    for auto in HEADS:
        folder = saved / auto.__name__.lower()
        assert files(folder) >= CODE
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_all_heads_load_where_the_package_is_hidden(saved: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = hidden(WORKER, saved, tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    truth, found = torch.load(saved / "truth.pt"), torch.load(tmp_path / "found.pt")
    assert truth.keys() == found.keys()
    for name, logits in truth.items():
        assert torch.equal(found[name], logits), name
    for auto in HEADS:
        folder = tmp_path / auto.__name__.lower()
        assert files(folder) >= CODE
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("trust", [True, False, None])
@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
def test_the_installed_package_wins_and_saves_the_code_again(
    saved: Path, tmp_path: Path, auto: type, trust: bool | None
) -> None:
    folder = saved / auto.__name__.lower()
    model = auto.from_pretrained(folder, trust_remote_code=trust).eval()
    assert type(model) is HEADS[auto]
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is alibi_hf.AlibiConfig
    with torch.no_grad():
        assert torch.equal(model(TEXT)[0], torch.load(saved / "truth.pt")[auto.__name__])
    model.save_pretrained(tmp_path)
    assert files(tmp_path) >= CODE
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
