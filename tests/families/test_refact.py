"""Refact: config, both layouts, and parity with the formulas."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import ConfigFieldError, TensorError
from alibi_hf.families import find_family
from tests.builders import distance
from tests.families.agreement import check, loaded, prove, scale_slopes, swap, tokens, wrong_by
from tests.families.test_fields import MINIMAL, mapped
from tests.references import refact

CASES = {
    "n_inner": {"raw": {"n_inner": 400}},
    "layers": {"layers": 3},
    "bare sharded": {"prefix": False, "shards": 3},
    "norm eps": {"raw": {"layer_norm_epsilon": 0.01}},
    "tie is not read": {"raw": {"tie_word_embeddings": True}},
    "bfloat16": {"dtype": torch.bfloat16},
}
FUSED = ("attn.kv.weight", "mlp.gate_up_proj.weight")


def test_a_published_config_maps():
    raw = {
        "attention_bias_in_fp32": True,
        "attention_softmax_in_fp32": True,
        "scale_attention_softmax_in_fp32": True,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "bos_token_id": -1,
        "do_sample": True,
        "multi_query": True,
        "n_inner": None,
        "n_positions": 2048,
    }
    config = mapped("refact", **raw, layer_norm_epsilon=1e-6, tie_word_embeddings=True)
    assert (config.num_key_value_heads, config.intermediate_size, config.norm_eps) == (1, 256, 1e-6)
    assert (config.norm_type, config.norm_bias, config.mlp_type, config.hidden_act) == (
        "layer_norm",
        False,
        "gated",
        "silu",
    )
    assert config.max_position_embeddings == 2048 and not config.tie_word_embeddings
    assert config.hidden_dropout == config.attention_dropout == 0.0


def test_upstreams_defaults_fill_in_but_the_sizes_must_be_there():
    config = mapped("refact")
    assert (config.max_position_embeddings, config.norm_eps, config.eos_token_id) == (4096, 1e-5, 0)
    for name in ("n_embd", "n_layer", "n_head"):
        raw = {field: value for field, value in MINIMAL["refact"].items() if field != name}
        with pytest.raises(ConfigFieldError, match=rf"{name} is missing"):
            find_family(raw).config(raw)


@pytest.mark.parametrize(("width", "inner", "expected"), [(2048, None, 5632), (48, None, 256), (48, 400, 512)])
def test_the_width_of_the_mlp(width, inner, expected):
    assert mapped("refact", n_embd=width, n_head=4, n_inner=inner).intermediate_size == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"multi_query": False}, r"multi_query=False.*one key/value head"),
        ({"hidden_size": 64}, r"n_embd.*disagree"),
        ({"rope_theta": 1e4}, r"rope_theta=10000.0"),
    ],
)
def test_what_cannot_be_expressed_stops(fields, message):
    with pytest.raises(ConfigFieldError, match=message):
        mapped("refact", **fields)


@pytest.mark.parametrize("heads", [1, 6, 12, 40])
def test_head_counts(heads, tmp_path):
    check(refact, refact.write(tmp_path / "source", heads, layers=1), tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
def test_features(case, tmp_path):
    check(refact, refact.write(tmp_path / "source", **CASES[case]), tmp_path / "out")


@pytest.mark.parametrize("prefix", [True, False])
def test_the_names_from_before_the_release(prefix, tmp_path):
    expected = refact.logits(refact.write(tmp_path / "released"), tokens(), single=True)
    source = refact.write(tmp_path / "source", released=False, prefix=prefix)
    for model in loaded(source, tmp_path / "out"):
        with torch.no_grad():
            assert distance(model(tokens()).logits, expected) < 1e-10


@pytest.mark.parametrize("released", [True, False])
def test_it_is_proved(released, tmp_path):
    report = prove(refact.write(tmp_path / "source", layers=1, released=released), tmp_path / "out")
    assert "halves of the one head of K" in report.negative_controls[1].name


@pytest.mark.parametrize("released", [True, False])
def test_to_and_back_is_bit_identical(released, tmp_path):
    checkpoint = Checkpoint.open(refact.write(tmp_path, 12, released=released))
    assert any(name.endswith(FUSED) for name in checkpoint.tensors) is released
    for group in checkpoint.groups:
        tensor = checkpoint.get(group.source)
        assert torch.equal(group.rule.inverse(group.rule.forward(tensor)), tensor)


def edited(folder, change):
    """The checkpoint with other tensors."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_tensors_that_do_not_fit_are_named(tmp_path):
    def both_layouts(state):
        state["transformer.h.0.attn.k.weight"] = torch.zeros(8, 48)

    def more_key_heads(state):
        state["transformer.h.0.attn.kv.weight"] = torch.zeros(32, 48)

    for number, (change, message) in enumerate(
        [
            (both_layouts, r"fill what another tensor.*attn\.k\.weight \(as model.layers.0.self_attn.k_proj.weight\)"),
            (more_key_heads, r"attn\.kv\.weight has shape \[32, 48\], config.json gives \[16, 48\]"),
            (lambda state: state.pop("transformer.h.1.attn.kv.weight"), r"lacks.*layers.1.self_attn.k_proj.weight"),
            (lambda state: state.pop("lm_head.weight"), r"lacks.*lm_head.weight"),
            (lambda state: state.update({"ln_f.bias": torch.zeros(48)}), r"not understood.*ln_f.bias"),
        ]
    ):
        source = edited(refact.write(tmp_path / str(number)), change)
        with pytest.raises(TensorError, match=message):
            Checkpoint.open(source)


def test_causal_masks_in_a_file_are_dropped(tmp_path):
    def add(state):
        state["transformer.bias"] = torch.ones(24, 24, dtype=torch.bool)

    checkpoint = Checkpoint.open(edited(refact.write(tmp_path), add))
    assert [group.source for group in checkpoint.groups if group.fate == "dropped"] == ["transformer.bias"]


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.05])
def test_a_wrong_bias_does_not_pass(factor, tmp_path):
    source = refact.write(tmp_path, 12)
    assert wrong_by(source, refact.logits(source, tokens()), scale_slopes(factor)) > 1e-4


@pytest.mark.parametrize("swapped", [("mlp.gate_proj", "mlp.up_proj"), ("self_attn.k_proj", "self_attn.v_proj")])
def test_a_wrong_order_does_not_pass(swapped, tmp_path):
    source = refact.write(tmp_path)
    assert wrong_by(source, refact.logits(source, tokens()), swap(*swapped)) > 1e-3
