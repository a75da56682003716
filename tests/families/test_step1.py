"""Step1: config, layout, and parity with the formulas; the bias grows with the root of the distance."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from alibi_hf.checkpoints.inspect import inspect_checkpoint
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import ConfigFieldError, TensorError
from alibi_hf.families import find_family
from tests.families.agreement import check, prove, scale_slopes, swap, tokens, wrong_by
from tests.families.test_fields import mapped
from tests.references import step1

CASES = {
    "one group": {"groups": 1},
    "as many groups as heads": {"groups": 6},
    "odd widths": {"groups": 2, "inner": 91, "layers": 3, "seed": 1},
    "bare sharded": {"prefix": False, "shards": 3},
    "norm eps": {"raw": {"rms_norm_eps": 0.01}},
    "tied": {"raw": {"tie_word_embeddings": True}},
    "bfloat16": {"groups": 3, "dtype": torch.bfloat16},
}

ROOTS = 1e-7  # the roots of a float32 distance differ in the last bit from one shape of tensor to another


def test_a_published_config_maps():
    raw = {"max_seq_len": 8192, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "intermediate_size": 91}
    config = mapped("step1", **raw, attention_bias=False, mlp_bias=False, initializer_range=0.02)
    assert (config.max_position_embeddings, config.norm_eps, config.intermediate_size) == (8192, 1e-6, 91)
    assert (config.num_key_value_heads, config.alibi_distance, config.hidden_act) == (2, "sqrt", "silu")
    assert (config.norm_type, config.mlp_type, config.tie_word_embeddings) == ("rms_norm", "gated", False)
    assert mapped("step1", tie_word_embeddings=True).tie_word_embeddings


def test_upstreams_defaults_fill_in():
    raw = {"model_type": "step1"}
    config = find_family(raw).config(raw)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (5120, 48, 40)
    assert (config.num_key_value_heads, config.intermediate_size, config.vocab_size) == (8, 13312, 65536)
    assert (config.max_position_embeddings, config.norm_eps) == (4096, 1e-5)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_groups": 4}, r"num_attention_groups: a width of 6 cannot be shared out among 4"),
        ({"num_attention_groups": 0}, r"num_attention_groups"),
        ({"attention_bias": True}, r"attention_bias=True.*no biases"),
        ({"mlp_bias": True}, r"mlp_bias=True"),
        ({"rope_theta": 1e4}, r"rope_theta=10000.0"),
    ],
)
def test_what_cannot_be_expressed_stops(fields, message):
    with pytest.raises(ConfigFieldError, match=message):
        mapped("step1", **fields)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 2), (12, 4), (40, 8)])
def test_head_counts(heads, groups, tmp_path):
    check(step1, step1.write(tmp_path / "source", heads, groups=groups, layers=1), tmp_path / "out", limit=ROOTS)


@pytest.mark.parametrize("case", CASES)
def test_features(case, tmp_path):
    check(step1, step1.write(tmp_path / "source", **CASES[case]), tmp_path / "out", limit=ROOTS)


def test_it_is_proved(tmp_path):
    source = step1.write(tmp_path / "source", groups=2, layers=1)
    report = prove(source, tmp_path / "out")
    assert "upstream does not" in report.reference["reason"]
    assert "sqrt distance" in inspect_checkpoint(source).position


def test_stale_fields_of_dense_checkpoints_are_read_over_but_experts_stop(tmp_path):
    raw = {"architectures": ["Step1MoEForCausalLM"], "use_moe": False, "moe_num_experts": 8, "moe_top_k": 2}
    source = step1.write(tmp_path, raw=raw)
    checkpoint = Checkpoint.open(source)
    assert checkpoint.family_name == "step1"
    state = load_file(source / "model.safetensors") | {"model.layers.0.moe.gate.weight": torch.zeros(8, 48)}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TensorError, match=r"not understood.*moe\.gate"):
        Checkpoint.open(source)


def test_every_rule_copies_and_a_wrong_number_of_groups_is_refused(tmp_path):
    checkpoint = Checkpoint.open(step1.write(tmp_path, groups=3))
    assert {group.rule.describe() for group in checkpoint.groups} == {"copy"}
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_attention_groups": 3', '"num_attention_groups": 2'))
    with pytest.raises(TensorError, match=r"k_proj.weight has shape \[24, 48\].*\[16, 48\]"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.05])
def test_a_wrong_bias_does_not_pass(factor, tmp_path):
    source = step1.write(tmp_path, 12, groups=4)
    assert wrong_by(source, step1.logits(source, tokens()), scale_slopes(factor)) > 1e-4


def test_a_linear_distance_does_not_pass(tmp_path):
    def change(model):
        model.config.alibi_distance = "linear"

    source = step1.write(tmp_path)
    assert wrong_by(source, step1.logits(source, tokens()), change) > 1e-3


@pytest.mark.parametrize("swapped", [("mlp.gate_proj", "mlp.up_proj"), ("self_attn.k_proj", "self_attn.v_proj")])
def test_a_wrong_order_does_not_pass(swapped, tmp_path):
    source = step1.write(tmp_path)
    assert wrong_by(source, step1.logits(source, tokens()), swap(*swapped)) > 1e-3
