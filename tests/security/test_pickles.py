"""A malicious pickle in a source is never run: by no verb, allowed or not, wherever it lies and however it is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import alibi_hf
from alibi_hf.errors import AlibiError, CheckpointFileError, UnsafeSourceError
from tests.security.folders import Folders
from tests.security.pickles import PAYLOADS

Verb = Callable[[Path, bool], Any]
BIN, WEIGHTS = "pytorch_model.bin", "model.safetensors"
MEGATRON = [f"layer_{number:02d}-model_00-model_states.pt" for number in (1, 3, 4, 6)]
BESIDE = [
    *(BIN, "pytorch_model-00001-of-00002.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"),
    *("model.ckpt", "model.pth", "consolidated.00.pth", "adapter_model.bin", "tokenizer.pkl", "vocab.pkl", *MEGATRON),
]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def verify(source: Path, output: Path, allow_pickle: bool = False) -> alibi_hf.Verification:
    """Run the part of a proof that reads every tensor of both folders."""
    return alibi_hf.verify(source, output, only=("tensors",), lengths=[16], allow_pickle=allow_pickle)


def verbs(made: Folders, out: Path) -> dict[str, Verb]:
    """Return every verb that opens a folder in an upstream layout, as a function of it and of `allow_pickle`."""

    def load(cls: Any) -> Verb:
        return lambda folder, allow: cls.from_pretrained(folder, use_safetensors=False if allow else None)

    return {
        "inspect": lambda folder, allow: alibi_hf.inspect_checkpoint(folder, allow_pickle=allow),
        "convert": lambda folder, allow: alibi_hf.convert(
            folder, out, verify=False, overwrite=True, allow_pickle=allow
        ),
        "verify": lambda folder, allow: verify(folder, made.converted, allow),
        "evaluate": lambda folder, allow: alibi_hf.evaluate(folder, made.text, [16], allow_pickle=allow),
        "evaluate upstream": lambda folder, allow: alibi_hf.evaluate(
            f"upstream:{folder}", made.text, [16], allow_pickle=allow
        ),
        "reach": lambda folder, allow: alibi_hf.reach(folder, made.text, lengths=[16], allow_pickle=allow),
        "AlibiForCausalLM": load(alibi_hf.AlibiForCausalLM),
        "AlibiForSequenceClassification": load(alibi_hf.AlibiForSequenceClassification),
    }


@pytest.mark.parametrize("name", PAYLOADS)
def test_each_pickle_is_malicious(name: str, tmp_path: Path, marker: Path) -> None:
    """Without `weights_only` each makes the marker; where it does not, the tests below would show nothing."""
    PAYLOADS[name](tmp_path / BIN, marker)
    assert not marker.exists()
    with suppress(Exception):  # what comes after the call is no checkpoint
        torch.load(tmp_path / BIN, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_each_pickle_is_refused_and_not_run(name: str, folders: Folders, tmp_path: Path, marker: Path) -> None:
    folder = folders.copy(tmp_path / "source")
    (folder / WEIGHTS).unlink()
    PAYLOADS[name](folder / BIN, marker)
    for verb in ("inspect", "AlibiForCausalLM"):
        call = verbs(folders, tmp_path / "out")[verb]
        with pytest.raises(UnsafeSourceError, match="pickles only"):
            call(folder, False)
        with pytest.raises(UnsafeSourceError, match="more than tensors") as caught:
            call(folder, True)
        assert "add_safe_globals" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not marker.exists()


def test_no_verb_runs_it(folders: Folders, tmp_path: Path, marker: Path) -> None:
    """Alone, named by an index, and under the name of a safetensors file."""
    alone, sharded, renamed = (folders.copy(tmp_path / name) for name in ("alone", "sharded", "renamed"))
    PAYLOADS["open"](alone / BIN, marker)
    shard = "pytorch_model-00001-of-00001.bin"
    PAYLOADS["open"](sharded / shard, marker)
    names = dict.fromkeys(load_file(alone / WEIGHTS), shard)
    (sharded / f"{BIN}.index.json").write_text(json.dumps({"weight_map": names}))
    for folder in (alone, sharded):
        (folder / WEIGHTS).unlink()
    PAYLOADS["open"](renamed / WEIGHTS, marker)
    for name, verb in verbs(folders, tmp_path / "out").items():
        for folder in (alone, sharded):
            for allow in (False, True):
                with pytest.raises(UnsafeSourceError):
                    verb(folder, allow)
        for allow in (False, True):
            with pytest.raises(AlibiError):
                verb(renamed, allow)
        assert not marker.exists(), name
    assert not (tmp_path / "out").exists()


def test_an_index_of_safetensors_that_names_a_pickle(folders: Folders, tmp_path: Path, marker: Path) -> None:
    folder = folders.copy(tmp_path / "source")
    names = dict.fromkeys(load_file(folder / WEIGHTS), BIN)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))
    PAYLOADS["open"](folder / BIN, marker)
    for name in ("inspect", "convert", "AlibiForCausalLM"):
        for allow in (False, True):
            with pytest.raises(CheckpointFileError, match="safetensors"):
                verbs(folders, tmp_path / "out")[name](folder, allow)
    assert not marker.exists()


def test_beside_safetensors_it_is_not_even_opened(folders: Folders, tmp_path: Path, marker: Path) -> None:
    """Every verb gives what it gives without the pickles, `allow_pickle` or not; none of them is carried over."""
    folder = folders.copy(tmp_path / "source")
    for name in BESIDE:
        PAYLOADS["open"](folder / name, marker)
    for allow in (False, True):
        found = {name: verb(folder, allow) for name, verb in verbs(folders, tmp_path / "out").items()}
        expected = alibi_hf.AlibiForCausalLM.from_pretrained(folders.source).state_dict()
        state = found["AlibiForCausalLM"].state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        assert all(check.passed for check in found["verify"].checks)
        assert not {path.name for path in (tmp_path / "out").iterdir()} & set(BESIDE)
    alibi_hf.export(tmp_path / "out", tmp_path / "back", "bloom")
    assert not marker.exists()


def test_files_of_megatron(folders: Folders, tmp_path: Path, marker: Path) -> None:
    folder = folders.copy(tmp_path / "source")
    (folder / WEIGHTS).unlink()
    for name in MEGATRON:
        PAYLOADS["open"](folder / name, marker)
    for name in ("inspect", "convert", "verify"):
        for allow in (False, True):
            with pytest.raises(UnsafeSourceError):
                verbs(folders, tmp_path / "out")[name](folder, allow)
    with pytest.raises(AlibiError):
        alibi_hf.AlibiForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert not marker.exists()


def test_in_a_folder_of_our_own_layout(folders: Folders, tmp_path: Path, marker: Path) -> None:
    folder = folders.copy(tmp_path / "ours", folders.converted)
    for name in BESIDE:
        PAYLOADS["open"](folder / name, marker)
    verify(folders.source, folder)
    alibi_hf.export(folder, tmp_path / "back", "bloom")
    for allow in (False, True):
        alibi_hf.evaluate(folder, folders.text, [16], allow_pickle=allow)
    (folder / WEIGHTS).unlink()
    for call in (
        lambda: verify(folders.source, folder),
        lambda: alibi_hf.export(folder, tmp_path / "again", "bloom"),
        lambda: alibi_hf.evaluate(folder, folders.text, [16]),
        lambda: alibi_hf.evaluate(folder, folders.text, [16], allow_pickle=True),
        lambda: alibi_hf.reach(folder, folders.text, lengths=[16], allow_pickle=True),
    ):
        with pytest.raises(UnsafeSourceError):
            call()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        alibi_hf.AlibiForCausalLM.from_pretrained(folder)
    with pytest.raises(Exception, match="Weights only"):  # Transformers' own reader, which is asked for here
        alibi_hf.AlibiForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert not marker.exists()


def test_in_a_source_of_a_retrofit(folders: Folders, tmp_path: Path, marker: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4)).save_pretrained(folder)
    PAYLOADS["open"](folder / BIN, marker)
    for allow in (False, True):
        alibi_hf.retrofit(folder, tmp_path / "out", allow_pickle=allow, overwrite=True)
    (folder / WEIGHTS).unlink()
    for allow in (False, True):
        with pytest.raises(UnsafeSourceError):
            alibi_hf.retrofit(folder, tmp_path / "none", allow_pickle=allow)
    assert not marker.exists() and not (tmp_path / "none").exists()


def test_an_archive_of_torchscript(folders: Folders, tmp_path: Path) -> None:
    folder = folders.copy(tmp_path / "source")
    (folder / WEIGHTS).unlink()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / BIN)
    with pytest.raises(UnsafeSourceError, match="TorchScript|compressed"):
        alibi_hf.inspect_checkpoint(folder, allow_pickle=True)


def test_a_plain_pickle_is_read_when_that_is_allowed(folders: Folders, tmp_path: Path) -> None:
    """What is refused above is refused for what it holds."""
    folder = folders.copy(tmp_path / "source")
    torch.save(load_file(folder / WEIGHTS), folder / BIN)
    (folder / WEIGHTS).unlink()
    state = alibi_hf.AlibiForCausalLM.from_pretrained(folder, use_safetensors=False).state_dict()
    expected = alibi_hf.AlibiForCausalLM.from_pretrained(folders.source).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
