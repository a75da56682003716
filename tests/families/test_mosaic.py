"""MosaicGPT and Replit-code-v1: flat config, old names, slopes without the power-of-two correction."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.inspect import inspect_checkpoint
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import ConfigFieldError, TensorError, UnknownFamilyError
from alibi_hf.families import find_family
from alibi_hf.verification import verify
from tests.families.agreement import SINGLE, check, scale_slopes, tokens, wrong_by
from tests.references import mosaic
from tests.references.mosaic import write

FAMILIES = ["mosaic_gpt", "replit_lm"]
CASES = {
    "as published": {},
    "without query/key norm": {"raw": {"attn_qk_ln": False}},
    "biases": {"raw": {"no_bias": False}},
    "clip, scales, bias_max 16": {
        "raw": {"attn_clip_qkv": 2, "softmax_scale": 0.2, "logit_scale": "inv_sqrt_d_model", "alibi_bias_max": 16}
    },
    "narrow, sharded": {"raw": {"mlp_ratio": 2, "logit_scale": 0.5}, "shards": 3},
    "Composer's names": {"start": "model."},
    "bare names in float16": {"prefix": False, "dtype": torch.float16},
}


def mapped(family="mosaic_gpt", **fields):
    raw = {"model_type": family, "vocab_size": 97, "d_model": 48, "n_layers": 2, "n_heads": 6, "alibi": True, **fields}
    return find_family(raw).config(raw)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_feature(family, case, tmp_path):
    check(mosaic, write(tmp_path / "source", family=family, **CASES[case]), tmp_path / "out", SINGLE)


@pytest.mark.parametrize("heads", [1, 6, 12, 16, 40])
def test_head_counts(heads, tmp_path):
    check(mosaic, write(tmp_path / "source", heads=heads, layers=1), tmp_path / "out", SINGLE, backend="sdpa")


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_wrong_bias_does_not_pass(factor, tmp_path):
    folder = write(tmp_path, family="replit_lm")
    assert wrong_by(folder, mosaic.logits(folder, tokens()), scale_slopes(factor)) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_are_written_down_where_they_are_not_the_papers(family):
    assert mapped(family, n_heads=8).alibi_slopes is None
    assert mapped(family, n_heads=8, alibi_bias_max=16).alibi_bias_max == 16
    config = mapped(family, n_heads=6, alibi_bias_max=12)
    assert config.alibi_slopes == pytest.approx([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-10, 2.0**-12], rel=1e-15)


def test_defaults_are_upstreams():
    raw = {"model_type": "mosaic_gpt", "alibi": True}
    config = find_family(raw).config(raw)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (50368, 2048, 24)
    assert (config.num_attention_heads, config.max_position_embeddings) == (16, 2048)
    assert config.intermediate_size == 8192 and config.qk_norm is None and config.hidden_act == "gelu"
    assert config.norm_bias and config.attention_bias and config.attention_out_bias and config.mlp_bias
    assert mapped(attn_clip_qkv=0).clip_qkv is None and mapped(attn_clip_qkv=6).clip_qkv == 6
    dropped = mapped(attn_pdrop=0.1, resid_pdrop=0.2, emb_pdrop=0.3)
    assert (dropped.attention_dropout, dropped.hidden_dropout, dropped.embedding_dropout) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alibi": False}, r"mosaic_gpt: alibi=False .*learned positions.*trust_remote_code"),
        ({"prefix_lm": True}, r"prefix_lm=True"),
        ({"tie_word_embeddings": False}, r"tie_word_embeddings=False"),
        ({"attn_config": {"alibi": True}}, r"attn_config=.*Set model_type to 'mpt'"),
        ({"norm_type": "layernorm"}, r"norm_type='layernorm'.*'mpt'"),
        ({"logit_scale": "sqrt"}, r"mosaic_gpt: logit_scale='sqrt'"),
        ({"alibi_bias_max": 0}, r"alibi_bias_max=0"),
        ({"mlp_ratio": 2.5}, r"mlp_ratio=2.5"),
        ({"n_heads": 7}, r"48 cannot be shared out among 7"),
        ({"frobnicate": 1}, r"mosaic_gpt: the field frobnicate=1"),
    ],
)
def test_what_cannot_be_expressed_stops(fields, message):
    with pytest.raises(ConfigFieldError, match=message):
        mapped(**fields)


def test_rules_and_their_inverse_keep_every_bit(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path, raw={"no_bias": False}))
    held = load_file(tmp_path / "model.safetensors")
    assert {group.source for group in checkpoint.groups} == set(held)
    for group in checkpoint.groups:
        assert torch.equal(group.rule.inverse(group.rule.forward(held[group.source])), held[group.source])


def test_names_and_rows_of_another_layout_are_refused(tmp_path):
    folder = write(tmp_path)
    held = load_file(folder / "model.safetensors")
    wrong = {**held, "transformer.blocks.0.attn.Wqkv.weight": torch.zeros(145, 48)}
    save_file(wrong, folder / "model.safetensors")
    with pytest.raises(TensorError, match=r"Wqkv\.weight has shape \[145, 48\].* \[144, 48\]"):
        Checkpoint.open(folder)
    renamed = {name.replace(".ln_f", ".norm_f"): tensor for name, tensor in held.items()}
    save_file(renamed, folder / "model.safetensors")
    with pytest.raises(UnknownFamilyError, match=r"mosaic_gpt"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_proved_and_inspected(family, tmp_path):
    folder = write(tmp_path / "source", family=family, layers=1, raw={"max_seq_len": 8})
    convert(folder, tmp_path / "out", verify=False)
    result = verify(folder, tmp_path / "out", lengths=[8, 12], text="a plain text")
    assert result.proved and len(result.negative_controls) == 4  # in layers and whole
    assert all(control.caught for control in result.negative_controls)
    inspection = inspect_checkpoint(folder)
    assert inspection.family == family and inspection.slopes == pytest.approx([2 ** (-8 * i / 6) for i in range(1, 7)])
