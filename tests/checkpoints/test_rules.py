"""Rules are exactly invertible, and say what does not fit."""

import pytest
import torch

from alibi_hf.checkpoints.plan import make_plan
from alibi_hf.checkpoints.rules import Interleaved, Rule, Split, Transposed
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import TensorError
from tests.all_families import FAMILIES
from tests.builders import bloom, falcon, foundry


@pytest.mark.parametrize("operation", [Split((24, 8, 8)), Interleaved(5, 4), Interleaved(2, 2), Transposed()])
@pytest.mark.parametrize("shape", [(40, 3), (40,)])
def test_operations_invert_bit_for_bit(operation, shape):
    tensor = torch.randn(shape)
    tensor.view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
    back = operation.inverse(operation.forward(tensor))
    assert torch.equal(back.view(torch.int32), tensor.view(torch.int32))


def test_interleaved_takes_the_rows_head_by_head():
    rows = torch.arange(2 * 3 * 4)  # 2 heads, q k v, 4 wide
    query, key, value = Interleaved(2).forward(rows)
    assert query.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert key.tolist()[:4] == [4, 5, 6, 7] and value.tolist()[:4] == [8, 9, 10, 11]


def test_conv1d_weights_are_turned_and_then_split():
    weight, bias = torch.arange(12).view(2, 6), torch.arange(6)  # 2 in, 6 out
    query, key = Transposed(Split((4, 2))).forward(weight)
    assert query.tolist() == [[0, 6], [1, 7], [2, 8], [3, 9]] and key.tolist() == [[4, 10], [5, 11]]
    assert query.is_contiguous() and torch.equal(Transposed(Split((4, 2))).inverse([query, key]), weight)
    assert [part.tolist() for part in Transposed(Split((4, 2))).forward(bias)] == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize("operation", [Split((4, 4)), Interleaved(5)])
def test_rows_that_do_not_fit_are_an_error(operation):
    with pytest.raises(TensorError, match=r"\[7, 2\]"):
        operation.forward(torch.zeros(7, 2))


def test_names_match_with_and_without_prefix_and_nothing_else():
    rule = Rule("h.{i}.ln.weight", ("model.layers.{i}.norm.weight",), prefix="transformer.")
    assert rule.match("transformer.h.12.ln.weight") == rule.match("h.12.ln.weight") == 12
    for name in ("x.h.1.ln.weight", "h.1.ln.weight_scale", "h.1xln.weight", "h.a.ln.weight"):
        assert rule.match(name) is None


@pytest.mark.parametrize("build", [*FAMILIES.values(), foundry])
@pytest.mark.parametrize("heads", [1, 6, 12, 40])
def test_to_and_back_is_bit_identical(build, heads, tmp_path):
    checkpoint = Checkpoint.open(build(tmp_path, heads=heads, layers=1))
    ours = {}
    moved = [group for group in checkpoint.groups if group.fate == "used"]
    for group in moved:
        ours |= zip(group.targets, group.rule.forward(checkpoint.get(group.source)), strict=True)
    for group in moved:
        assert torch.equal(group.rule.inverse([ours[name] for name in group.targets]), checkpoint.get(group.source))


def test_one_key_value_head_of_falcon_inverts(tmp_path):
    checkpoint = Checkpoint.open(falcon(tmp_path, raw={"multi_query": True}))
    group = next(group for group in checkpoint.groups if "query_key_value.weight" in group.source)
    parts = group.rule.forward(checkpoint.get(group.source))
    assert [part.shape[0] for part in parts] == [48, 8, 8]
    assert torch.equal(group.rule.inverse(parts), checkpoint.get(group.source))


def test_missing_left_over_and_doubled_names_are_errors(tmp_path):
    checkpoint = Checkpoint.open(bloom(tmp_path, layers=1))
    names = list(checkpoint.tensors)
    for wrong, message in (
        (names[1:], r"missing from the checkpoint: transformer\."),
        ([*names, "transformer.h.0.extra.weight"], r"not understood.*extra\.weight"),
        ([*names, "transformer.h.7.input_layernorm.weight"], r"config.json says 1 layers.*h\.7"),
        ([*names, names[0].removeprefix("transformer.")], r"two names"),
    ):
        with pytest.raises(TensorError, match=message):
            make_plan(checkpoint.rules, wrong, 1)
