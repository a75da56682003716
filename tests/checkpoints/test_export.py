"""Folders that go back to an upstream layout: what came from there bit for bit, the rest exactly or not at all."""

import hashlib
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from alibi_hf import AlibiConfig, AlibiForCausalLM, AlibiModel
from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.export import export
from alibi_hf.checkpoints.export_compare import computed, near
from alibi_hf.checkpoints.export_config import TARGETS
from alibi_hf.checkpoints.reference import load_reference
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import AlibiError, CheckpointFileError, ConfigFieldError, TensorError
from tests.all_families import FAMILIES
from tests.builders import bloom, distance, falcon, fill, foundry, ids, mpt, tokenizer
from tests.checkpoints.exporting import BLOOM, MPT, bend_bias, count_held, our_logits, ours

LIMIT = 1e-5  # of the largest logit: float32 on both sides
FALCON_SLOPES = [2.0 ** (-8 * i / 4) / 8**0.5 for i in (1, 2, 3, 4)] + [2.0 ** (-8 * i / 8) / 8**0.5 for i in (1, 3)]


def read(path):
    return json.loads(path.read_text())


def held(folder):
    """Every tensor of a folder, by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def round_trip(source, tmp_path, to, **options):
    convert(source, tmp_path / "ours", verify=False, max_shard_size="40KB")
    return export(tmp_path / "ours", tmp_path / "back", to, **options)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("build", "to", "options"),
    [
        (bloom, "bloom", {"heads": 12, "shards": 3}),
        (bloom, "bloom", {"heads": 1, "prefix": False, "dtype": torch.bfloat16, "raw": {"n_inner": None}}),
        (
            bloom,
            "bloom",
            {"tie": False, "raw": {"apply_residual_connection_post_layernorm": True}},
        ),
        (mpt, "mpt", {"heads": 6, "shards": 2}),
        (mpt, "mpt", {"heads": 40, "layers": 1, "dtype": torch.float16, "attn_config": {"clip_qkv": 6.0}}),
        (foundry, "llm-foundry", {"attn_config": {"kv_n_heads": 2, "attn_type": "grouped_query_attention"}}),
        (foundry, "llm-foundry", {"attn_config": {"qk_ln": True, "alibi_bias_max": 16}, "raw": {"no_bias": False}}),
        (falcon, "falcon", {"heads": 12, "shards": 2}),
        (falcon, "falcon", {"raw": {"multi_query": True, "bias": False}}),
    ],
)
def test_what_came_from_a_layout_goes_back_bit_for_bit(build, to, options, tmp_path):
    source = build(tmp_path / "source", **options)
    report = round_trip(source, tmp_path, to, max_shard_size="50KB")
    assert same(held(source), held(tmp_path / "back"))
    expected = read(source / "config.json")
    expected.pop("auto_map", None)  # code that did not travel
    assert read(tmp_path / "back" / "config.json") == expected
    assert {row["fate"] for row in report.tensors} == {"used"} and "upstream's own" in report.notes[0]


@pytest.mark.parametrize(("to", "class_name"), [("bloom", "Bloom"), ("mpt", "Mpt"), ("falcon", "Falcon")])
@pytest.mark.parametrize("trained", [False, True])
def test_transformers_loads_it_and_gives_the_same_logits(to, class_name, trained, tmp_path, monkeypatch):
    source = FAMILIES[to](tmp_path / "source", heads=6)
    convert(source, tmp_path / "ours", verify=False)
    if trained:  # other weights, saved by Transformers, with no record of where they came from
        model = fill(AlibiForCausalLM.from_pretrained(tmp_path / "ours"), seed=7)
        shutil.rmtree(tmp_path / "ours")
        model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", to)
    upstream = getattr(transformers, f"{class_name}ForCausalLM")
    model, info = upstream.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        theirs = model.eval()(ids()).logits
    rounding = {"alibi_rounding": "falcon"} if to == "falcon" else {}
    assert distance(our_logits(tmp_path / "ours", **rounding), theirs) < LIMIT
    for factor in (0.0, -1.0, 1.01):
        with monkeypatch.context() as patched:
            bend_bias(patched, factor)
            assert distance(our_logits(tmp_path / "ours", **rounding), theirs) > 3 * LIMIT


@pytest.mark.parametrize(
    ("to", "fields", "padded"),
    [
        ("bloom", BLOOM, 0),
        ("bloom", {**BLOOM, "attention_bias": False, "mlp_bias": False, "norm_bias": False}, 12),
        ("bloom", {**BLOOM, "tie_word_embeddings": False, "hidden_act": "gelu_new", "residual_from_norm": True}, 0),
        ("mpt", {**MPT, "clip_qkv": 1, "attention_scale": 0.3, "tie_word_embeddings": False}, 0),
        ("mpt", {**MPT, "norm_eps": 1e-3, "hidden_dropout": 0.1, "attention_dropout": 0.1}, 0),
        ("falcon", {"alibi_slopes": FALCON_SLOPES, "intermediate_size": 40, "hidden_act": "relu"}, 0),
        ("falcon", {"alibi_slopes": FALCON_SLOPES, "num_key_value_heads": 1, "mlp_bias": True, "norm_bias": False}, 9),
        ("llm-foundry", MPT, 0),
        ("llm-foundry", {"norm_type": "rms_norm", "mlp_type": "gated", "hidden_act": "silu", "alibi_bias_max": 4.5}, 0),
        ("llm-foundry", {**MPT, "num_key_value_heads": 2, "qk_norm": "full", "clip_qkv": 2, "logit_scale": 0.5}, 0),
        ("llm-foundry", {**MPT, "num_key_value_heads": 1, "qk_norm": "head", "intermediate_size": 72}, 0),
        ("llm-foundry", {**MPT, "qk_norm": "full", "norm_type": "rms_norm"}, 0),
        ("llm-foundry", {**MPT, "qk_norm": "head", "norm_eps": 1e-2}, 0),
        ("llm-foundry", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 50}, 2),
        ("llm-foundry", {**MPT, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0, "head_dim": 16}, 0),
        ("llm-foundry", {**MPT, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": False}, 0),
    ],
)
def test_a_new_model_is_held_exactly(to, fields, padded, tmp_path, monkeypatch):
    folder = ours(tmp_path / "ours", **fields)
    report = export(folder, tmp_path / "back", to)
    assert sum(row["fate"] == "padded" for row in report.tensors) == padded
    back = Checkpoint.open(tmp_path / "back")
    wanted, found = computed(AlibiConfig.from_pretrained(folder)), computed(back.config)
    different = {name for name in wanted if not near(wanted[name], found[name])}
    assert all(name.endswith("_bias") for name in different) and bool(different) == bool(padded)
    _, model = load_reference(back)
    with torch.no_grad():
        theirs = model.eval()(ids()).logits
    rounding = {"alibi_rounding": "falcon"} if to == "falcon" else {}
    assert distance(our_logits(folder, **rounding), theirs) < LIMIT
    bend_bias(monkeypatch, 1.01)
    assert distance(our_logits(folder, **rounding), theirs) > 3 * LIMIT


def test_a_trained_model_keeps_the_config_and_goes_there_and_back(tmp_path):
    folder = ours(tmp_path / "ours", **BLOOM, bos_token_id=5, eos_token_id=[6, 7], norm_eps=1e-4, hidden_dropout=0.1)
    export(folder, tmp_path / "back", "bloom", max_shard_size="60KB")
    raw = read(tmp_path / "back" / "config.json")
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (5, [6, 7], None)
    assert (raw["layer_norm_epsilon"], raw["hidden_dropout"], raw["seq_length"]) == (1e-4, 0.1, 64)
    convert(tmp_path / "back", tmp_path / "again", verify=False)
    assert same(held(tmp_path / "again"), held(folder))


def test_upstreams_config_is_kept_but_for_what_changed(tmp_path):
    source = bloom(tmp_path / "source", raw={"pretraining_tp": 4})
    convert(source, tmp_path / "ours", verify=False)
    config = read(tmp_path / "ours" / "config.json")
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**config, "pad_token_id": 9, "use_cache": False}))
    export(tmp_path / "ours", tmp_path / "back", "bloom", dtype="bfloat16")
    expected = {**read(source / "config.json"), "pad_token_id": 9, "torch_dtype": "bfloat16"}
    assert read(tmp_path / "back" / "config.json") == expected
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**config, "norm_eps": 1e-3}))
    export(tmp_path / "ours", tmp_path / "other", "bloom")
    raw = read(tmp_path / "other" / "config.json")
    assert raw["layer_norm_epsilon"] == 1e-3 and "pretraining_tp" not in raw


def test_one_dialect_of_mpt_becomes_the_other(tmp_path):
    round_trip(mpt(tmp_path / "source"), tmp_path, "llm-foundry")
    raw = read(tmp_path / "back" / "config.json")
    assert raw["architectures"] == ["MPTForCausalLM"] and raw["attn_config"]["alibi"] is True
    for name in ("alibi_bias_max", "clip_qkv", "qk_ln", "attn_type", "attn_impl"):  # read without a default elsewhere
        assert name in raw["attn_config"]
    assert raw["norm_type"] == "low_precision_layernorm" and raw["no_bias"] is True and raw["expansion_ratio"] == 4
    convert(tmp_path / "back", tmp_path / "ours2", verify=False)
    export(tmp_path / "ours2", tmp_path / "native", "mpt")
    assert same(held(tmp_path / "native"), held(tmp_path / "source"))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "native").architectures == ["MptForCausalLM"]


@pytest.mark.parametrize(
    ("to", "fields", "named"),
    [
        ("bloom", MPT, "embedding_norm=False"),
        ("bloom", {**BLOOM, "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("bloom", {**BLOOM, "alibi_bias_max": 16}, "alibi_bias_max=16"),
        ("bloom", {**BLOOM, "intermediate_size": 100}, "intermediate_size=100"),
        ("bloom", {**BLOOM, "num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("bloom", {**BLOOM, "attention_scale": 0.1}, "attention_scale=0.1"),
        ("bloom", {**BLOOM, "alibi": False}, "alibi=False"),
        ("bloom", {**BLOOM, "alibi_slopes": FALCON_SLOPES}, r"alibi_slopes=\[0.0883883"),
        ("bloom", {**BLOOM, "alibi_distance": "sqrt"}, "alibi_distance='sqrt'"),
        ("bloom", {**BLOOM, "alibi_scaling": {"type": "linear", "factor": 2.0}}, "alibi_scaling="),
        ("bloom", {**BLOOM, "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters="),
        ("mpt", {**MPT, "learned_positions": True}, "learned_positions=True"),
        ("falcon", {"alibi_slopes": FALCON_SLOPES, "sinusoidal_positions": True}, "sinusoidal_positions=True"),
        ("llm-foundry", {**MPT, "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters="),
        ("llm-foundry", {**MPT, "learned_positions": True}, "learned_positions=True"),
        ("mpt", {}, "norm_bias=True.*llm-foundry"),
        ("mpt", {**MPT, "alibi_bias_max": 16}, "alibi_bias_max=16.*llm-foundry"),
        ("mpt", {**MPT, "logit_scale": 0.5}, "logit_scale=0.5"),
        ("mpt", {**MPT, "qk_norm": "full"}, "qk_norm='full'"),
        ("mpt", {**MPT, "embedding_scale": 2.0}, "embedding_scale=2.0"),
        ("falcon", {}, "alibi_bias_max=8"),
        ("falcon", {"alibi_slopes": FALCON_SLOPES, "num_key_value_heads": 2}, "num_key_value_heads=2"),
        ("falcon", {"alibi_slopes": FALCON_SLOPES, "clip_qkv": 3.0}, "clip_qkv=3.0"),
        ("falcon", {"alibi": False}, "alibi=False"),
        ("bloom", {**BLOOM, "hidden_size": 50}, "hidden_size=50 with num_attention_heads=6"),
        ("llm-foundry", {**MPT, "alibi": False}, "alibi=False"),
        ("llm-foundry", {**MPT, "embedding_norm": True}, "embedding_norm=True"),
        ("llm-foundry", {**MPT, "hidden_act": "mish"}, "hidden_act='mish'"),
        ("llm-foundry", {**MPT, "residual_from_norm": True}, "residual_from_norm=True"),
    ],
)
def test_what_a_target_cannot_hold_is_named_and_nothing_is_written(to, fields, named, tmp_path):
    folder = ours(tmp_path / "ours", num_hidden_layers=1, **fields)
    with pytest.raises(ConfigFieldError, match=f"(?s){to} cannot hold .*{named}"):
        export(folder, tmp_path / "deep" / "back", to)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_another_familys_rounding_is_refused(tmp_path):
    folder = ours(tmp_path / "ours", **BLOOM, num_hidden_layers=1, alibi_rounding="bloom")
    export(folder, tmp_path / "back", "bloom")
    with pytest.raises(ConfigFieldError, match="alibi_rounding='bloom'"):
        export(folder, tmp_path / "other", "mpt")


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize(("to", "class_name"), [("bloom", "Bloom"), ("mpt", "Mpt"), ("falcon", "Falcon")])
def test_a_classifier_keeps_its_head(head, to, class_name, tmp_path):
    import alibi_hf

    base = FAMILIES[to](tmp_path / "source", layers=1)
    rounding = {"alibi_rounding": "falcon"} if to == "falcon" else {}
    model = getattr(alibi_hf, f"AlibiFor{head}").from_pretrained(base, pad_token_id=0, **rounding)
    if head != "QuestionAnswering":
        model = getattr(alibi_hf, f"AlibiFor{head}").from_pretrained(base, num_labels=3, pad_token_id=0, **rounding)
    fill(model).save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", to)
    upstream = getattr(transformers, f"{class_name}For{head}")
    theirs, info = upstream.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        first, second = model(ids() + 0), theirs.eval()(ids())
    for name in ("start_logits", "end_logits") if head == "QuestionAnswering" else ("logits",):
        assert distance(getattr(first, name), getattr(second, name)) < LIMIT
    with pytest.raises(ConfigFieldError, match=f"AlibiFor{head}"):
        export(tmp_path / "ours", tmp_path / "other", "llm-foundry")


def test_the_record_the_tokenizer_and_the_dtype(tmp_path):
    source = tokenizer(mpt(tmp_path / "source"))
    (source / "LICENSE").write_text("terms")
    report = round_trip(source, tmp_path, "mpt", dtype="float16", max_shard_size="30KB", command="the command")
    back = tmp_path / "back"
    assert read(back / "export.json") == report.to_dict() and report.command == "the command"
    for side, folder in ((report.source, tmp_path / "ours"), (report.output, back)):
        assert len(side["files"]) > 1
        for file in side["files"]:
            assert file["sha256"] == hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest()
    assert {tensor.dtype for tensor in held(back).values()} == {torch.float16}
    assert same(held(back), {name: tensor.half() for name, tensor in held(source).items()})
    assert AutoTokenizer.from_pretrained(back)("Hello")["input_ids"] and (back / "LICENSE").read_text() == "terms"
    assert read(back / "generation_config.json") == read(tmp_path / "ours" / "generation_config.json")
    fused = next(row for row in report.tensors if "Wqkv" in row["target"])
    assert len(fused["source"]) == 3 and fused["rule"].startswith("inverse of split")


def test_values_that_the_dtype_cannot_hold(tmp_path):
    folder = ours(tmp_path / "ours", **MPT)
    tensors = held(folder)
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TensorError, match=r"norm_f.weight has 1 values"):
        export(folder, tmp_path / "back", "mpt", dtype="float16")
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".*"))


def change(folder, **changes):
    """Set tensors of the folder; None takes one out."""
    tensors = {**held(folder), **{name.replace("__", "."): value for name, value in changes.items()}}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__norm__weight": None}, "lacks model.norm.weight"),
        ({"model__extra": torch.ones(2)}, "also holds model.extra"),
        ({"model__norm__weight": torch.ones(3)}, r"shape \[3\].*\[48\]"),
        ({"model__norm__weight": torch.full((48,), torch.nan)}, "48 NaN.*allow-nonfinite"),
        ({"lm_head__weight": torch.ones(97, 48)}, "differs from model.embed_tokens.weight"),
    ],
)
def test_tensors_that_are_not_the_configs(changes, words, tmp_path):
    folder = ours(tmp_path / "ours", **MPT)
    change(folder, **changes)
    with pytest.raises(TensorError, match=words):
        export(folder, tmp_path / "back", "mpt")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_tied_head_that_is_stored_all_the_same(tmp_path):
    folder = ours(tmp_path / "ours", **MPT)
    change(folder, lm_head__weight=held(folder)["model.embed_tokens.weight"].clone())
    export(folder, tmp_path / "back", "mpt")
    assert "lm_head.weight" not in held(tmp_path / "back")


def test_nan_is_taken_when_asked(tmp_path):
    folder = ours(tmp_path / "ours", **MPT)
    change(folder, model__norm__weight=torch.full((48,), torch.nan))
    export(folder, tmp_path / "back", "mpt", allow_nonfinite=True)
    assert held(tmp_path / "back")["transformer.norm_f.weight"].isnan().all()


@pytest.mark.parametrize("to", ["mpt", "gguf"])
def test_one_tensor_is_held_at_a_time(to, tmp_path, monkeypatch):
    folder = ours(tmp_path / "ours", **MPT)
    counts = count_held(monkeypatch)
    export(folder, tmp_path / "back", to)
    assert len(counts) == len(held(folder)) and max(counts) <= 4  # the three parts of a fused one, and the last before


def test_folders_that_are_none_of_ours(tmp_path):
    upstream = mpt(tmp_path / "upstream")
    with pytest.raises(CheckpointFileError, match=r"model_type='mpt'.*alibi-hf convert"):
        export(upstream, tmp_path / "back", "mpt")
    folder = ours(tmp_path / "ours", **MPT)
    with pytest.raises(ConfigFieldError, match="to='gpt' is no target; choose one of bloom"):
        export(folder, tmp_path / "back", "gpt")
    with pytest.raises(CheckpointFileError, match="replace the source"):
        export(folder, folder, "mpt", overwrite=True)
    with pytest.raises(CheckpointFileError, match="overwrite"):
        export(folder, upstream, "mpt")
    with pytest.raises(ConfigFieldError, match="dtype='q8_0'"):
        export(folder, tmp_path / "back", "mpt", dtype="q8_0")
    config = read(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(ConfigFieldError, match="quantised"):
        export(folder, tmp_path / "back", "mpt")
    AlibiModel(AlibiConfig(**{name: config[name] for name in ("vocab_size", "hidden_size")})).save_pretrained(folder)
    with pytest.raises(TensorError, match="holds a AlibiModel"):
        export(folder, tmp_path / "back", "mpt")
    assert issubclass(TensorError, AlibiError) and not (tmp_path / "back").exists()


def test_every_target_has_a_reader_and_all_fields_are_compared():
    assert set(TARGETS) == {"bloom", "mpt", "llm-foundry", "falcon"}
    left = AlibiConfig.__annotations__.keys() - computed(AlibiConfig()).keys()
    assert left == {
        "alibi",
        "alibi_bias_max",
        "alibi_rounding",
        "attention_window",
        "attention_window_eps",
        "attention_dropout",
        "hidden_dropout",
        "embedding_dropout",
        "initializer_range",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
