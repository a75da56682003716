"""Every field of an upstream config.json is read or named."""

import pytest

from alibi_hf.errors import ConfigFieldError, UnknownFamilyError
from alibi_hf.families import all_families, find_family

MINIMAL = {
    "bloom": {"model_type": "bloom", "vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 6},
    "mpt": {
        "model_type": "mpt",
        "vocab_size": 97,
        "d_model": 48,
        "n_layers": 2,
        "n_heads": 6,
        "attn_config": {"alibi": True},
    },
    "falcon": {
        "model_type": "falcon",
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
    },
    "mosaic_gpt": {
        "model_type": "mosaic_gpt",
        "vocab_size": 97,
        "d_model": 48,
        "n_layers": 2,
        "n_heads": 6,
        "alibi": True,
    },
    "replit_lm": {
        "model_type": "replit_lm",
        "vocab_size": 97,
        "d_model": 48,
        "n_layers": 2,
        "n_heads": 6,
        "alibi": True,
    },
    "baichuan": {
        "model_type": "baichuan",
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
    },
    "refact": {"model_type": "gpt_refact", "vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 6},
    "step1": {
        "model_type": "step1",
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_attention_groups": 2,
    },
    "btlm": {
        "model_type": "btlm",
        "vocab_size": 97,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 6,
        "position_embedding_type": "alibi",
    },
    "jais": {
        "model_type": "jais",
        "vocab_size": 97,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 6,
        "position_embedding_type": "alibi",
    },
}


def mapped(family: str, **fields):
    raw = {**MINIMAL[family], **fields}
    return find_family(raw).config(raw)


def test_discovery_finds_every_family_by_model_type_and_class():
    assert {family.NAMES[0] for family in all_families()} >= set(MINIMAL)
    for family in all_families():
        for name in family.NAMES:
            assert find_family({"model_type": name}) is family
            assert find_family({"architectures": [name]}) is family


def test_unknown_family_names_what_was_found_and_what_is_known():
    with pytest.raises(UnknownFamilyError, match=r"model_type='gpt_neox'.*bloom, .*falcon, .*mpt"):
        find_family({"model_type": "gpt_neox"}, ["gpt_neox.embed_in.weight"])


def test_a_model_type_with_foreign_tensors_is_not_recognised():
    with pytest.raises(UnknownFamilyError):
        find_family({"model_type": "bloom"}, ["model.embed_tokens.weight"])


@pytest.mark.parametrize("family", MINIMAL)
def test_an_unknown_field_stops_with_its_name_and_value(family):
    with pytest.raises(ConfigFieldError, match=r"frobnicate=7"):
        mapped(family, frobnicate=7)


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon"])  # those that Transformers has a config for
def test_standard_fields_are_understood(family):
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    upstream = CONFIG_MAPPING[family]() if family in CONFIG_MAPPING else PreTrainedConfig()
    written = {k: v for k, v in upstream.to_dict().items() if k not in MINIMAL[family]}
    written.pop("new_decoder_architecture", None), written.pop("attn_config", None)
    written.update({name: MINIMAL[family].get(name, written[name]) for name in written})
    for name in ("n_embed", "num_kv_heads", "ffn_hidden_size"):
        written.pop(name, None)  # sizes of another model
    assert mapped(family, **written).hidden_size == 48


@pytest.mark.parametrize("family", MINIMAL)
def test_what_older_transformers_and_trainers_wrote_is_understood(family):
    width = mapped(family).hidden_size
    older = {"gradient_checkpointing": False, "_flash_attn_2_enabled": True, "hidden_size": width}
    assert mapped(family, **older).hidden_size == width


@pytest.mark.parametrize("family", MINIMAL)
def test_quantised_and_encoder_decoder_checkpoints_are_refused(family):
    with pytest.raises(ConfigFieldError, match=r"quantization_config="):
        mapped(family, quantization_config={"bits": 4})
    with pytest.raises(ConfigFieldError, match=r"is_encoder_decoder=True"):
        mapped(family, is_encoder_decoder=True)


@pytest.mark.parametrize("family", MINIMAL)
def test_a_wrong_type_is_refused(family):
    with pytest.raises(ConfigFieldError, match=r"vocab_size='many' should be of type int"):
        mapped(family, vocab_size="many")
    with pytest.raises(ConfigFieldError, match=r"vocab_size=True"):
        mapped(family, vocab_size=True)


def test_aliases_that_disagree_are_refused():
    with pytest.raises(ConfigFieldError, match=r"hidden_size.*n_embed.*disagree"):
        mapped("bloom", n_embed=64)
    assert mapped("bloom", n_embed=48).hidden_size == 48


@pytest.mark.parametrize("family", MINIMAL)
def test_a_width_that_does_not_divide_is_refused(family):
    name = next(name for name in ("n_head", "n_heads", "num_attention_heads") if name in MINIMAL[family])
    with pytest.raises(ConfigFieldError, match=r"width of 48 .* 7 heads"):
        mapped(family, **{name: 7})


@pytest.mark.parametrize("family", MINIMAL)
def test_labels_and_tokens_are_carried_over(family):
    config = mapped(family, id2label={"0": "a", "1": "b", "2": "c"}, eos_token_id=[3, 4], pad_token_id=5)
    assert config.num_labels == 3 and config.eos_token_id == [3, 4] and config.pad_token_id == 5
