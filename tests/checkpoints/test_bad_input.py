"""Bad checkpoints of every family: each is refused by name, converting and loading alike, and leaves nothing behind."""

import json
import shutil
import struct
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import AlibiError, CheckpointFileError, TensorError, UnknownFamilyError, UnsafeSourceError
from alibi_hf.families import all_families
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from tests.all_families import FAMILIES
from tests.builders import VOCAB
from tests.scratch import scratch_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EVERY = pytest.mark.parametrize("family", FAMILIES)


@cache
def good(family: str, shards: int = 1) -> Path:
    """A checkpoint with nothing wrong; copied before it is changed."""
    return FAMILIES[family](scratch_folder() / "good", shards=shards)


@cache
def source_of(family: str, target: str) -> str:
    """Upstream's name of the tensor that becomes `target`."""
    groups = Checkpoint.open(good(family)).groups
    return next(group.source for group in groups if group.fate == "used" and target in group.targets)


@pytest.fixture
def folder(family, tmp_path):
    return Path(shutil.copytree(good(family), tmp_path / "source"))


def change(folder: Path, file: str = WEIGHTS, **tensors: torch.Tensor | None) -> None:
    """Put tensors in, and take out those that are None."""
    held = load_file(folder / file) | tensors
    save_file({name: value for name, value in held.items() if value is not None}, folder / file)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refused(folder: Path, error: type[AlibiError], *words: str, loading: bool = True) -> None:
    """Converting and, unless told otherwise, loading raise `error` with all of `words`; nothing is left."""
    before = sorted(folder.parent.iterdir())
    calls = [lambda: convert(folder, folder.parent / "out", verify=False, allow_pickle=True)]
    calls += [lambda: AlibiForCausalLM.from_pretrained(folder)] if loading else []
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        assert type(caught.value) is error
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert sorted(folder.parent.iterdir()) == before


def name_of(family: str) -> str:
    return Checkpoint.open(good(family)).family_name


@EVERY
def test_the_config_of_one_family_and_the_tensors_of_another(family, folder):
    raw = json.loads((folder / "config.json").read_text())
    ours = name_of(family)
    for other in all_families():
        name = other.NAMES[0]
        if name != ours and not other.recognise({"model_type": name}, list(load_file(folder / WEIGHTS))):
            edit(folder / "config.json", model_type=name, architectures=[name])
            refused(folder, UnknownFamilyError, f"is the family {name}", "are of", ours, "different checkpoints")
    edit(folder / "config.json", **{key: raw[key] for key in ("model_type", "architectures")})
    assert Checkpoint.open(folder)


@EVERY
def test_a_class_name_of_one_family_and_a_model_type_of_another(family, folder):
    model_type, ours = json.loads((folder / "config.json").read_text())["model_type"], name_of(family)
    for other in all_families():
        if model_type not in other.NAMES and ours not in other.NAMES:
            name = other.NAMES[-1]
            edit(folder / "config.json", architectures=[name])
            refused(folder, UnknownFamilyError, f"{model_type} is", f"{name} is {other.NAMES[0]}", "two families")
    edit(folder / "config.json", architectures=["SomebodysForCausalLM"])
    assert Checkpoint.open(folder).family_name == ours


@EVERY
def test_a_converted_folder_is_no_source(family, folder, tmp_path):
    convert(folder, tmp_path / "ours", verify=False)
    refused(tmp_path / "ours", UnknownFamilyError, "converted already", loading=False)


@EVERY
def test_extra_tensors(family, folder):
    norm = source_of(family, "model.layers.1.input_layernorm.weight")
    for extra in ("adapter.weight", norm.replace(".1.", ".2."), f"{norm}_scale"):
        change(folder, **{extra: torch.ones(48)})
        refused(folder, TensorError, extra, "not understood", "2 layers")
        change(folder, **{extra: None})
    assert Checkpoint.open(folder)


@EVERY
def test_missing_tensors(family, folder):
    for target in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"):
        name = source_of(family, target)
        held = load_file(folder / WEIGHTS)[name]
        change(folder, **{name: None})
        refused(folder, TensorError, name.removeprefix("transformer."), "missing")
        change(folder, **{name: held})
    assert Checkpoint.open(folder)


