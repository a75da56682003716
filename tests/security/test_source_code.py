"""Code that a source brings along is run by no verb: only by `evaluate --trust-remote-code`, which says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import alibi_hf
from alibi_hf.checkpoints.reference import load_reference
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import AlibiError, CheckpointFileError, UnsafeSourceError
from alibi_hf.evaluation.loading import Options, Subject, _check_pinned, find_subjects
from alibi_hf.model.configuration_alibi import AUTO_MAP
from tests.security.folders import Folders

CLASSES = {
    "AutoConfig": "configuration_evil.Config",
    "AutoModel": "modeling_evil.Model",
    "AutoModelForCausalLM": "modeling_evil.Model",
    "AutoModelForSequenceClassification": "modeling_evil.Model",
}
TOKENIZER = ["tokenizer_evil.Tokenizer", "tokenizer_evil.Tokenizer"]
CODE = ["configuration_evil", "modeling_evil", "tokenizer_evil", "tokenization_evil", "modeling_bloom", "__init__"]
CODE += ["modeling_alibi", "configuration_alibi", "sitecustomize", "setup", "conftest", "custom_generate/generate"]


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(held | fields))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def evil(folders: Folders, tmp_path: Path, marker: Path) -> Path:
    """Return a checkpoint that this package reads, with code that makes the marker, and every reference to it."""
    folder = folders.copy(tmp_path / "evil")
    bad = f"open({str(marker)!r}, 'w').close()\nclass Config: pass\nModel = Tokenizer = generate = Config\n"
    for name in CODE:
        (folder / f"{name}.py").parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(bad)
    edit(folder / "config.json", auto_map=CLASSES)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": TOKENIZER}, tokenizer_class="Tokenizer")
    return folder


@pytest.fixture(autouse=True)
def never_asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Answer yes to every question on standard input, and see that none was asked."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    yield
    assert asked == []


def test_the_code_is_malicious(evil: Path, marker: Path) -> None:
    """Whoever asks Transformers to run it gets the marker; otherwise the tests below would show nothing."""
    for load in (AutoModelForCausalLM, AutoTokenizer):
        with pytest.raises(Exception):  # noqa: B017 (the classes are no models; what they raise is their own)
            load.from_pretrained(evil, trust_remote_code=True)
        assert marker.exists(), load
        marker.unlink()
        edit(evil / "config.json", auto_map={})  # for the tokenizer's own


def test_no_verb_runs_it(evil: Path, folders: Folders, tmp_path: Path, marker: Path) -> None:
    alibi_hf.inspect_checkpoint(evil)
    alibi_hf.convert(evil, tmp_path / "out", verify=False)
    alibi_hf.verify(evil, tmp_path / "out", only=("tensors", "layers"), lengths=[16])
    alibi_hf.export(tmp_path / "out", tmp_path / "back", "bloom")
    tokens = {"tokenizer": folders.source}  # its own needs its code
    alibi_hf.evaluate([evil, f"upstream:{evil}"], folders.text, [16], **tokens)
    for call in (alibi_hf.evaluate, alibi_hf.reach):
        with pytest.raises(CheckpointFileError, match="the tokenizer of .* cannot be loaded"):
            call(evil, folders.text, lengths=[16])
    assert not marker.exists()


def test_no_class_of_ours_runs_it_whatever_it_is_told(evil: Path, folders: Folders, marker: Path) -> None:
    expected = alibi_hf.AlibiForCausalLM.from_pretrained(folders.source).state_dict()
    for options in ({}, {"trust_remote_code": True}, {"trust_remote_code": True, "code_revision": "main"}):
        model = alibi_hf.AlibiForCausalLM.from_pretrained(evil, **options)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 4)
        alibi_hf.AlibiForSequenceClassification.from_pretrained(evil, **options)
    alibi_hf.AlibiConfig.from_pretrained(evil)
    assert not marker.exists()


def test_what_is_proved_against_is_an_installed_class(evil: Path, marker: Path) -> None:
    reference, model = load_reference(Checkpoint.open(evil))
    assert type(model).__module__.split(".")[0] in ("transformers", "alibi_hf"), reference
    assert not marker.exists()


def test_none_of_it_reaches_what_is_converted(evil: Path, tmp_path: Path, marker: Path) -> None:
    """Who trusts the converted folder trusts this package's code, and nothing else."""
    ours = {path.name for path in Path(alibi_hf.__file__).parent.joinpath("model").glob("*_alibi.py")}
    for number, tokenizer in enumerate(
        (TOKENIZER, {"AutoTokenizer": TOKENIZER}, {"AutoTokenizer": ["a/b--c.D", None]})
    ):
        edit(evil / "tokenizer_config.json", auto_map=tokenizer)
        out, back = tmp_path / f"out-{number}", tmp_path / f"back-{number}"
        report = alibi_hf.convert(evil, out, verify=False)
        alibi_hf.export(out, back, "bloom")
        assert {str(path.relative_to(out)) for path in out.rglob("*.py")} == ours and not list(back.rglob("*.py"))
        assert all("evil" not in path.read_text() for path in out.glob("*.py"))
        assert json.loads((out / "config.json").read_text())["auto_map"] == AUTO_MAP
        for folder in (out, back):
            assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())
        assert any("is code of the source" in note for note in report.notes)
    assert type(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)) is alibi_hf.AlibiForCausalLM
    assert AutoTokenizer.from_pretrained(out, trust_remote_code=True)("abc")["input_ids"] == [67, 68, 69]
    assert not marker.exists()


