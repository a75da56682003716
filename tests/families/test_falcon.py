"""Falcon-RW's config; RoPE and parallel Falcons are refused by name."""

import math

import pytest

from alibi_hf.errors import ConfigFieldError
from alibi_hf.families import find_family
from tests.families.test_fields import MINIMAL, mapped


def test_the_factor_of_the_bias_is_folded_into_the_slopes():
    config = mapped("falcon")
    assert config.alibi_slopes[0] == pytest.approx(2**-2 / math.sqrt(8), rel=1e-15)
    assert config.hidden_act == "gelu" and config.num_key_value_heads == 6 and not config.attention_bias


def test_old_key_names_and_model_type_are_read():
    raw = {
        "model_type": "RefinedWebModel",
        "architectures": ["RWForCausalLM"],
        "vocab_size": 97,
        "hidden_size": 48,
        "n_layer": 3,
        "n_head": 6,
        "alibi": True,
        "bias": True,
        "multi_query": False,
        "parallel_attn": False,
        "apply_residual_connection_post_layernorm": False,
    }
    config = find_family(raw).config(raw)
    assert (config.num_hidden_layers, config.num_attention_heads) == (3, 6)
    assert config.attention_bias and config.attention_out_bias and config.mlp_bias


def test_one_key_value_head_is_expressed():
    assert mapped("falcon", multi_query=True).num_key_value_heads == 1
    assert mapped("falcon", multi_query=True, num_kv_heads=6).num_key_value_heads == 1  # as upstream fills it in


@pytest.mark.parametrize("alibi", [False, None])
def test_a_rope_falcon_names_the_class_to_use(alibi):
    with pytest.raises(ConfigFieldError, match=rf"alibi={alibi} .*RoPE.*FalconForCausalLM"):
        mapped("falcon", alibi=alibi)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel_attn": True}, r"parallel_attn=True .*FalconForCausalLM"),
        ({"new_decoder_architecture": True}, r"new_decoder_architecture=True"),
        ({"num_kv_heads": 2}, r"num_kv_heads=2 contradicts multi_query=False"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0.1 and hidden_dropout=0.0"),
        ({"activation": "frobnicate"}, r"hidden_act"),
    ],
)
def test_what_cannot_be_expressed_stops(fields, message):
    with pytest.raises(ConfigFieldError, match=message):
        mapped("falcon", **fields)


def test_upstreams_default_is_parallel_and_therefore_refused():
    raw = {name: value for name, value in MINIMAL["falcon"].items() if name != "parallel_attn"}
    assert find_family(raw).FIELDS
    with pytest.raises(ConfigFieldError, match=r"parallel_attn=True"):
        find_family(raw).config(raw)
