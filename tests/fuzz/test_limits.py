"""Where the limits lie: what is large and right is read, what is beyond is refused, and nothing is made on the way."""

import json
import os
import shutil
import struct
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.export import export
from alibi_hf.checkpoints.inspect import inspect_checkpoint
from alibi_hf.checkpoints.json_files import MAX_DEPTH, MAX_JSON, parse_json, read_json
from alibi_hf.checkpoints.resume import Journal
from alibi_hf.checkpoints.shards import load_pickle, safetensors_shard
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.checkpoints.source_card import read_source_card
from alibi_hf.checkpoints.writer import JOURNAL, Entry, _header
from alibi_hf.errors import AlibiError, CheckpointFileError, ConfigFieldError, TensorError
from alibi_hf.model.configuration_alibi import LARGEST, AlibiConfig
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from tests.builders import bloom, falcon
from tests.fuzz.loaders import good

TERABYTE = 1 << 40


def header_of(tensors: dict[str, list[int]]) -> tuple[bytes, int]:
    """The header of a file with these shapes in float32, and the bytes after it."""
    entries = [Entry(name, tuple(shape), torch.float32) for name, shape in tensors.items()]
    return _header(entries), sum(entry.bytes for entry in entries)


@pytest.fixture
def terabyte(tmp_path) -> Path:
    """A BLOOM whose embedding says that it has a terabyte; the file is sparse and takes some kilobytes."""
    folder = bloom(tmp_path / "source", heads=64, layers=1)
    shapes = {name: list(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    rows = LARGEST["vocab_size"]
    shapes["transformer.word_embeddings.weight"][0] = rows
    header, size = header_of(shapes)
    (folder / "model.safetensors").write_bytes(header)
    os.truncate(folder / "model.safetensors", len(header) + size)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "vocab_size": rows}))
    return folder


def test_a_sparse_file_takes_no_memory_to_look_at(terabyte):
    found = inspect_checkpoint(terabyte)  # allocating would raise: no machine of ours has as much
    assert found.memory_to_load == found.parameters * 4 > TERABYTE // 10
    assert (terabyte / "model.safetensors").stat().st_blocks * 512 < 1 << 20


def test_a_sparse_file_is_not_written_to_a_disk_that_cannot_hold_it(terabyte, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100 << 30))
    with pytest.raises(CheckpointFileError, match="writing needs 137.* GB, .* has 107.* GB free"):
        convert(terabyte, tmp_path / "out", verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["tokenizer.model", "LICENSE"])
def test_a_sparse_file_beside_the_weights_is_not_copied_to_a_disk_that_cannot_hold_it(tmp_path, monkeypatch, name):
    source, ours = bloom(tmp_path / "source"), tmp_path / "ours"
    convert(source, ours, verify=False)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=200 << 20))
    for folder, write in ((source, partial(convert, verify=False)), (ours, partial(export, to="bloom"))):
        (folder / name).touch()
        os.truncate(folder / name, 256 << 20)
        with pytest.raises(CheckpointFileError, match="writing needs 0.33 GB, .* has 0.21 GB free"):
            write(folder, tmp_path / "out")
        (folder / name).unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]


