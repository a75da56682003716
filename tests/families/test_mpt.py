"""MPT's config, in both dialects, and the plain module that stands in for llm-foundry."""

import pytest
import torch

from alibi_hf.errors import ConfigFieldError
from alibi_hf.families import find_family
from alibi_hf.families._mpt_plain import plain_slopes
from alibi_hf.families._truth import true_slopes
from tests.builders import distance, ids, mpt
from tests.families.test_fields import MINIMAL, mapped

FOUNDRY = {"architectures": ["MPTForCausalLM"]}
QK_LN = {"attn_config": {"alibi": True, "qk_ln": True}}


def attention(**fields):
    return mapped("mpt", attn_config={"alibi": True, **fields})


def test_defaults_depend_on_the_dialect():
    native = mapped("mpt", attn_config={})
    assert not native.attention_bias and not native.mlp_bias and not native.norm_bias
    foundry = mapped("mpt", **FOUNDRY)
    assert foundry.attention_bias and foundry.attention_out_bias and foundry.mlp_bias and foundry.norm_bias
    with pytest.raises(ConfigFieldError, match=r"alibi=None .*without ALiBi.*trust_remote_code"):
        mapped("mpt", attn_config={}, **FOUNDRY)


def test_without_alibi_it_names_the_class_to_use():
    with pytest.raises(ConfigFieldError, match=r"alibi=False .*AutoModelForCausalLM.*trust_remote_code=True"):
        attention(alibi=False)


def test_learned_positions_and_rope_are_named():
    with pytest.raises(ConfigFieldError, match=r"alibi=None .*without ALiBi \(rope=False, learned_pos_emb=True\)"):
        mapped("mpt", attn_config={}, learned_pos_emb=True, **FOUNDRY)  # SEA-LION
    with pytest.raises(ConfigFieldError, match=r"rope=True cannot be expressed.*trust_remote_code"):
        mapped("mpt", attn_config={"alibi": False, "rope": True}, **FOUNDRY)
    assert mapped("mpt", learned_pos_emb=True).alibi  # upstream turns it off


def test_every_attention_field_maps():
    config = attention(clip_qkv=6, softmax_scale=0.1, alibi_bias_max=16, qk_ln=True, attn_pdrop=0.1)
    assert (config.clip_qkv, config.attention_scale, config.alibi_bias_max) == (6, 0.1, 16)
    assert (config.qk_norm, config.attention_dropout) == ("full", 0.1)
    assert attention(qk_gn=True).qk_norm == "head"
    assert attention(clip_qkv=0).clip_qkv is None
    assert attention(attn_type="multiquery_attention").num_key_value_heads == 1
    assert attention(attn_type="grouped_query_attention", kv_n_heads=2).num_key_value_heads == 2
    assert attention(attn_logit_softcapping=30.0).attn_logit_softcapping == 30.0


