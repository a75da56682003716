"""Every layout and feature of llm-foundry's MPT against a reference that shares no code with the package."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import TensorError
from alibi_hf.families import find_family
from alibi_hf.families._mpt_layout import mpt_layout
from alibi_hf.verification import verify
from tests.families.agreement import SINGLE, check, scale_slopes, swap, tokens, wrong_by
from tests.references import foundry
from tests.references.foundry import write

GQA = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
GLU = {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}}
CASES = {
    "usual": {},
    "bias_max 16, clip, scale": {"attn_config": {"alibi_bias_max": 16, "clip_qkv": 1, "softmax_scale": 0.2}},
    "unfused": {"attn_config": {"fused_qkv": False}},
    "unfused, grouped, biases, qk_ln": {
        "attn_config": {"fused_qkv": False, "qk_ln": True, "clip_qkv": 2.0, **GQA},
        "raw": {"no_bias": False},
    },
    "fused norms": {"raw": {"fuse_norm_attn_norm": True}},
    "fused norms, unfused, gated": {
        "attn_config": {"fused_qkv": False, "qk_gn": True},
        "raw": {"fuse_norm_attn_norm": True, "no_bias": False, "ffn_config": GLU},
    },
    "biases of q, k, v alone": {"raw": {"no_bias": True, "attention_bias": True}},
    "all biases but q, k, v": {"raw": {"no_bias": False, "attention_bias": False}},
    "wider heads": {"attn_config": {"fused_qkv": False}, "raw": {"head_dim": 12}},
    "rms norm, eps, odd width": {
        "raw": {"norm_type": "rmsnorm", "norm_eps": 1e-6, "ffn_config": {"ffn_hidden_size": 33}}
    },
    "low-precision rms norm": {"raw": {"norm_type": "low_precision_rmsnorm", "expansion_ratio": 1.5, "no_bias": False}},
    "rms norm everywhere": {"raw": {"norm_type": "rmsnorm"}, "attn_config": {"qk_ln": True, "norm_type": "rmsnorm"}},
    "qk_gn, one key head": {"attn_config": {"qk_gn": True, "attn_type": "multiquery_attention"}},
    "scales, caps, untied": {
        "attn_config": {"attn_logit_softcapping": 5.0},
        "raw": {"logit_scale": "inv_sqrt_d_model", "final_logit_softcapping": 2.0, "tie_word_embeddings": False},
    },
    "quick gelu, sharded, Composer's names": {
        "raw": {"ffn_config": {"ffn_act_fn": {"name": "quick_gelu"}}},
        "start": "model.",
        "shards": 3,
    },
    "bare names in bfloat16": {"prefix": False, "dtype": torch.bfloat16},
    "fields that recent configs spell out": {
        "attn_config": {
            "nope": False,
            "kv_dim": None,
            "attn_temperature_tuning": {"floor_scale": 8192, "attn_scale": 0.0},
            "sliding_window_size": -1,
        },
        "raw": {"fc_type": {"name": "torch"}, "attention_bias": False},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_every_feature(case, tmp_path):
    check(foundry, write(tmp_path / "source", **CASES[case]), tmp_path / "out", SINGLE)


@pytest.mark.parametrize("heads", [1, 6, 12, 40])
def test_head_counts(heads, tmp_path):
    folder = write(tmp_path / "source", heads=heads, layers=1, attn_config={"fused_qkv": False})
    check(foundry, folder, tmp_path / "out", SINGLE, backend="sdpa")


@pytest.mark.parametrize(
    "change", [scale_slopes(0.0), scale_slopes(-1.0), swap("mlp.gate_proj", "mlp.up_proj")], ids=["0", "-1", "gate"]
)
def test_a_wrong_bias_or_gate_does_not_pass(change, tmp_path):
    folder = write(tmp_path, attn_config={"fused_qkv": False}, raw={"ffn_config": GLU})
    assert wrong_by(folder, foundry.logits(folder, tokens()), change) > 1e-3


@pytest.mark.parametrize("raw", [{}, {"fuse_norm_attn_norm": True}])
@pytest.mark.parametrize("fused_qkv", [True, False])
def test_rules_and_their_inverse_keep_every_bit(raw, fused_qkv, tmp_path):
    attention = {"fused_qkv": fused_qkv, **GQA}
    checkpoint = Checkpoint.open(write(tmp_path, raw={"no_bias": False, **raw}, attn_config=attention))
    held = load_file(tmp_path / "model.safetensors")
    assert {group.source for group in checkpoint.groups} == set(held)
    for group in checkpoint.groups:
        assert torch.equal(group.rule.inverse(group.rule.forward(held[group.source])), held[group.source])


def test_layouts_are_read_from_config():
    assert mpt_layout({"attn_config": {"fused_qkv": False}}).unusual() == {"fused_qkv": False}
    assert mpt_layout({"fuse_norm_attn_norm": True}).unusual() == {"fuse_norm_attn_norm": True}
    raw = {"model_type": "mpt", "attn_config": {"alibi": True}}
    assert find_family(raw) is find_family({"model_type": "mpt"})


def test_a_layout_that_config_denies_is_refused(tmp_path):
    folder = write(tmp_path, attn_config={"fused_qkv": False})
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"fused_qkv": false', '"fused_qkv": true'))
    with pytest.raises(TensorError, match=r"not understood.*blocks\.0\.attn\.Wq\.weight"):
        Checkpoint.open(folder)


def test_wrong_rows_are_refused(tmp_path):
    folder = write(tmp_path, attn_config={"fused_qkv": False, **GQA})
    held = load_file(folder / "model.safetensors")
    held["transformer.blocks.1.attn.Wk.weight"] = torch.zeros(24, 48)
    save_file(held, folder / "model.safetensors")
    with pytest.raises(TensorError, match=r"blocks\.1\.attn\.Wk\.weight has shape \[24, 48\].* \[16, 48\]"):
        Checkpoint.open(folder)


def test_an_unusual_layout_is_proved(tmp_path):
    raw = {"fuse_norm_attn_norm": True, "no_bias": False, "max_seq_len": 8}
    folder = write(tmp_path / "source", layers=1, attn_config={"fused_qkv": False, **GQA}, raw=raw)
    convert(folder, tmp_path / "out", verify=False)
    result = verify(folder, tmp_path / "out", lengths=[8, 12], text="a plain text")
    assert result.proved
    assert len(result.negative_controls) == 4 and all(control.caught for control in result.negative_controls)
    assert "fused_qkv=False" in result.reference["reason"]