@EVERY
def test_a_tensor_under_two_names(family, folder):
    name = source_of(family, "model.norm.weight")
    prefix = next(group.rule.prefix for group in Checkpoint.open(folder).groups if group.source == name)
    if not prefix:
        pytest.skip(f"{family} has {name} without a prefix only")
    other = name.removeprefix(prefix) if name.startswith(prefix) else f"{prefix}{name}"
    change(folder, **{other: load_file(folder / WEIGHTS)[name].clone()})
    refused(folder, TensorError, name, other, "two names")


@EVERY
@pytest.mark.parametrize("target", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_a_shape_that_contradicts_the_config(family, target, folder):
    """Both shapes are named, and the config fields that the wrong one contradicts."""
    name = source_of(family, target)
    shape = list(load_file(folder / WEIGHTS)[name].shape)
    wrong = [shape[0] + 8, *shape[1:]]
    change(folder, **{name: torch.zeros(wrong)})
    refused(folder, TensorError, name, str(wrong), str(shape), f"_size={shape[0]}")


@EVERY
@pytest.mark.parametrize(
    ("ours", "change", "words"),
    [
        ("num_hidden_layers", 1, ["missing from the checkpoint"]),
        ("num_hidden_layers", -1, ["not understood", "1 layers"]),
        ("vocab_size", 1, [f"[{VOCAB}, 48]", f"[{VOCAB + 1}, 48]", f"vocab_size={VOCAB + 1}", "fewer rows"]),
    ],
)
def test_a_config_field_that_contradicts_the_tensors(family, ours, change, words, folder):
    raw = json.loads((folder / "config.json").read_text())
    names = [field.names for field in Checkpoint.open(folder).family.FIELDS if field.to == ours]
    name = next(name for name in names[0] if name in raw)
    edit(folder / "config.json", **{name: raw[name] + change})
    refused(folder, TensorError, *words)


@EVERY
def test_a_number_of_dimensions_that_contradicts_the_config(family, folder):
    name = source_of(family, "model.norm.weight")
    change(folder, **{name: torch.ones(48, 1)})
    refused(folder, TensorError, name, "[48, 1]", "[48]")


@EVERY
@pytest.mark.parametrize(("rows", "words"), [(VOCAB + 7, "more rows"), (VOCAB - 7, "fewer rows")])
def test_rows_of_the_vocabulary_that_the_config_does_not_count(family, rows, words, folder):
    """Upstream's classes refuse them too, so they are not guessed to be padding; what to do is said."""
    for target in ("model.embed_tokens.weight", "lm_head.weight"):
        if any(target in group.targets for group in Checkpoint.open(good(family)).groups):
            name = source_of(family, target)
            change(folder, **{name: torch.randn(rows, 48)})
    found = [f"[{rows}, 48]", f"[{VOCAB}, 48]", f"vocab_size={VOCAB}", words, f"set vocab_size to {rows}"]
    refused(folder, TensorError, *found)
    edit(folder / "config.json", vocab_size=rows)
    assert AlibiForCausalLM.from_pretrained(folder).config.vocab_size == rows


def test_upstream_refuses_padding_of_the_vocabulary_too(tmp_path):
    from transformers import AutoModelForCausalLM

    for family in ("bloom", "mpt", "falcon"):
        folder = Path(shutil.copytree(good(family), tmp_path / family))
        change(folder, **{source_of(family, "model.embed_tokens.weight"): torch.randn(VOCAB + 7, 48)})
        with pytest.raises(RuntimeError, match="mismatch"):
            AutoModelForCausalLM.from_pretrained(folder)


@EVERY
@pytest.mark.parametrize(("value", "words"), [(float("nan"), "2 NaN and 0 Inf"), (float("-inf"), "0 NaN and 2 Inf")])
def test_values_that_are_no_numbers(family, value, words, folder):
    for target in ("model.layers.1.self_attn.v_proj.weight", "model.norm.weight"):
        name = source_of(family, target)
        held = load_file(folder / WEIGHTS)[name]
        broken = held.clone()
        broken.view(-1)[-2:] = value
        change(folder, **{name: broken})
        refused(folder, TensorError, name, words, "--allow-nonfinite", loading=False)
        change(folder, **{name: held})


@EVERY
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool])
def test_weights_that_are_integers(family, dtype, folder):
    name = source_of(family, "model.layers.0.mlp.down_proj.weight")
    change(folder, **{name: load_file(folder / WEIGHTS)[name].to(dtype)})
    refused(folder, TensorError, name, str(dtype).removeprefix("torch."), "unquantised")