def test_an_endless_card_is_not_read(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert read_source_card(tmp_path) == {"license": "mit"}
    os.truncate(tmp_path / "README.md", 2 << 20)
    assert read_source_card(tmp_path) == {}


def test_sizes_as_large_as_allowed_are_compared_with_the_file(tmp_path):
    """Nothing is made of them: they are shapes without memory."""
    folder = falcon(tmp_path / "source")
    raw = json.loads((folder / "config.json").read_text())
    large = {"hidden_size": 2**20, "num_attention_heads": 2**14, "vocab_size": 2**26, "num_hidden_layers": 2**10}
    (folder / "config.json").write_text(json.dumps({**raw, **large}))
    with pytest.raises(TensorError, match="are missing from the checkpoint"):
        Checkpoint.open(folder)
    (folder / "config.json").write_text(json.dumps({**raw, **large, "num_hidden_layers": 2}))
    with pytest.raises(TensorError, match="gives .*67108864"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", LARGEST)
def test_one_more_than_allowed_is_refused(name):
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    ours = {name: LARGEST[name]} | ({"num_key_value_heads": LARGEST[name]} if name == "num_attention_heads" else {})
    if name != "num_key_value_heads":
        AlibiConfig(**{**small, **ours})
    with pytest.raises(Exception, match=f"{name}={LARGEST[name] + 1} is more than any decoder has"):
        AlibiConfig(**{**small, name: LARGEST[name] + 1})


def test_what_tokenizers_write_is_no_attack(tmp_path):
    """Transformers writes a length without end as a number of 31 digits."""
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": int(1e30), "chat_template": "\u00e4 \U0001f600 \\ud800"}))
    assert read_json(path)["model_max_length"] == int(1e30)


def test_depth_and_size_at_the_limit(tmp_path):
    path = tmp_path / "config.json"
    deepest = '{"a":' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}"
    assert parse_json(deepest.encode())
    with pytest.raises(ValueError, match=f"nested more than {MAX_DEPTH} deep"):
        parse_json(f"[{deepest}]".encode())
    path.write_text("{}" + " " * (MAX_JSON - 2))
    assert read_json(path) == {}
    path.write_text("{}" + " " * (MAX_JSON - 1))
    with pytest.raises(CheckpointFileError, match=f"it has {MAX_JSON + 1} bytes, and at most {MAX_JSON} are read"):
        read_json(path)


def test_a_header_of_many_tensors_is_read(tmp_path):
    header, _ = header_of({f"transformer.h.{number}.weight": [0] for number in range(20_000)})
    (tmp_path / "model.safetensors").write_bytes(header)
    assert len(safetensors_shard(tmp_path / "model.safetensors")) == 20_000
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", MAX_JSON) + header[8:].ljust(MAX_JSON))
    assert len(safetensors_shard(tmp_path / "model.safetensors")) == 20_000


def test_what_a_file_says_does_not_steer_the_terminal(tmp_path):
    name = "\x1b]0;owned\x07\x1b[2J\x85\u2028" + "x" * 10_000
    folder = bloom(tmp_path / "source")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, name: 1}))
    with pytest.raises(ConfigFieldError) as caught:
        Checkpoint.open(folder)
    said = str(caught.value)
    assert "\\x1b]0;owned\\x07\\x1b[2J\\x85\\u2028" in said and said.endswith("cannot be expressed.")
    assert said.isprintable() and len(said) < 2100 and "characters left out" in said


def test_a_message_of_several_lines_stays_as_it_is():
    text = "two\nlines, with \u00e4 and \u4e2d"
    assert str(AlibiError(text)) == text


def test_pickles_that_hold_no_plain_tensors(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for held in ({"a": torch.eye(3).to_sparse()}, {"a": torch.zeros(1).expand(10**9)}):
        torch.save(held, path)
        with pytest.raises(CheckpointFileError, match="when read. Save it as a plain tensor"):
            load_pickle(path, device="meta")
    torch.save({1: torch.ones(2)}, path)
    with pytest.raises(CheckpointFileError, match="not a state dict"):
        load_pickle(path)


def test_two_layer_files_of_one_rank(tmp_path):
    folder = bloom(tmp_path / "source")
    (folder / "model.safetensors").unlink()
    for name in ("layer_3-model_00-model_states.pt", "layer_03-model_00-model_states.pt"):
        torch.save({}, folder / name)
    with pytest.raises(CheckpointFileError, match="are one layer and rank"):
        Checkpoint.open(folder, allow_pickle=True)


@pytest.mark.parametrize(
    "left",
    [
        {"plan": {"files": [], "options": 7}, "finished": []},
        {"plan": {"files": [], "options": {}}, "finished": [{"name": "a", "bytes": "x"}]},
        {"plan": {"files": [{"name": "a", "odd": 1}], "options": {}}, "finished": []},
        {"plan": [], "finished": []},
    ],
)
def test_a_journal_that_is_none(tmp_path, left):
    (tmp_path / JOURNAL).write_text(json.dumps(left))
    with pytest.raises(CheckpointFileError, match="is no journal of this version"):
        Journal(tmp_path, [], {}).read()


def test_a_shard_without_a_size_is_not_finished(tmp_path):
    (tmp_path / JOURNAL).write_text('{"plan": {"files": [], "options": {}}, "finished": [{"name": "a"}]}')
    (tmp_path / "a").write_text("a shard")
    journal = Journal(tmp_path, [], {})
    journal.read()
    assert journal.intact("a") is None and journal.bytes == 0


@pytest.mark.parametrize("text", ["0", '{"max_new_tokens": ""}'])
def test_generation_settings_beside_our_own_layout(tmp_path, text):
    folder = Path(shutil.copytree(good("ours", "bloom"), tmp_path / "ours"))
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(AlibiError, match="generation_config.json"):
        AlibiForCausalLM.from_pretrained(folder)
