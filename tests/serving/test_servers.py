"""Exported folders hold what the loaders of vLLM and TGI read: fields, tensor names, shapes, slopes, order of heads.

Neither runs here. Their side is written down as data, from vLLM's `model_executor/models/{bloom,mpt,falcon}.py` and
TGI's `custom_modeling/{bloom,mpt}_modeling.py`.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.export import export
from alibi_hf.checkpoints.export_compare import effective_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig
from tests.all_families import FAMILIES
from tests.builders import foundry
from tests.checkpoints.exporting import MPT, ours

HEADS, WIDTH, VOCAB, LAYERS = 6, 48, 97, 2
WRITERS = {**FAMILIES, "llm-foundry": foundry}
TARGETS = ("bloom", "mpt", "llm-foundry", "falcon")
SERVER = re.compile("vLLM|TGI|CTranslate2")

# The parameters of a layer of the server's model: weight shape, and whether there is a bias.
WIDE = 4 * WIDTH
BLOOM_LAYER = {
    "input_layernorm": ([WIDTH], True),
    "self_attention.query_key_value": ([3 * WIDTH, WIDTH], True),
    "self_attention.dense": ([WIDTH, WIDTH], True),
    "post_attention_layernorm": ([WIDTH], True),
    "mlp.dense_h_to_4h": ([WIDE, WIDTH], True),
    "mlp.dense_4h_to_h": ([WIDTH, WIDE], True),
}
MPT_LAYER = {
    "norm_1": ([WIDTH], False),
    "attn.Wqkv": ([3 * WIDTH, WIDTH], False),
    "attn.out_proj": ([WIDTH, WIDTH], False),
    "norm_2": ([WIDTH], False),
    "ffn.up_proj": ([WIDE, WIDTH], False),
    "ffn.down_proj": ([WIDTH, WIDE], False),
}
EMBEDDING = ([VOCAB, WIDTH], False)
BLOOM = {"word_embeddings": EMBEDDING, "word_embeddings_layernorm": ([WIDTH], True), "ln_f": ([WIDTH], True)}
FALCON = {"word_embeddings": EMBEDDING, "ln_f": ([WIDTH], True)}
MODELS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "bloom": (BLOOM, "h", BLOOM_LAYER),
    "falcon": (FALCON, "h", BLOOM_LAYER),
    "mpt": ({"wte": EMBEDDING, "norm_f": ([WIDTH], False)}, "blocks", MPT_LAYER),
}
# What vLLM asserts of MPT's config, or TGI raises for.
ASSERTED = {
    "embedding_fraction": 1.0,
    "norm_type": "low_precision_layernorm",
    "tie_word_embeddings": True,
    "attn_config.alibi": True,
    "attn_config.prefix_lm": False,
}


def parameters(to: str) -> dict[str, list[int]]:
    """The names and shapes of the server's parameters, without the tied head."""
    body, layers, layer = MODELS["mpt" if to == "llm-foundry" else to]
    every = {f"transformer.{name}": value for name, value in body.items()}
    for index in range(LAYERS):
        every |= {f"transformer.{layers}.{index}.{name}": value for name, value in layer.items()}
    weights = {f"{name}.weight": shape for name, (shape, _) in every.items()}
    return weights | {f"{name}.bias": shape[:1] for name, (shape, bias) in every.items() if bias}