def test_every_other_field_maps():
    config = mapped("mpt", expansion_ratio=3.5, logit_scale="inv_sqrt_d_model", emb_pdrop=0.1, resid_pdrop=0.2)
    assert config.intermediate_size == 168 and config.logit_scale == pytest.approx(48**-0.5)
    assert (config.embedding_dropout, config.hidden_dropout) == (0.1, 0.2)
    assert mapped("mpt", norm_type="low_precision_rmsnorm").norm_type == "rms_norm"
    assert mapped("mpt", logit_scale=0.5).logit_scale == 0.5
    assert mapped("mpt", max_seq_len=65536).max_position_embeddings == 65536
    gated = mapped("mpt", ffn_config={"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 40})
    assert (gated.mlp_type, gated.hidden_act, gated.intermediate_size) == ("gated", "silu", 40)
    keys = mapped("mpt", no_bias=True, attention_bias=True)
    assert keys.attention_bias and not keys.attention_out_bias and not keys.mlp_bias and not keys.norm_bias
    wide = mapped("mpt", head_dim=12)
    assert wide.head_dim == 12 and wide.attention_scale == pytest.approx(8**-0.5)  # llm-foundry's default
    biased = mapped("mpt", no_bias=False, attention_bias=False)
    assert biased.mlp_bias and not biased.attention_bias and biased.attention_out_bias


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope": True}, r"rope=True"),
        ({"prefix_lm": True}, r"prefix_lm=True"),
        ({"sliding_window_size": 512}, r"sliding_window_size=512"),
        ({"nope": True}, r"nope=True"),
        ({"kv_dim": 24}, r"kv_dim=24"),
        ({"reuse_kv_layer_idx": -1}, r"reuse_kv_layer_idx=-1 .*trust_remote_code"),
        ({"reuse_kv_x_layer_idx": -1}, r"reuse_kv_x_layer_idx=-1"),
        (
            {"attn_temperature_tuning": {"floor_scale": 8192, "attn_scale": 0.1}},
            r"attn_temperature_tuning=.*0\.1.*only",
        ),
        ({"attn_type": "linear"}, r"attn_type='linear'"),
        ({"attn_type": "grouped_query_attention"}, r"needs kv_n_heads"),
        ({"attn_type": "grouped_query_attention", "kv_n_heads": 4}, r"6 cannot be shared out among 4"),
        ({"kv_n_heads": 2}, r"kv_n_heads=2 contradicts attn_type='multihead_attention'"),
        ({"qk_ln": True, "qk_gn": True}, r"exclude each other"),
        ({"clip_qkv": "six"}, r"clip_qkv='six'"),
        ({"alibi_bias_max": None}, r"alibi_bias_max=None"),
        ({"frobnicate": 1}, r"attn_config: the field frobnicate=1"),
    ],
)
def test_attention_fields_that_cannot_be_expressed_stop(fields, message):
    with pytest.raises(ConfigFieldError, match=message):
        attention(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_type": "triton_batchnorm"}, r"norm_type='triton_batchnorm'"),
        ({"logit_scale": "sqrt"}, r"logit_scale='sqrt'"),
        ({"expansion_ratio": 2.7}, r"expansion_ratio=2.7"),
        ({"ffn_config": {"ffn_type": "mb_moe"}}, r"ffn_type='mb_moe'"),
        ({"ffn_config": {"ffn_act_fn": {"name": "mish"}}}, r"mish"),
        ({"block_overrides": {"order": []}}, r"block_overrides="),
        ({"n_heads": 7, "head_dim": 8}, r"width of 48 .* 7 heads"),
        ({"norm_type": "rmsnorm", **QK_LN}, r"qk_ln=True is a layer_norm with eps=1e-05 .*norm_type='rmsnorm'"),
        ({"norm_eps": 1e-6, **QK_LN}, r"eps=1e-05 .*norm_eps=1e-06"),
    ],
)
def test_other_fields_that_cannot_be_expressed_stop(fields, message):
    with pytest.raises(ConfigFieldError, match=message):
        mapped("mpt", **fields)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"attn_config": {"alibi": True, "alibi_bias_max": 16}}, "alibi_bias_max"),
        ({"attn_config": {"alibi": True, "qk_ln": True}}, "qk_norm"),
        ({"attn_config": {"alibi": True, "attn_type": "multiquery_attention"}}, "num_key_value_heads"),
        ({"no_bias": False}, "mlp_bias"),
        ({"expansion_ratio": 2}, "intermediate_size"),
        ({"logit_scale": 0.5}, "logit_scale"),
    ],
)
def test_the_reference_is_the_plain_module_where_the_native_class_ignores_a_field(fields, name):
    config = mapped("mpt", **fields)
    reference = find_family(MINIMAL["mpt"]).reference(config)
    assert not reference.expressible and name in reference.reason


def test_the_plain_module_is_the_native_one_where_both_can(tmp_path):
    from alibi_hf.checkpoints.reference import load_reference
    from alibi_hf.checkpoints.source import Checkpoint
    from alibi_hf.families._mpt_reference import _build_plain

    checkpoint = Checkpoint.open(mpt(tmp_path, heads=6, attn_config={"clip_qkv": 1.5, "softmax_scale": 0.2}))
    reference, native = load_reference(checkpoint, torch.float64)
    assert reference.expressible
    plain = _build_plain(checkpoint.raw, torch.float64)
    weights = {name: value for name, value in native.state_dict().items() if name != "lm_head.weight"}
    plain.load_state_dict(weights, assign=True)
    with torch.no_grad(), reference.truth():
        assert distance(plain(ids()).logits, native(ids()).logits) < 1e-13


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 40, 112])
@pytest.mark.parametrize("bias_max", [8, 16])
def test_both_ways_of_writing_the_slopes_agree(heads, bias_max):
    torch.testing.assert_close(
        plain_slopes(heads, bias_max, torch.float64), true_slopes(heads, bias_max), rtol=1e-15, atol=0
    )
