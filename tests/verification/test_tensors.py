"""Every tensor of the source, bit for bit, from the output."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.verification.tensors import check_tensors, same_bits, stored_dtype
from tests import builders
from tests.verification.converted import pair


def changed(output: Path, folder: Path, change) -> Path:
    """A copy of the output whose tensors went through `change`."""
    shutil.copytree(output, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon"])
def test_right_tensors(family: str) -> None:
    source, output = pair(family, 12)
    check = check_tensors(Checkpoint.open(source), output)
    assert check.passed and check.ours == 0 and "bit for bit" in check.note


def one_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"].view(torch.int32)[0] ^= 1


def swap_keys(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["model.layers.1.self_attn.k_proj.weight"]
    weight[: 2 * builders.HEAD_DIM] = weight[: 2 * builders.HEAD_DIM].roll(builders.HEAD_DIM, 0).clone()


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.bias"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.extra.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (one_bit, "ln_f.weight"),
        (swap_keys, "h.1.self_attention.query_key_value.weight"),
        (drop, "ln_f.bias (missing)"),
        (add, "model.extra.weight (nothing in the source)"),
    ],
)
def test_what_differs_is_named(change, named: str, tmp_path) -> None:
    source, output = pair("bloom")
    check = check_tensors(Checkpoint.open(source), changed(output, tmp_path / "output", change))
    assert not check.passed and check.ours == 1 and named in check.note


def test_another_dtype_is_equal_after_the_cast(tmp_path) -> None:
    source, _ = pair("mpt")
    convert(source, tmp_path / "output", dtype="bfloat16", verify=False)
    check = check_tensors(Checkpoint.open(source), tmp_path / "output")
    assert check.passed and "after the cast" in check.note
    assert stored_dtype(tmp_path / "output") == torch.bfloat16


def test_bits_not_values() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))
