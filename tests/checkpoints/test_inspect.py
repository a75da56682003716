"""`inspect_checkpoint` says what a checkpoint is, and writes nothing."""

import json

import pytest

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.inspect import inspect_checkpoint
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from tests.all_families import FAMILIES
from tests.builders import bloom, foundry


@pytest.mark.parametrize("family", FAMILIES)
def test_it_agrees_with_the_conversion_and_writes_nothing(family, tmp_path):
    source = FAMILIES[family](tmp_path / "source", shards=2)
    before = sorted(tmp_path.rglob("*"))
    found = inspect_checkpoint(source)
    assert sorted(tmp_path.rglob("*")) == before
    assert found.family == family and found.class_name == "AlibiForCausalLM"
    assert len(found.slopes) == 6 and all(slope > 0 for slope in found.slopes)
    conversion = convert(source, tmp_path / "out", verify=False)
    model = AlibiForCausalLM.from_pretrained(tmp_path / "out")
    assert found.parameters == model.num_parameters()
    assert found.memory_to_load == found.disk_to_convert == 4 * found.parameters
    assert found.cache_per_token == 2 * 2 * 8 * 4 * model.config.num_key_value_heads
    assert [row["source"] for row in found.tensors] == [row["source"] for row in conversion.tensors]


def test_the_reference_is_named_with_the_reason(tmp_path):
    found = inspect_checkpoint(foundry(tmp_path, attn_config={"alibi_bias_max": 16}))
    assert "PlainMpt" in found.reference and "alibi_bias_max=16" in found.reference_note
    assert "2^(-16 i / heads)" in found.position


def test_the_report_is_saved(tmp_path):
    path = inspect_checkpoint(bloom(tmp_path / "source")).save(tmp_path / "report")
    assert json.loads(path.read_text())["family"] == "bloom"
