"""`retrofit`: what it writes and says, what it takes, and what it refuses without leaving anything."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import alibi_hf
from alibi_hf import AlibiError, AlibiForCausalLM, ConfigFieldError, TensorError, UnknownFamilyError, retrofit
from alibi_hf.families import OTHER_POSITIONS
from alibi_hf.retrofitting.retrofit import LAYOUTS, find_layout
from tests import builders
from tests.retrofitting.sources import SOURCES

WEIGHTS = "model.safetensors"
EVERY = pytest.mark.parametrize("layout", SOURCES)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@EVERY
def test_it_says_that_it_computes_something_else(layout, tmp_path):
    report = retrofit(SOURCES[layout](tmp_path / "source"), tmp_path / "out", command="the command")
    saved = json.loads((tmp_path / "out" / "retrofit.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    for text in (saved["statement"], *((tmp_path / "out" / name).read_text() for name in ("retrofit.md", "README.md"))):
        assert "computes something else than its source" in text and "has to be trained on" in text
    kinds = {"gpt2": "learned", "llama": "rotary", "mistral": "rotary"}
    assert kinds[layout] in saved["statement"] and kinds[layout] in saved["notes"][0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["retrofitted_from"] == layout
    assert not (tmp_path / "out" / "conversion.json").exists()
    assert [file["name"] for file in saved["source"]["files"]] == [WEIGHTS]
    assert all(len(file["sha256"]) == 64 for file in saved["source"]["files"] + saved["output"]["files"])
    assert saved["command"] == "the command" and saved["config"]["from"]["model_type"] == layout


@EVERY
def test_neither_loading_nor_converting_does_it_silently(layout, tmp_path):
    source = SOURCES[layout](tmp_path / "source")
    calls = (
        lambda: AlibiForCausalLM.from_pretrained(source),
        lambda: alibi_hf.convert(source, tmp_path / "out"),
        lambda: alibi_hf.inspect_checkpoint(source),
    )
    for call in calls:
        with pytest.raises(UnknownFamilyError, match=r"learned or rotary.*alibi-hf retrofit.*trained on"):
            call()
    assert {name for found in LAYOUTS for name in found.NAMES} == set(OTHER_POSITIONS)


@EVERY
def test_every_tensor_has_a_fate(layout, tmp_path):
    source = SOURCES[layout](tmp_path / "source")
    dropped = {
        "gpt2": {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
            "transformer.h.1.attn.masked_bias": torch.ones(()),
        },
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)},
        "mistral": {"model.rotary_emb.inv_freq": torch.ones(6)},
    }[layout]
    save_file(load_file(source / WEIGHTS) | dropped, source / WEIGHTS)
    fates = {tensor["source"]: tensor for tensor in retrofit(source, tmp_path / "out").tensors}
    assert fates.keys() == load_file(source / WEIGHTS).keys()
    assert {fates[name]["fate"] for name in dropped} == {"dropped"}
    positions = dropped if layout != "gpt2" else {"transformer.wpe.weight"}
    assert {fates[name]["reason"] for name in positions} == {"positions are replaced by ALiBi"}
    held = {target for tensor in fates.values() for target in tensor["target"]}
    assert held == load_file(tmp_path / "out" / WEIGHTS).keys()


@pytest.mark.parametrize("layout", ["gpt2", "llama"])
def test_options(layout, tmp_path):
    source = builders.tokenizer(SOURCES[layout](tmp_path / "source", shards=3))
    retrofit(source, tmp_path / "out", bias_max=16, length=500, dtype="bfloat16", max_shard_size=20_000, check=False)
    model = AlibiForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    config = model.config
    assert (config.alibi_bias_max, config.max_position_embeddings, model.dtype) == (16, 500, torch.bfloat16)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"] == [67, 2, 68]


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    source = SOURCES["gpt2"](tmp_path / "source")
    options = {"max_shard_size": 20_000, "command": "x", "workers": 1}
    retrofit(source, tmp_path / "straight", **options)

    def interrupt(what: str, done: int, total: int) -> None:
        if 2 * done > total > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retrofit(source, tmp_path / "out", progress=interrupt, **options)
    assert not (tmp_path / "out").exists()
    retrofit(source, tmp_path / "out", resume=True, **options)
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_gpt2_s_tokenizer_keeps_the_special_tokens_of_its_class(tmp_path):
    source = builders.tokenizer(SOURCES["gpt2"](tmp_path / "source"))
    (source / "tokenizer_config.json").write_text('{"model_max_length": 1024}')  # as it is published
    retrofit(source, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings == {"model_max_length": 1024, "tokenizer_class": "GPT2Tokenizer"}


def test_a_decoder_without_its_prefix_is_read(tmp_path):
    retrofit(SOURCES["gpt2"](tmp_path / "source", prefix=False), tmp_path / "out")


def test_a_classifier_keeps_its_head_and_is_not_checked(tmp_path):
    source = SOURCES["gpt2"](tmp_path / "source")
    save_file(load_file(source / WEIGHTS) | {"score.weight": torch.randn(2, 48)}, source / WEIGHTS)
    report = retrofit(source, tmp_path / "out")
    assert "AlibiForSequenceClassification" in report.notes[-1] and report.checks == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "AlibiForSequenceClassification"
    ]


def test_pickles_only_when_allowed(tmp_path):
    source = SOURCES["gpt2"](tmp_path / "source")
    torch.save(load_file(source / WEIGHTS), source / "pytorch_model.bin")
    (source / WEIGHTS).unlink()
    with pytest.raises(AlibiError, match=r"allow-pickle"):
        retrofit(source, tmp_path / "out")
    assert len(retrofit(source, tmp_path / "out", allow_pickle=True).checks) == 2


# Fields beyond the usual ones that published config.json files hold.
PUBLISHED = {
    "gpt2": {"model_type": "gpt2", "n_ctx": 1024, "summary_type": "cls_index", "task_specific_params": {}},
    "distilgpt2": {"model_type": "gpt2", "n_layer": 6, "_num_labels": 1, "id2label": {"0": "LABEL_0"}},
    "gpt2-medium": {"model_type": "gpt2", "n_special": 0, "predict_special_tokens": True, "n_embd": 1024, "n_head": 16},
    "gpt2-xl": {"model_type": "gpt2", "n_ctx": 1024, "output_past": True, "n_embd": 1600, "n_head": 25},
    "LLaMA": {"model_type": "llama", "max_sequence_length": 2048, "pad_token_id": -1},
    "Llama-2": {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None, "torch_dtype": "float16"},
    "Llama-3.1": {
        "model_type": "llama",
        "eos_token_id": [128001, 128008, 128009],
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "SmolLM2": {
        "model_type": "llama",
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {},
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "Mistral-7B-v0.3": {"model_type": "mistral", "sliding_window": None, "head_dim": None, "rope_theta": 1000000.0},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_they_are_published_are_understood(name):
    raw = PUBLISHED[name]
    found = find_layout(raw)
    assert found.config(raw).retrofitted_from == raw["model_type"]
    assert len(found.notes(raw)) == 1


REFUSED = {
    "inverse layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    "activation": ("gpt2", {"activation_function": "nope"}, "nope"),
    "unknown field": ("gpt2", {"frobnicate": 7}, "frobnicate=7"),
    "heads": ("gpt2", {"n_head": 5}, "48 cannot be shared out among 5"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "no such rope": ("llama", {"rope_scaling": {"rope_type": "nope"}}, "nope"),
    "head_dim": ("llama", {"head_dim": 0}, "head_dim"),
    "window": ("mistral", {"sliding_window": 47}, "sliding_window=47 .*max_position_embeddings=48.*null"),
    "layers of two kinds": ("mistral", {"layer_types": ["full_attention"]}, "layer_types"),
    "bias": ("mistral", {"attention_bias": True}, "attention_bias=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(case, tmp_path):
    layout, fields, words = REFUSED[case]
    source = SOURCES[layout](tmp_path / "source")
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ConfigFieldError, match=words):
        retrofit(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_mistral_s_default_window_is_refused_too(tmp_path):
    source = SOURCES["mistral"](tmp_path / "source", raw={"sliding_window": 4096})
    path = source / "config.json"
    raw = json.loads(path.read_text()) | {"max_position_embeddings": 32768}
    del raw["sliding_window"]
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigFieldError, match=r"sliding_window=4096"):
        retrofit(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        ("gpt2", {"transformer.h.0.crossattention.c_attn.weight": torch.zeros(2)}, "crossattention"),
        ("gpt2", {"transformer.ln_f.bias": None}, "ln_f.bias"),
        ("gpt2", {"transformer.wte.weight": torch.full((97, 48), float("nan"))}, "NaN"),
        ("llama", {"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 48)}, "up_proj"),
        ("llama", {"model.layers.0.self_attn.q_proj.bias": torch.zeros(72)}, "q_proj.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_named(layout, change, words, tmp_path):
    source = SOURCES[layout](tmp_path / "source")
    held = load_file(source / WEIGHTS) | change
    save_file({name: value for name, value in held.items() if value is not None}, source / WEIGHTS)
    with pytest.raises(TensorError, match=words):
        retrofit(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tied_head_that_differs_is_refused(tmp_path):
    source = SOURCES["gpt2"](tmp_path / "source")
    save_file(load_file(source / WEIGHTS) | {"lm_head.weight": torch.randn(97, 48)}, source / WEIGHTS)
    with pytest.raises(TensorError, match=r"tie_word_embeddings"):
        retrofit(source, tmp_path / "out")


def test_what_has_alibi_already_is_sent_to_convert(tmp_path):
    source = SOURCES["gpt2"](tmp_path / "source")
    retrofit(source, tmp_path / "out", check=False)
    for folder in (tmp_path / "out", builders.bloom(tmp_path / "bloom")):
        with pytest.raises(UnknownFamilyError, match=r"has ALiBi already.*convert"):
            retrofit(folder, tmp_path / "again")
    (tmp_path / "bloom" / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(UnknownFamilyError, match=r"gpt_neox.*gpt2, llama, mistral"):
        retrofit(tmp_path / "bloom", tmp_path / "again")


@pytest.mark.parametrize("options", [{"bias_max": -1}, {"length": 0}, {"dtype": "int3"}, {"workers": 0}])
def test_impossible_options_are_named(options, tmp_path):
    source = SOURCES["gpt2"](tmp_path / "source")
    with pytest.raises(ConfigFieldError, match=str(next(iter(options.values())))):
        retrofit(source, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_it_goes_on_to_where_servers_read_it(tmp_path):
    source = SOURCES["gpt2"](tmp_path / "source", raw={"activation_function": "gelu_new"})
    retrofit(source, tmp_path / "out")
    alibi_hf.export(tmp_path / "out", tmp_path / "gguf", "gguf", tokenizer=False)
    assert list((tmp_path / "gguf").glob("*.gguf"))


@pytest.mark.slow
def test_it_loads_without_the_package_and_writes_past_its_old_length(tmp_path):
    source = builders.tokenizer(SOURCES["gpt2"](tmp_path / "source"))
    retrofit(source, tmp_path / "out")
    shutil.rmtree(source)
    script = Path(__file__).parents[2] / "examples" / "generate_without_package.py"
    command = [sys.executable, str(script), str(tmp_path / "out"), "100"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 100