def regrouped(to: str, fused: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values one after the other, `[3 * width, ...]`, as the server reads them out of `fused`."""
    if to in ("mpt", "llm-foundry"):
        return fused
    return fused.view(HEADS, 3, WIDTH // HEADS, *fused.shape[1:]).transpose(0, 1).reshape(fused.shape)


def server_slopes(to: str, heads: int, maximum: float) -> list[float]:
    """The server's slopes: powers for the next power of two, every other one first; Falcon's times its scale."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-maximum * (head + 1) / power) for head in range(power)]
    if power != heads:
        slopes = (slopes[1::2] + slopes[::2])[:heads]
    return [slope * (WIDTH // HEADS) ** -0.5 if to == "falcon" else slope for slope in slopes]


def exported(to: str, tmp_path: Path, **options: Any) -> tuple[Path, Path, list[str]]:
    """A converted folder, what it was exported to, and the notes."""
    convert(WRITERS[to](tmp_path / "source", HEADS, layers=LAYERS, **options), tmp_path / "ours", verify=False)
    report = export(tmp_path / "ours", tmp_path / "out", to)
    return tmp_path / "ours", tmp_path / "out", report.notes


@pytest.mark.parametrize("to", TARGETS)
def test_names_shapes_and_the_order_of_heads(to: str, tmp_path: Path) -> None:
    folder, out, _ = exported(to, tmp_path)
    held, own = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in held.items()} == parameters(to)
    fused = "blocks.1.attn.Wqkv" if to in ("mpt", "llm-foundry") else "h.1.self_attention.query_key_value"
    parts = [own[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(regrouped(to, held[f"transformer.{fused}.weight"]), torch.cat(parts))


@pytest.mark.parametrize(("to", "maximum"), [*((to, 8) for to in TARGETS), ("llm-foundry", 16)])
def test_the_servers_slopes_are_ours(to: str, maximum: int, tmp_path: Path) -> None:
    options = {} if maximum == 8 else {"attn_config": {"alibi_bias_max": maximum}}
    folder, out, _ = exported(to, tmp_path, **options)
    raw = AutoConfig.from_pretrained(out)  # as vLLM reads it
    read = raw.attn_config.alibi_bias_max if raw.model_type == "mpt" else 8
    slopes = effective_slopes(AlibiConfig.from_pretrained(folder))
    assert read == maximum and raw.num_attention_heads == HEADS
    assert server_slopes(to, HEADS, read) == pytest.approx(slopes, rel=1e-6)


@pytest.mark.parametrize("to", ["mpt", "llm-foundry"])
@pytest.mark.parametrize("recorded", [True, False])
def test_what_both_read_of_mpt(to: str, recorded: bool, tmp_path: Path) -> None:
    if recorded:
        folder, out, notes = exported(to, tmp_path)
    else:
        folder, out = ours(tmp_path / "ours", HEADS, **MPT), tmp_path / "out"
        notes = export(folder, out, to).notes
    config = AutoConfig.from_pretrained(out)
    for name, value in ASSERTED.items():
        first, _, second = name.partition(".")
        found = getattr(config, first)
        assert (getattr(found, second) if second else found) == value, name
    assert config.no_bias is True and "kv_n_heads" not in vars(config.attn_config)
    assert not any(SERVER.search(note) for note in notes)


def test_what_tgi_reads_without_a_default(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(ours(tmp_path / "ours", HEADS, **MPT), out, "llm-foundry")
    config = PreTrainedConfig(**json.loads((out / "config.json").read_text()))
    named = ["init_device", "verbose", "norm_type", "n_layers", "max_seq_len", "no_bias", "resid_pdrop", "logit_scale"]
    assert all(hasattr(config, name) for name in named) and config.init_config["verbose"] == 0
    of_attention = ["attn_impl", "prefix_lm", "attn_uses_sequence_id", "alibi", "alibi_bias_max", "clip_qkv", "qk_ln"]
    assert {*of_attention, "softmax_scale", "attn_pdrop", "attn_type"} <= config.attn_config.keys()
    assert config.attn_config["attn_impl"] == "torch" and config.attn_config["attn_type"] == "multihead_attention"


@pytest.mark.parametrize(
    ("to", "fields", "notes"),
    [
        ("mpt", {**MPT, "attention_scale": 0.3}, ["vLLM and CTranslate2 would ignore attn_config.softmax_scale=0.3"]),
        ("mpt", {**MPT, "attention_scale": 8**-0.5}, []),
        ("mpt", {**MPT, "norm_eps": 1e-3}, ["vLLM, TGI and CTranslate2 would ignore layer_norm_epsilon=0.001"]),
        ("mpt", {**MPT, "tie_word_embeddings": False}, ["vLLM and TGI cannot load tie_word_embeddings=False"]),
        ("llm-foundry", {**MPT, "clip_qkv": 2}, ["CTranslate2 would ignore attn_config.clip_qkv=2.0"]),
        ("llm-foundry", {**MPT, "logit_scale": 0.5}, ["vLLM and CTranslate2 would ignore logit_scale=0.5"]),
        ("llm-foundry", {**MPT, "alibi_bias_max": 16}, ["CTranslate2 would ignore attn_config.alibi_bias_max=16"]),
        ("llm-foundry", {**MPT, "qk_norm": "full"}, ["TGI cannot load attn_config.qk_ln=True"]),
        (
            "llm-foundry",
            {**MPT, "num_key_value_heads": 2},
            ["TGI cannot load attn_config.attn_type='grouped", "vLLM cannot load it.*expected one of.*grouped"],
        ),
        (
            "llm-foundry",
            {**MPT, "num_key_value_heads": 1, "qk_norm": "full"},
            ["vLLM cannot load attn_config.qk_ln", "TGI cannot load attn_config.qk_ln", "TGI.*attn_type='multiquery"],
        ),
        ("llm-foundry", {**MPT, "head_dim": 16}, ["vLLM cannot load head_dim=16", "softmax_scale=0.25"]),
        ("llm-foundry", {"attention_bias": True}, ["TGI cannot load no_bias=False"]),
        (
            "llm-foundry",
            {"norm_type": "rms_norm", "mlp_type": "gated"},
            ["vLLM and TGI cannot load norm_type='low_precision_rmsnorm'", "ffn_config="],
        ),
        ("falcon", {"alibi_slopes": "falcon", "hidden_act": "relu"}, ["vLLM would ignore activation='relu'"]),
        ("falcon", {"alibi_slopes": "falcon", "intermediate_size": 40}, ["vLLM cannot load ffn_hidden_size=40"]),
    ],
)
def test_export_says_what_a_server_would_leave_out(
    to: str, fields: dict[str, Any], notes: list[str], tmp_path: Path
) -> None:
    if fields.get("alibi_slopes") == "falcon":
        fields = {**fields, "alibi_slopes": server_slopes("falcon", HEADS, 8)}
    folder = ours(tmp_path / "ours", HEADS, num_hidden_layers=1, **fields)
    found = [note for note in export(folder, tmp_path / "out", to).notes if SERVER.search(note)]
    assert len(found) == len(notes), found
    for note, said in zip(found, notes, strict=True):
        assert re.search(said, note), (said, note)
