"""`AlibiConfig`: what it fills in, what it refuses and how it says so, and that saving loses nothing."""

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from alibi_hf import AlibiConfig, AlibiForCausalLM
from alibi_hf.model.configuration_alibi import AUTO_MAP
from tests.model.cases import CASES, config_of

REFUSED = {
    "two tables": ({"learned_positions": True, "sinusoidal_positions": True}, "choose one"),
    "rope type": ({"rope_parameters": {"rope_type": "spiral"}}, "'spiral'.*must be one of .*'default', 'linear'"),
    "rope lacks": ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters=.*factor"),
    "rope factor": ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "rope_parameters=.*finite and positive"),
    "rope theta": ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0 must be positive"),
    "rope theta text": ({"rope_parameters": {"rope_theta": "large"}}, "rope_theta='large' must be positive"),
    "rope factors": (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0, 3.0]}},
        "rope_parameters=.*short_factor has 1 entries, and a head turns 64 pairs",
    ),
    "rope unread": ({"rope_parameters": {"factor": 4.0}}, "rope_type='default' does not read factor"),
    "rope far": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": -1.0}},
        "rope_parameters=.*not finite and positive",
    ),
    "rope far factors": (
        {"head_dim": 2, "rope_parameters": {"rope_type": "longrope", "short_factor": [1], "long_factor": [0]}},
        "rope_parameters=.*not finite and positive",
    ),
    "rope attention factor": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0}},
        "rope_parameters=.*attention_factor=0 must be positive",
    ),
    "rope odd": (
        {"head_dim": 3, "rope_parameters": {"rope_theta": 1e4}},
        "rotate 4 features of a head, and head_dim=3",
    ),
    "rope type of fields": ({"rope_parameters": "default"}, "rope_parameters"),
    "rope elsewhere": ({"rope_theta": 1e4}, "rope_theta=10000.0 belongs in rope_parameters, which is None"),
    "rope of old": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling=.* belongs in rope_parameters"),
    "window": ({"attention_window": "steep"}, "attention_window"),
    "window eps zero": ({"attention_window_eps": 0}, "attention_window_eps=0 must be above 0 and below 1"),
    "window eps one": ({"attention_window_eps": 1}, "attention_window_eps=1 must be above 0 and below 1"),
    "window eps sign": ({"attention_window_eps": -1}, "attention_window_eps=-1 must be above 0 and below 1"),
    "window eps nan": ({"attention_window_eps": float("nan")}, "attention_window_eps=nan must be above 0 and below 1"),
    "groups": ({"num_attention_heads": 6, "num_key_value_heads": 4}, "=6 is not a multiple of num_key_value_heads=4"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0 must be a positive"),
    "no layers": ({"num_hidden_layers": -1}, "num_hidden_layers=-1 must be a positive"),
    "bias max": ({"alibi_bias_max": 0}, "alibi_bias_max=0 must be positive"),
    "slopes count": ({"num_attention_heads": 4, "alibi_slopes": [0.5]}, "alibi_slopes has 1 entries.* is 4"),
    "slopes sign": ({"num_attention_heads": 2, "alibi_slopes": [0.5, -1.0]}, "must be finite and not negative"),
    "slopes nan": ({"num_attention_heads": 2, "alibi_slopes": [0.5, float("nan")]}, "must be finite and not negative"),
    "parts": ({"text_config": {"vocab_size": 9}}, "text_config=.*is not supported"),
    "slopes unread": ({"alibi": False, "num_attention_heads": 1, "alibi_slopes": [0.5]}, "alibi_slopes=.*alibi=False"),
    "scaling unread": ({"alibi": False, "alibi_scaling": {"type": "linear", "factor": 2}}, "alibi_scaling=.*=False"),
    "distance unread": ({"alibi": False, "alibi_distance": "sqrt"}, "alibi_distance='sqrt' with alibi=False"),
    "rounding unread": ({"alibi": False, "alibi_rounding": "bloom"}, "alibi_rounding='bloom' with alibi=False"),
    "scaling type": ({"alibi_scaling": {"type": "ntk", "factor": 2}}, "alibi_scaling=.*must be"),
    "scaling factor": ({"alibi_scaling": {"type": "linear", "factor": 0.5}}, "alibi_scaling=.*must be"),
    "scaling both": ({"alibi_scaling": {"type": "linear", "factor": 2, "train_seq_len": 9}}, "alibi_scaling=.*must be"),
    "rounding sqrt": ({"alibi_rounding": "bloom", "alibi_distance": "sqrt"}, "cannot be combined"),
    "rounding": ({"alibi_rounding": "llama"}, "llama"),
    "norm": ({"norm_type": "batch_norm"}, "batch_norm"),
    "qk norm": ({"qk_norm": "both"}, "both"),
    "activation": ({"hidden_act": "gelu9"}, "gelu9"),
    "eps": ({"norm_eps": 0.0}, "norm_eps=0.0 must be positive"),
    "type": ({"hidden_size": "wide"}, "hidden_size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    fields, message = REFUSED[name]
    with pytest.raises((StrictDataclassError, ValueError, TypeError), match=message):
        AlibiConfig(**fields)


def test_defaults_are_filled_in() -> None:
    config = AlibiConfig(hidden_size=48, num_attention_heads=6)
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (8, 6, 192)
    assert config.model_type == "alibi"
    assert config.rope_parameters is None
    assert config.auto_map == AUTO_MAP
    assert set(config.auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
    }


def test_windows_are_on_and_survive_saving(tmp_path) -> None:
    assert AlibiConfig().attention_window is True
    assert AlibiConfig().attention_window_eps is None
    AlibiConfig(attention_window=False, attention_window_eps=1e-3).save_pretrained(tmp_path)
    loaded = AlibiConfig.from_pretrained(tmp_path)
    assert (loaded.attention_window, loaded.attention_window_eps) == (False, 1e-3)


@pytest.mark.parametrize("case", CASES)
def test_saving_and_loading_gives_the_same_config(case: str, tmp_path) -> None:
    config = config_of(case, id2label={0: "a", 1: "b", 2: "c"})
    config.save_pretrained(tmp_path)
    for loaded in (AlibiConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is AlibiConfig
        unnamed = {"_name_or_path": "", "transformers_version": ""}
        assert {**loaded.to_dict(), **unnamed} == {**config.to_dict(), **unnamed}


@pytest.mark.parametrize("name", ["flash_attention_2", "vllm", "flex", "my_own"])
def test_backends_without_the_bias_are_refused(name: str) -> None:
    model = AlibiForCausalLM(config_of("one_head"))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=name):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match=name):
        AlibiForCausalLM._from_config(config_of("one_head"), attn_implementation=name)


def test_sdpa_is_refused_with_a_soft_cap_on_scores() -> None:
    model = AlibiForCausalLM(config_of("capped"))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"sdpa has no soft cap.*2\.0.*'eager' or 'flex_attention'"):
        model.set_attn_implementation("sdpa")


def test_vllm_is_refused_with_the_way_round() -> None:
    with pytest.raises(ValueError, match="upstream layout"):
        AlibiForCausalLM(config_of("one_head")).set_attn_implementation("vllm")


def test_vllm_is_refused_where_it_is_set_behind_the_models_back() -> None:
    model = AlibiForCausalLM(config_of("one_head"))
    model.config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match="vllm"):
        model(model.dummy_inputs["input_ids"] % 61)


def test_a_field_that_transformers_needs_has_its_standard_name() -> None:
    config = config_of("twelve_grouped")
    assert config.num_attention_heads == 12
    assert config.max_position_embeddings == 32
    assert isinstance(config, transformers.PreTrainedConfig)
