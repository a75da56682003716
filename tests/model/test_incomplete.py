"""A folder in our own layout that lacks a tensor: refused where the tensor would be random, allowed for a new head."""

import pytest
from safetensors.torch import load_file, save_file

from alibi_hf import AlibiConfig, AlibiForCausalLM, AlibiForSequenceClassification, AlibiModel

CONFIG = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_without(model, folder, name):
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.norm.bias", "model.layers.0.self_attn.k_proj.weight"])
@pytest.mark.parametrize("cls", [AlibiForCausalLM, AlibiForSequenceClassification])
def test_a_missing_tensor_raises(tmp_path, name, cls):
    save_without(AlibiForCausalLM(AlibiConfig(**CONFIG)), tmp_path, name)
    with pytest.raises(ValueError, match=name):
        cls.from_pretrained(tmp_path)


def test_a_missing_tensor_raises_in_the_base_model(tmp_path):
    save_without(AlibiModel(AlibiConfig(**CONFIG)), tmp_path, "norm.weight")
    with pytest.raises(ValueError, match=r"norm\.weight"):
        AlibiModel.from_pretrained(tmp_path)


def test_a_language_models_own_head_must_be_there(tmp_path):
    save_without(AlibiForCausalLM(AlibiConfig(**CONFIG, tie_word_embeddings=False)), tmp_path, "lm_head.weight")
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        AlibiForCausalLM.from_pretrained(tmp_path)


def test_a_new_head_may_be_missing(tmp_path):
    AlibiForCausalLM(AlibiConfig(**CONFIG)).save_pretrained(tmp_path)
    model, info = AlibiForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert model.config.num_labels == 2
