"""BLOOM's config and layout."""

import pytest

from alibi_hf.errors import ConfigFieldError
from tests.families.test_fields import mapped


def test_a_published_config_maps():
    raw = {
        "apply_residual_connection_post_layernorm": True,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "masked_softmax_fusion": True,
        "n_inner": None,
        "offset_alibi": 100,
        "pretraining_tp": 4,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "unk_token_id": 0,
        "use_cache": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.2,
        "layer_norm_epsilon": 1e-6,
    }
    config = mapped("bloom", **raw)
    assert config.residual_from_norm and config.embedding_norm and config.attention_bias and config.mlp_bias
    assert config.hidden_act == "gelu_pytorch_tanh" and config.intermediate_size == 192 and config.norm_eps == 1e-6
    assert (config.hidden_dropout, config.attention_dropout) == (0.1, 0.2)
    assert config.alibi_slopes is None and config.alibi_rounding == "exact"
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_an_mlp_of_another_width_is_refused():
    assert mapped("bloom", n_inner=192).intermediate_size == 192
    with pytest.raises(ConfigFieldError, match=r"n_inner=100 .* 192"):
        mapped("bloom", n_inner=100)


def test_slow_but_exact_is_refused_where_it_drops_biases():
    assert mapped("bloom", slow_but_exact=True, pretraining_tp=1)
    with pytest.raises(ConfigFieldError, match=r"slow_but_exact=True with pretraining_tp=2"):
        mapped("bloom", slow_but_exact=True, pretraining_tp=2)