def test_code_in_a_folder_of_our_own_layout(folders: Folders, tmp_path: Path, marker: Path) -> None:
    """The installed classes run, not the files of the folder, which anybody can have changed."""
    folder = folders.copy(tmp_path / "ours", folders.converted)
    for path in folder.glob("*_alibi.py"):
        path.write_text(f"open({str(marker)!r}, 'w').close()\n" + path.read_text())
    alibi_hf.verify(folders.source, folder, only=("tensors", "layers"), lengths=[16])
    alibi_hf.export(folder, tmp_path / "back", "bloom")
    alibi_hf.reach(folder, folders.text, lengths=[16])
    for trust in (False, True):
        alibi_hf.evaluate(folder, folders.text, [16], trust_remote_code=trust)
        alibi_hf.AlibiForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    alibi_hf.AlibiForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert str(marker) not in (tmp_path / "saved" / "modeling_alibi.py").read_text()
    assert not marker.exists()


def test_evaluate_runs_it_when_asked_and_says_so(
    evil: Path, folders: Folders, marker: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (evil / "modeling_evil.py").write_text(
        # Classes of its own: Transformers marks those that it loads, for the rest of the process.
        "from transformers import BloomForCausalLM\nfrom .configuration_evil import Config\n\n"
        "class Model(BloomForCausalLM):\n    config_class = Config\n\n"
        f"open({str(marker)!r}, 'w').close()\n"
    )
    (evil / "configuration_evil.py").write_text(
        "from transformers import BloomConfig\n\nclass Config(BloomConfig):\n    pass\n"
    )
    tokens = {"tokenizer": folders.source}
    alibi_hf.evaluate(f"upstream:{evil}", folders.text, [16], **tokens)
    assert not marker.exists() and "modeling_evil" not in caplog.text
    found = alibi_hf.evaluate(f"upstream:{evil}", folders.text, [16], trust_remote_code=True, **tokens)
    assert marker.exists() and "modeling_evil.Model" in caplog.text
    assert any("modeling_evil.Model" in note for note in found.models[0].notes)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0" * 39, "0" * 41, "f" * 40, "O" * 40])
def test_code_of_a_repository_runs_at_its_commit_only(evil: Path, revision: str | None) -> None:
    """A branch can be called like a commit: what counts is the commit that the files are of."""
    subject = Subject("mine", "owner/mine", evil, "0" * 40, upstream=True, raw={"auto_map": CLASSES})
    with pytest.raises(UnsafeSourceError, match="only at a commit"):
        _check_pinned(subject, ["modeling_evil.Model"], Options(revision=revision, trust_remote_code=True))


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_not_run(evil: Path, marker: Path, where: str) -> None:
    edit(evil / where, auto_map={"AutoModelForCausalLM": "other/code--modeling.Model", "AutoTokenizer": "other/x--a.B"})
    with pytest.raises(UnsafeSourceError, match="code of another repository"):
        find_subjects([f"upstream:{evil}"], None, Options(trust_remote_code=True))
    assert not marker.exists()


@pytest.mark.parametrize("value", ["evil.Model", ["evil.Model"], [], {}, 5, {"AutoTokenizer": None}, None])
@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_an_auto_map_of_any_kind(evil: Path, folders: Folders, marker: Path, where: str, value: Any) -> None:
    edit(evil / where, auto_map=value)
    alibi_hf.inspect_checkpoint(evil)
    alibi_hf.AlibiForCausalLM.from_pretrained(evil)
    for trust in (False, True):
        subjects = find_subjects([evil], None, Options(trust_remote_code=trust, tokenizer=folders.source))
        assert not subjects[0].upstream
    alibi_hf.convert(evil, evil.parent / "out", verify=False)
    assert not marker.exists()


def test_an_adapter_is_not_put_on_the_model(folders: Folders, tmp_path: Path) -> None:
    """PEFT would import the module that it names."""
    folder = folders.copy(tmp_path / "source")
    edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="other/model", megatron_core="evil")
    with pytest.raises(CheckpointFileError, match=r"adapter_config\.json"):
        alibi_hf.AlibiForCausalLM.from_pretrained(folder)
    for model in (folder, f"upstream:{folder}"):
        with pytest.raises(CheckpointFileError, match=r"adapter_config\.json"):
            alibi_hf.evaluate(model, folders.text, [16])


