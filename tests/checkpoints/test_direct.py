"""`from_pretrained` on upstream folders: all heads, shards, dtypes, device_map, saving."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import alibi_hf.checkpoints.direct as direct
from alibi_hf.errors import (
    AlibiError,
    CheckpointFileError,
    ConfigFieldError,
    TensorError,
    UnknownFamilyError,
    UnsafeSourceError,
)
from alibi_hf.model import modeling_alibi
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.model.modeling_alibi import AlibiForCausalLM, AlibiModel, AlibiPreTrainedModel
from tests.all_families import FAMILIES
from tests.builders import bloom, distance, falcon, foundry, ids, mpt, tokenizer


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(AlibiPreTrainedModel, "foreign_loader", None)
    monkeypatch.setattr(AlibiConfig, "foreign_reader", None)
    direct.install()


def logits(model, tokens=None):
    with torch.no_grad():
        return model.eval()(ids() if tokens is None else tokens).logits


@pytest.mark.parametrize("build", FAMILIES.values())
@pytest.mark.parametrize("shards", [1, 11])
@pytest.mark.parametrize("prefix", [True, False])
def test_shards_and_prefixes_make_no_difference(build, shards, prefix, tmp_path):
    one = AlibiForCausalLM.from_pretrained(build(tmp_path / "one"))
    other = AlibiForCausalLM.from_pretrained(build(tmp_path / "other", shards=shards, prefix=prefix))
    assert type(other) is AlibiForCausalLM and torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("build", FAMILIES.values())
def test_the_config_alone_is_read_as_with_the_model(build, tmp_path):
    folder = build(tmp_path)
    whole, alone = AlibiForCausalLM.from_pretrained(folder).config.to_dict(), AlibiConfig.from_pretrained(folder)
    differ = {name for name, value in alone.to_dict().items() if whole[name] != value}
    stored = {"alibi_slopes"} if alone.alibi_slopes is None else set()  # slopes that are a tensor of the file
    assert differ <= {"_name_or_path", "architectures", "dtype"} | stored


@pytest.mark.parametrize("build", [bloom, falcon, foundry])
def test_saving_writes_our_own_layout(build, tmp_path):
    model = AlibiForCausalLM.from_pretrained(build(tmp_path / "source"))
    model.save_pretrained(tmp_path / "saved")
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert "model.layers.0.self_attn.q_proj.weight" in names and not any("query_key" in name for name in names)
    again, info = AlibiForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(logits(again), logits(model))


def test_dtype_device_map_and_loading_info(tmp_path):
    folder = bloom(tmp_path, shards=3, dtype=torch.bfloat16)
    assert AlibiForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    model, info = AlibiForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="auto", output_loading_info=True
    )
    assert model.dtype == torch.float32 and not info["missing_keys"] and not info["unexpected_keys"]
    plain = AlibiForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(model), logits(plain))


def test_disk_offload(tmp_path):
    folder = bloom(tmp_path / "source", shards=2)
    places = {"model.embed_tokens": "cpu", "model.embed_norm": "cpu", "model.layers.0": "disk"}
    places |= {"model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    model = AlibiForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), logits(AlibiForCausalLM.from_pretrained(folder)))


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"tp_plan": "auto"}, {"distributed_config": {"fsdp_size": 2}}])
def test_what_is_rearranged_is_not_read_in_slices(sizes, tmp_path):
    with pytest.raises(AlibiError, match="query_key_value.*Convert it first"):
        AlibiForCausalLM.from_pretrained(bloom(tmp_path), **sizes)


@pytest.mark.parametrize("build", FAMILIES.values())
def test_the_decoder_alone(build, tmp_path):
    folder = build(tmp_path)
    whole, alone = AlibiForCausalLM.from_pretrained(folder), AlibiModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(alone.eval()(ids()).last_hidden_state, whole.eval().model(ids()).last_hidden_state)


@pytest.mark.parametrize("name", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_new_head_is_the_only_thing_missing(name, tmp_path):
    cls = getattr(modeling_alibi, f"AlibiFor{name}")
    model, info = cls.from_pretrained(mpt(tmp_path), num_labels=5, output_loading_info=True)
    assert type(model) is cls and model.config.num_labels == 5 and model.config.architectures == [cls.__name__]
    assert info["missing_keys"] and all(key.startswith(("score.", "qa_outputs.")) for key in info["missing_keys"])


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("SequenceClassification", ("logits",)),
        ("TokenClassification", ("logits",)),
        ("QuestionAnswering", ("start_logits", "end_logits")),
    ],
)
@pytest.mark.parametrize("family", ["Bloom", "Mpt", "Falcon"])
def test_heads_that_upstream_trained(family, name, inputs, tmp_path):
    import transformers

    build, extra = FAMILIES[family.lower()], {"alibi_rounding": "falcon"} if family == "Falcon" else {}
    upstream = getattr(transformers, f"{family}For{name}").from_pretrained(build(tmp_path / "plain")).eval()
    torch.nn.init.normal_(upstream.get_parameter(_head(name)))
    upstream.config.pad_token_id = 0
    upstream.save_pretrained(tmp_path / "source")
    cls = getattr(modeling_alibi, f"AlibiFor{name}")
    ours, info = cls.from_pretrained(tmp_path / "source", output_loading_info=True, **extra)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = ids().clamp(min=1)
    with torch.no_grad():
        expected, got = upstream(tokens), ours.eval()(tokens)
    for part in inputs:
        assert distance(got[part], expected[part]) < 3e-6


def _head(name):
    return {"SequenceClassification": "score.weight", "TokenClassification": "classifier.weight"}.get(
        name, "qa_outputs.weight"
    )


def test_generation_goes_past_the_training_length(tmp_path):
    folder = mpt(tmp_path, length=16)
    model = AlibiForCausalLM.from_pretrained(folder)
    assert model.generation_config.use_cache is True
    out = model.generate(ids(length=12), max_new_tokens=20, do_sample=False, eos_token_id=-1)
    assert out.shape == (2, 32)


def test_config_fields_are_set_and_others_refused(tmp_path):
    folder = bloom(tmp_path)
    assert AlibiForCausalLM.from_pretrained(folder, alibi_rounding="bloom").config.alibi_rounding == "bloom"
    with pytest.raises(ConfigFieldError):
        AlibiForCausalLM.from_pretrained(folder, alibi_rounding="jais")
    with pytest.raises(ConfigFieldError, match=r"exact and bloom"):
        AlibiForCausalLM.from_pretrained(folder, alibi_rounding="falcon")
    with pytest.raises(AlibiError, match=r"pass an AlibiConfig"):
        from transformers import BloomConfig

        AlibiForCausalLM.from_pretrained(folder, config=BloomConfig())


def test_our_own_layout_and_what_is_not_there_are_left_to_transformers(tmp_path):
    AlibiForCausalLM(
        AlibiConfig(vocab_size=97, hidden_size=48, num_hidden_layers=1, num_attention_heads=6)
    ).save_pretrained(tmp_path)
    assert direct.load_foreign(AlibiForCausalLM, tmp_path) is None
    assert direct.load_foreign(AlibiForCausalLM, tmp_path / "nowhere") is None
    with pytest.raises(OSError):
        AlibiForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_leftovers_missing_and_foreign_are_errors(tmp_path):
    folder = bloom(tmp_path / "bloom")
    held = load_file(folder / "model.safetensors")
    save_file({**held, "transformer.h.0.adapter.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(TensorError, match=r"adapter"):
        AlibiForCausalLM.from_pretrained(folder)
    held.pop("transformer.h.1.mlp.dense_4h_to_h.bias")
    save_file(held, folder / "model.safetensors")
    with pytest.raises(TensorError, match=r"missing.*h\.1\.mlp\.dense_4h_to_h\.bias"):
        AlibiForCausalLM.from_pretrained(folder)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnknownFamilyError, match=r"llama"):
        AlibiForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("build", FAMILIES.values())
def test_a_config_without_a_model_type_goes_by_its_class_or_is_refused(build, tmp_path):
    """Transformers would take it for our layout, and make a model of the default size."""
    folder = build(tmp_path / "source")
    expected, path = logits(AlibiForCausalLM.from_pretrained(folder)), folder / "config.json"
    raw = json.loads(path.read_text())
    del raw["model_type"]
    path.write_text(json.dumps(raw))
    assert torch.equal(logits(AlibiForCausalLM.from_pretrained(folder)), expected)
    del raw["architectures"]
    path.write_text(json.dumps(raw))
    with pytest.raises(UnknownFamilyError, match=r"model_type=None"):
        AlibiForCausalLM.from_pretrained(folder)


def test_pickles_only_on_request(tmp_path):
    folder = bloom(tmp_path / "source")
    expected = logits(AlibiForCausalLM.from_pretrained(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsafeSourceError):
        AlibiForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(AlibiForCausalLM.from_pretrained(folder, use_safetensors=False)), expected)


def test_two_loads_do_not_disturb_each_other(tmp_path):
    first, second = bloom(tmp_path / "a", heads=6), bloom(tmp_path / "b", heads=12)
    a, b = AlibiForCausalLM.from_pretrained(first), AlibiForCausalLM.from_pretrained(second)
    assert torch.equal(logits(AlibiForCausalLM.from_pretrained(first)), logits(a))
    assert torch.equal(logits(AlibiForCausalLM.from_pretrained(second)), logits(b))


def test_pipeline_on_an_upstream_folder(tmp_path):
    from transformers import AutoTokenizer, pipeline

    folder = tokenizer(bloom(tmp_path))
    model = AlibiForCausalLM.from_pretrained(folder)
    generate = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert generate("Hello", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("Hello")


def test_a_tied_head_that_differs_is_refused(tmp_path):
    shutil.copytree("examples/checkpoints/sotu-mpt", tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = 2 * tensors["transformer.wte.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(TensorError, match="lm_head.weight differs from transformer.wte.weight"):
        AlibiForCausalLM.from_pretrained(tmp_path / "source")


def test_a_folder_without_config_is_no_model_of_the_default_size(tmp_path):
    (bloom(tmp_path) / "config.json").unlink()
    with pytest.raises(CheckpointFileError, match=r"holds no config.json"):
        AlibiForCausalLM.from_pretrained(tmp_path)
