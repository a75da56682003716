"""BLOOM in Megatron-DeepSpeed's files: any number of ranks gives what the unsplit checkpoint gives, bit for bit."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import alibi_hf.checkpoints.source as source
from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.inspect import inspect_checkpoint
from alibi_hf.checkpoints.shards import load_pickle
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import CheckpointFileError, TensorError, UnsafeSourceError
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from alibi_hf.verification import verify
from tests.builders import bloom

OUTER = {
    "word_embeddings.weight": "word_embeddings.weight",
    "word_embeddings_layernorm.weight": "word_embeddings.norm.weight",
    "word_embeddings_layernorm.bias": "word_embeddings.norm.bias",
    "ln_f.weight": "weight",
    "ln_f.bias": "bias",
}
COPIES = ("input_layernorm", "post_attention_layernorm", "word_embeddings.norm")


def split(tensor, name, ranks):
    """A rank's part of each tensor, as Megatron's column- and row-parallel layers hold it."""
    if name in ("weight", "bias") or name.startswith(COPIES) or name.endswith(("dense.bias", "dense_4h_to_h.bias")):
        return [tensor.clone() for _ in range(ranks)]
    by_columns = name.endswith(("dense.weight", "dense_4h_to_h.weight"))
    return [part.clone() for part in tensor.chunk(ranks, dim=int(by_columns))]


def megatron(folder, unsplit, ranks):
    """The checkpoint `unsplit` in layer files; returns the folder."""
    folder.mkdir()
    (folder / "config.json").write_text((unsplit / "config.json").read_text())
    layers = json.loads((unsplit / "config.json").read_text())["n_layer"]
    files = {}
    for full, tensor in load_file(unsplit / "model.safetensors").items():
        name = full.removeprefix("transformer.")
        inside = re.fullmatch(r"h\.(\d+)\.(.*)", name)
        number = int(inside[1]) + 3 if inside else layers + 4 if name.startswith("ln_f") else 1
        stored = inside[2] if inside else OUTER[name]
        for rank, part in enumerate(split(tensor, stored, ranks)):
            files.setdefault((number, rank), {})[stored] = part
    for (number, rank), content in files.items():
        torch.save(content, folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    return folder


@pytest.fixture
def unsplit(tmp_path):
    return bloom(tmp_path / "unsplit", heads=12, raw={"vocab_size": 100, "seq_length": 8})


def change(folder, number, rank, **tensors):
    """Put tensors into one file, or take out those that are None; names with `_` for `.`."""
    path = folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt"
    held = torch.load(path)
    for given, tensor in tensors.items():
        name = next((name for name in held if name.replace(".", "_") == given), given)
        held.pop(name, None)
        held |= {} if tensor is None else {name: tensor}
    torch.save(held, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_converts_to_the_same_bytes(ranks, dtype, tmp_path):
    unsplit = bloom(tmp_path / "unsplit", heads=12, layers=3, raw={"vocab_size": 100}, dtype=dtype)
    convert(unsplit, tmp_path / "expected", verify=False)
    convert(megatron(tmp_path / "source", unsplit, ranks), tmp_path / "out", verify=False, allow_pickle=True)
    expected = (tmp_path / "expected" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
    recorded = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert len(recorded["source"]["files"]) == 5 * ranks
    reasons = {row["source"]: row["reason"] for row in recorded["tensors"]}
    if ranks > 1:
        assert reasons["h.0.input_layernorm.weight"].endswith("copies, of which the float64 mean is taken")
        assert reasons["h.2.mlp.dense_4h_to_h.weight"].endswith(f"{ranks} ranks: columns")
        assert reasons["h.1.self_attention.query_key_value.bias"].endswith(f"{ranks} ranks: rows")


def test_parameters_are_read_as_plain_tensors(unsplit, tmp_path):
    folder = megatron(tmp_path / "source", unsplit, 2)
    change(folder, 3, 0, mlp_dense_4h_to_h_bias=torch.nn.Parameter(torch.ones(96)))
    assert not Checkpoint.open(folder, allow_pickle=True).get("h.0.mlp.dense_4h_to_h.bias").requires_grad


def test_copies_that_drifted_apart_are_averaged_in_float64_and_rounded_once(unsplit, tmp_path):
    folder = megatron(tmp_path / "source", unsplit, 2)
    one, other = torch.full((96,), 1.0, dtype=torch.float32), torch.full((96,), 1.0 + 2**-22, dtype=torch.float32)
    change(folder, 4, 0, input_layernorm_weight=one)
    change(folder, 4, 1, input_layernorm_weight=other)
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert torch.equal(checkpoint.get("h.1.input_layernorm.weight"), torch.full((96,), 1.0 + 2**-23))
    change(folder, 4, 1, input_layernorm_weight=-one)
    assert not Checkpoint.open(folder, allow_pickle=True).get("h.1.input_layernorm.weight").any()


def test_every_file_is_read_once_and_one_layer_is_held_at_a_time(unsplit, tmp_path, monkeypatch):
    folder, opened = megatron(tmp_path / "source", unsplit, 2), []
    monkeypatch.setattr(source, "load_pickle", lambda path: opened.append(path.name) or load_pickle(path))
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert not opened  # opening reads headers only
    for group in checkpoint.groups:
        checkpoint.get(group.source)
        assert len(checkpoint._pickles[0]) == len(checkpoint._pickles[1]) == 2
    assert sorted(opened) == sorted(path.name for path in folder.glob("*.pt"))


def test_it_is_proved_and_inspected(unsplit, tmp_path):
    folder = megatron(tmp_path / "source", unsplit, 4)
    convert(folder, tmp_path / "out", verify=False, allow_pickle=True)
    result = verify(folder, tmp_path / "out", lengths=[8, 12], text="a plain text", allow_pickle=True)
    assert result.proved and all(control.caught for control in result.negative_controls)
    inspection = inspect_checkpoint(folder, allow_pickle=True)
    assert inspection.family == "bloom" and len(inspection.files) == 16
    assert inspection.parameters == inspect_checkpoint(unsplit).parameters


def test_pickles_are_read_on_request_only_and_hold_tensors_only(unsplit, tmp_path):
    folder = megatron(tmp_path / "source", unsplit, 2)
    with pytest.raises(UnsafeSourceError, match=r"layer_01-model_00-model_states\.pt.*--allow-pickle"):
        Checkpoint.open(folder)
    torch.save({"weight": Path("unsafe")}, folder / "layer_06-model_01-model_states.pt")
    with pytest.raises(UnsafeSourceError, match=r"layer_06-model_01.* holds more than tensors"):
        Checkpoint.open(folder, allow_pickle=True)


def test_safetensors_beside_the_layer_files_are_preferred(unsplit, tmp_path):
    folder = megatron(tmp_path / "source", unsplit, 2)
    (folder / "model.safetensors").write_bytes((unsplit / "model.safetensors").read_bytes())
    assert [path.name for path in Checkpoint.open(folder).shards] == ["model.safetensors"]


def test_direct_loading_says_to_convert(unsplit, tmp_path):
    folder = megatron(tmp_path / "source", unsplit, 2)
    with pytest.raises(CheckpointFileError, match=r"layer files.*alibi-hf convert --allow-pickle"):
        AlibiForCausalLM.from_pretrained(folder)


def test_missing_files_are_named(unsplit, tmp_path):
    folder = megatron(tmp_path / "source", unsplit, 2)
    (folder / "layer_04-model_00-model_states.pt").unlink()
    with pytest.raises(CheckpointFileError, match=r"lacks layer_04-model_00-model_states\.pt.* 2 ranks"):
        Checkpoint.open(folder, allow_pickle=True)
    (folder / "layer_04-model_01-model_states.pt").unlink()
    with pytest.raises(TensorError, match=r"missing.*h\.1\.input_layernorm\.weight"):
        Checkpoint.open(folder, allow_pickle=True)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointFileError, match=r"config\.json does not exist"):
        Checkpoint.open(folder, allow_pickle=True)


def test_ranks_that_contradict_each_other_are_refused(unsplit, tmp_path):
    folder = megatron(tmp_path / "source", unsplit, 2)
    change(folder, 3, 1, self_attention_dense_weight=torch.zeros(95, 48))
    with pytest.raises(CheckpointFileError, match=r"self_attention\.dense\.weight of layer_03.*\[96, 48\].*\[95, 48\]"):
        Checkpoint.open(folder, allow_pickle=True)
    change(folder, 3, 1, self_attention_dense_weight=None)
    with pytest.raises(CheckpointFileError, match=r"disagree about self_attention\.dense\.weight"):
        Checkpoint.open(folder, allow_pickle=True)


def test_rows_that_do_not_make_up_the_config_are_refused(unsplit, tmp_path):
    folder = megatron(tmp_path / "source", unsplit, 2)
    for rank in range(2):
        change(folder, 3, rank, mlp_dense_h_to_4h_weight=torch.zeros(190, 96))
    with pytest.raises(TensorError, match=r"h\.0\.mlp\.dense_h_to_4h\.weight has shape \[380, 96\].* \[384, 96\]"):
        Checkpoint.open(folder, allow_pickle=True)


def test_a_name_twice_and_a_layer_before_the_first_are_refused(unsplit, tmp_path):
    folder = megatron(tmp_path / "source", unsplit, 1)
    change(folder, 6, 0, **{"word_embeddings.weight": torch.zeros(100, 96)})
    with pytest.raises(CheckpointFileError, match=r"layer_06.* and layer_01.* both hold word_embeddings\.weight"):
        Checkpoint.open(folder, allow_pickle=True)
    torch.save({"input_layernorm.weight": torch.ones(96)}, folder / "layer_02-model_00-model_states.pt")
    with pytest.raises(CheckpointFileError, match=r"layer_02.* holds input_layernorm\.weight, .*begin with layer_03"):
        Checkpoint.open(folder, allow_pickle=True)