def test_what_an_adapter_changes_is_not_measured_as_the_weights(folders: Folders, tmp_path: Path) -> None:
    """Transformers puts the adapter on a model that is loaded; a proof or an export reads the weights alone."""
    folder = folders.copy(tmp_path / "ours", folders.converted)
    edit(folder / "adapter_config.json", peft_type="LORA", target_modules=["q_proj"])
    for call in (
        lambda: alibi_hf.verify(folders.source, folder, only=("tensors",)),
        lambda: alibi_hf.export(folder, tmp_path / "back", "bloom"),
        lambda: alibi_hf.evaluate(folder, folders.text, [16]),
        lambda: alibi_hf.reach(folder, folders.text, lengths=[16]),
    ):
        with pytest.raises(CheckpointFileError, match=r"adapter_config\.json"):
            call()


@pytest.mark.parametrize("name", ["evil/kernel", "evil/flash-attn", "kernels-community/attention@v1:function"])
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_no_attention_kernel_of_the_hub_is_loaded(folders: Folders, tmp_path: Path, field: str, name: str) -> None:
    ours, theirs = folders.copy(tmp_path / "ours", folders.converted), folders.copy(tmp_path / "theirs")
    for folder in (ours, theirs):
        edit(folder / "config.json", **{field: name})
    assert alibi_hf.AlibiForCausalLM.from_pretrained(theirs).config._attn_implementation == "sdpa"
    try:
        model = alibi_hf.AlibiForCausalLM.from_pretrained(ours)
    except ValueError as error:
        assert "has no ALiBi bias here" in str(error)
    else:  # what takes no slopes is replaced by what does
        assert "flash" in name and model.config._attn_implementation in ("sdpa", "flex_attention")


# Runs the verbs that it is given, first with answers on standard input, then with that closed.
WORKER = """
import json, os, sys
from alibi_hf.cli import app
for closed in (False, True):
    if closed:
        sys.stdin.close()
    for command in json.loads(sys.argv[1]):
        print("ran", command[0], app(command, standalone_mode=False) or 0, flush=True)
"""


def test_the_command_line_asks_nothing(evil: Path, folders: Folders, tmp_path: Path, marker: Path) -> None:
    """Transformers asks on standard input where nobody said whether code may be run."""
    (evil / "tokenizer.json").unlink()  # so that only its code could tokenise
    commands = [
        ["inspect", evil, "--quiet"],
        ["convert", evil, tmp_path / "out", "--quiet", "--no-verify", "--overwrite"],
        ["verify", evil, tmp_path / "out", "--only", "tensors", "--quiet"],
        ["evaluate", evil, "--text", folders.text, "--lengths", "16"],
        ["evaluate", f"upstream:{evil}", "--text", folders.text, "--lengths", "16"],
        ["reach", evil, "--text", folders.text, "--lengths", "16"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WORKER, json.dumps([[str(word) for word in command] for command in commands])],
        input="y\n" * 20,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(alibi_hf.__file__).parents[1])},
    )
    ran = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ran ")]
    status = [[command[0], "2" if command[0] in ("evaluate", "reach") else "0"] for command in commands]
    assert ran == status * 2, done.stderr[-2000:]
    assert "Do you wish to run" not in done.stdout + done.stderr and "y/N" not in done.stdout + done.stderr
    assert not marker.exists()


def test_an_unknown_model_that_needs_its_code_is_refused(evil: Path, folders: Folders, marker: Path) -> None:
    edit(evil / "config.json", model_type="evil", architectures=["Model"])
    with pytest.raises(UnsafeSourceError, match="--trust-remote-code"):
        alibi_hf.evaluate(evil, folders.text, [16])
    for call in (alibi_hf.inspect_checkpoint, alibi_hf.AlibiForCausalLM.from_pretrained):
        with pytest.raises(AlibiError, match="evil"):
            call(evil)
    assert not marker.exists()
