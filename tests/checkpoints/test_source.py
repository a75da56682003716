"""Opening a checkpoint: good ones in every shape of folder, and bad ones with a clear error."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import CheckpointFileError, ConfigFieldError, TensorError, UnsafeSourceError
from tests.all_families import FAMILIES
from tests.builders import bloom, falcon, mpt

INDEX = "model.safetensors.index.json"


def change(folder, file="model.safetensors", **tensors):
    """Put tensors in, or take out those that are None."""
    held = load_file(folder / file)
    held.update({name: value for name, value in tensors.items() if value is not None})
    save_file({name: value for name, value in held.items() if tensors.get(name, 0) is not None}, folder / file)


def edit(path, edit_function):
    value = json.loads(path.read_text())
    edit_function(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("build", FAMILIES.values())
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", [True, False])
def test_every_layout_opens(build, shards, prefix, tmp_path):
    checkpoint = Checkpoint.open(build(tmp_path, shards=shards, prefix=prefix, dtype=torch.bfloat16))
    assert {group.fate for group in checkpoint.groups} <= {"used", "config", "dropped"}
    assert len(checkpoint.groups) == len(checkpoint.tensors)
    assert checkpoint.dtype == torch.bfloat16 and checkpoint.class_name == "AlibiForCausalLM"
    assert len(checkpoint.sha256()) == shards


def test_a_tied_copy_is_accounted_for_and_must_be_equal(tmp_path):
    folder = bloom(tmp_path)
    embedding = load_file(folder / "model.safetensors")["transformer.word_embeddings.weight"]
    change(folder, **{"lm_head.weight": embedding.clone()})
    checkpoint = Checkpoint.open(folder)
    group = next(group for group in checkpoint.groups if group.fate == "tied")
    assert group.source == "lm_head.weight" and "tie_word_embeddings" in group.rule.reason
    checkpoint.check_values(group)
    change(folder, **{"lm_head.weight": embedding + 1})
    with pytest.raises(TensorError, match=r"lm_head.weight differs from .*word_embeddings.weight"):
        Checkpoint.open(folder).check_values(group)


def test_rotary_buffers_of_falcon_are_dropped_for_a_reason(tmp_path):
    folder = falcon(tmp_path)
    change(folder, **{"transformer.h.0.self_attention.maybe_rotary.inv_freq": torch.ones(4)})
    dropped = [group for group in Checkpoint.open(folder).groups if group.fate == "dropped"]
    assert len(dropped) == 1 and "alibi" in dropped[0].rule.reason


def test_missing_shard(tmp_path):
    folder = mpt(tmp_path, shards=3)
    os.remove(folder / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointFileError, match=r"model-00002-of-00003.safetensors is missing"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("keep", [3, 200, -1])
def test_truncated_shard(keep, tmp_path):
    path = mpt(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointFileError, match=r"truncated or damaged"):
        Checkpoint.open(tmp_path)


def test_index_and_files_that_disagree(tmp_path):
    folder = mpt(tmp_path, shards=2)
    edit(folder / INDEX, lambda index: index["weight_map"].pop("transformer.wte.weight"))
    with pytest.raises(CheckpointFileError, match=r"holds transformer.wte.weight .*does not list"):
        Checkpoint.open(folder)
    edit(
        folder / INDEX,
        lambda index: index["weight_map"].update({"transformer.wte.weight": "model-00002-of-00002.safetensors"}),
    )
    with pytest.raises(CheckpointFileError, match=r"puts transformer.wte.weight in model-00002.* but"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b"])
def test_an_index_that_points_elsewhere_is_refused(name, tmp_path):
    folder = mpt(tmp_path / "model", shards=2)
    edit(folder / INDEX, lambda index: index["weight_map"].update({"transformer.wte.weight": name}))
    with pytest.raises(CheckpointFileError, match=r"only files beside the index"):
        Checkpoint.open(folder)


def test_a_wrong_shape_names_both(tmp_path):
    folder = bloom(tmp_path)
    change(folder, **{"transformer.h.1.mlp.dense_h_to_4h.weight": torch.zeros(190, 48)})
    with pytest.raises(TensorError, match=r"h\.1\.mlp.* \[190, 48\].* \[192, 48\]"):
        Checkpoint.open(folder)


def test_config_and_weights_of_different_sizes(tmp_path):
    folder = bloom(tmp_path)
    edit(folder / "config.json", lambda raw: raw.update(vocab_size=98))
    with pytest.raises(TensorError, match=r"word_embeddings.* \[97, 48\].* \[98, 48\]"):
        Checkpoint.open(folder)


def test_left_over_and_missing_tensors(tmp_path):
    folder = mpt(tmp_path)
    change(folder, **{"transformer.wpe.weight": torch.zeros(64, 48)})
    with pytest.raises(TensorError, match=r"transformer.wpe.weight"):
        Checkpoint.open(folder)
    change(folder, **{"transformer.wpe.weight": None, "transformer.norm_f.weight": None})
    with pytest.raises(Exception, match=r"norm_f|no known family"):
        Checkpoint.open(folder)


def test_an_untied_model_needs_its_head(tmp_path):
    folder = bloom(tmp_path, tie=False)
    assert Checkpoint.open(folder).config.tie_word_embeddings is False
    change(folder, **{"lm_head.weight": None})
    with pytest.raises(TensorError, match=r"lacks: lm_head.weight"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(value, tmp_path):
    folder = bloom(tmp_path)
    bad = load_file(folder / "model.safetensors")["transformer.ln_f.bias"]
    bad[3] = value
    change(folder, **{"transformer.ln_f.bias": bad})
    checkpoint = Checkpoint.open(folder)
    group = next(group for group in checkpoint.groups if group.source.endswith("ln_f.bias"))
    with pytest.raises(TensorError, match=r"ln_f.bias holds .*allow-nonfinite"):
        checkpoint.check_values(group)
    checkpoint.check_values(group, allow_nonfinite=True)


def pickles(folder, shards=1):
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")
    return held


def test_pickles_are_read_only_when_allowed(tmp_path):
    folder = bloom(tmp_path)
    held = pickles(folder)
    with pytest.raises(UnsafeSourceError, match=r"--allow-pickle"):
        Checkpoint.open(folder)
    checkpoint = Checkpoint.open(folder, allow_pickle=True)
    assert all(torch.equal(checkpoint.get(name), tensor) for name, tensor in held.items())


def test_a_pickle_that_runs_code_is_never_run(tmp_path):
    folder = bloom(tmp_path / "model")
    (folder / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Payload()}))
    with pytest.raises((UnsafeSourceError, CheckpointFileError)):
        Checkpoint.open(folder, allow_pickle=True)
    assert not (tmp_path / "executed").exists()


def test_neither_folder_nor_reachable(tmp_path):
    with pytest.raises(CheckpointFileError, match=r"is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointFileError, match=r"Without network.*local folder"):
        Checkpoint.open("nobody/no-such-model")
    with pytest.raises(CheckpointFileError, match=r"config.json does not exist"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_weights_and_a_broken_config(tmp_path):
    folder = bloom(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointFileError, match=r"neither model.safetensors"):
        Checkpoint.open(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointFileError, match=r"cannot be read as JSON"):
        Checkpoint.open(folder)


def test_only_the_familys_own_rounding_is_taken(tmp_path):
    folder = bloom(tmp_path)
    assert Checkpoint.open(folder, alibi_rounding="bloom").config.alibi_rounding == "bloom"
    with pytest.raises(ConfigFieldError, match=r"alibi_rounding='falcon'.*exact and bloom"):
        Checkpoint.open(folder, alibi_rounding="falcon")
    with pytest.raises(ConfigFieldError, match=r"frobnicate"):
        Checkpoint.open(folder, frobnicate=1)


def test_some_rows_are_the_rows_of_the_whole(tmp_path):
    checkpoint = Checkpoint.open(bloom(tmp_path, dtype=torch.bfloat16))
    name = "transformer.word_embeddings.weight"
    whole = checkpoint.get(name)
    for first, count in ((0, 1), (0, 97), (13, 40), (96, 1)):
        assert torch.equal(checkpoint.get_rows(name, first, count), whole[first : first + count])


def test_a_shard_that_changes_while_it_is_read(tmp_path):
    """Longer, shorter or rewritten in place: a named error with both states, whichever way the values are read."""
    folder = bloom(tmp_path)
    path, name = folder / "model.safetensors", "transformer.word_embeddings.weight"
    whole = path.read_bytes()
    for changed in (whole + b"\0", whole[:-100], whole[:2000]):
        path.write_bytes(whole)
        checkpoint = Checkpoint.open(folder)
        path.write_bytes(changed)
        with pytest.raises(CheckpointFileError, match=r"model.safetensors (changed while|ends \d+ bytes)"):
            checkpoint.get(name)
        with pytest.raises(CheckpointFileError, match=r"model.safetensors (changed while|ends \d+ bytes)"):
            checkpoint.get_rows(name, 90, 7)
    path.write_bytes(whole)
    checkpoint = Checkpoint.open(folder)
    os.utime(path, ns=(0, 1))
    with pytest.raises(CheckpointFileError, match=rf"changed while .*{len(whole)} bytes.* modified at 0\.000000 now"):
        checkpoint.get(name)
    path.unlink()
    with pytest.raises(CheckpointFileError, match=r"cannot be read"):
        checkpoint.get(name)


def test_a_header_whose_shape_and_place_disagree(tmp_path):
    path = bloom(tmp_path) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[97,48]', b'"shape":[97,47]'))
    with pytest.raises(CheckpointFileError, match=r"18236 bytes, its place in the file has 18624"):
        Checkpoint.open(tmp_path)