@pytest.fixture
def sharded(family, tmp_path):
    return Path(shutil.copytree(good(family, 3), tmp_path / "source"))


@EVERY
def test_an_index_that_names_a_file_that_is_not_there(family, sharded):
    absent = sharded / "model-00002-of-00003.safetensors"
    absent.unlink()
    refused(sharded, CheckpointFileError, str(absent), "is missing")


@EVERY
def test_an_index_that_names_a_tensor_that_is_not_there(family, sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00003.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, CheckpointFileError, "ghost.weight", "does not hold it")


@EVERY
def test_a_tensor_in_two_shards(family, sharded):
    name = next(iter(load_file(sharded / "model-00001-of-00003.safetensors")))
    change(sharded, "model-00003-of-00003.safetensors", **{name: torch.zeros(2)})
    refused(sharded, CheckpointFileError, "model-00001", "model-00003", f"both hold {name}")


@EVERY
@pytest.mark.parametrize("size", [0, 7, 300, -1], ids=["empty", "no header", "half a header", "a byte short"])
def test_a_truncated_file(family, size, folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])
    refused(folder, CheckpointFileError, str(folder / WEIGHTS), "truncated or damaged")


def rewrite_header(path: Path, function) -> None:
    """Pass the text of a safetensors header through `function`."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = function(data[8:start].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[start:])


@EVERY
def test_a_header_with_a_tensor_twice(family, folder):
    name = source_of(family, "model.norm.weight")
    again = f'{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},'
    rewrite_header(folder / WEIGHTS, lambda text: again + text[1:])
    refused(folder, CheckpointFileError, f"{name} is there twice")


@EVERY
def test_a_header_whose_shape_does_not_fit_its_place(family, folder):
    name = source_of(family, "model.norm.weight")

    def shorten(text: str) -> str:
        header = json.loads(text)
        header[name]["shape"] = [40]
        return json.dumps(header)

    rewrite_header(folder / WEIGHTS, shorten)
    refused(folder, CheckpointFileError, name, "[40]", "160 bytes", "192")


@EVERY
def test_a_header_in_which_two_tensors_share_bytes(family, folder):
    norms = [source_of(family, f"model.layers.{layer}.input_layernorm.weight") for layer in (0, 1)]

    def overlap(text: str) -> str:
        header = json.loads(text)
        header[norms[0]]["data_offsets"] = header[norms[1]]["data_offsets"]
        return json.dumps(header)

    rewrite_header(folder / WEIGHTS, overlap)
    refused(folder, CheckpointFileError, "one tensor ends at byte", "the next begins at")


@EVERY
def test_a_config_with_a_field_twice(family, folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"vocab_size": 5, ' + text[1:])
    refused(folder, CheckpointFileError, "vocab_size is there twice")


@EVERY
@pytest.mark.parametrize("text", ["", "{", "[1]", '"bloom"', "\x00"], ids=["empty", "open", "list", "text", "zero"])
def test_a_config_that_is_no_object(family, text, folder):
    (folder / "config.json").write_text(text)
    refused(folder, CheckpointFileError, str(folder / "config.json"), "JSON", loading=False)


@EVERY
@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_a_file_that_is_missing(family, missing, folder):
    (folder / missing).unlink()
    refused(folder, CheckpointFileError, missing, loading=False)


@EVERY
def test_a_pickle_cut_short(family, folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    data = (folder / "pytorch_model.bin").read_bytes()
    assert Checkpoint.open(folder, allow_pickle=True)
    with pytest.raises(UnsafeSourceError, match="--allow-pickle"):
        convert(folder, folder.parent / "out", verify=False)
    for size in (0, 100, len(data) // 2):
        (folder / "pytorch_model.bin").write_bytes(data[:size])
        refused(folder, CheckpointFileError, "pytorch_model.bin", "cannot be read", loading=False)
