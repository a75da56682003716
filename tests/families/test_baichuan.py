"""Baichuan-13B and Baichuan2-13B: config, layout, the normalised head, and parity with the formulas."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.inspect import inspect_checkpoint
from alibi_hf.checkpoints.rules import Normalised
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import ConfigFieldError, TensorError
from alibi_hf.families import find_family
from alibi_hf.model.modeling_alibi import AlibiForCausalLM, AlibiForSequenceClassification, AlibiModel
from alibi_hf.model.positions_alibi import make_distances
from alibi_hf.verification import verify
from alibi_hf.verification.tensors import check_tensors
from alibi_hf.verification.text import make_tokens
from tests.builders import distance
from tests.families.agreement import check, decoded, mask, prove, scale_slopes, swap, tokens, wrong_by
from tests.families.test_fields import mapped
from tests.references import baichuan

NORM_HEAD = {"z_loss_weight": 0}
CASES = {
    "13B": {},
    "odd widths": {"inner": 91, "layers": 3},
    "bare sharded": {"prefix": False, "shards": 3},
    "norm eps": {"raw": {"rms_norm_eps": 0.01}},
    "bfloat16": {"dtype": torch.bfloat16},
}
HEAD = "lm_head.weight"


def logits(folder, **fields):
    model = AlibiForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager", **fields).eval()
    with torch.no_grad():
        return model(tokens()).logits


def test_a_published_config_maps():
    raw = {"_from_model_config": True, "gradient_checkpointing": [False], "max_position_embeddings": 4096}
    raw |= {"tokenizer_class": "BaichuanTokenizer", "auto_map": {}, "use_cache": True, "initializer_range": 0.02}
    config = mapped("baichuan", model_max_length=2048, rms_norm_eps=1e-5, intermediate_size=91, **raw)
    assert (config.max_position_embeddings, config.norm_eps, config.intermediate_size) == (2048, 1e-5, 91)
    assert (config.norm_type, config.mlp_type, config.hidden_act) == ("rms_norm", "gated", "silu")
    assert config.num_key_value_heads == 6 and not config.tie_word_embeddings
    biases = (config.attention_bias, config.attention_out_bias, config.mlp_bias)
    assert not any(biases) and config.alibi_slopes is None and config.alibi_distance == "linear"


def test_upstreams_defaults_fill_in():
    config = find_family({"model_type": "baichuan"}).config({"model_type": "baichuan"})
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (5120, 40, 40)
    assert (config.vocab_size, config.intermediate_size, config.max_position_embeddings) == (64000, 13696, 4096)
    assert (config.norm_eps, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1e-6, 0, 1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 4096}, r"hidden_size=4096 .*7B.*RoPE.*trust_remote_code=True"),
        ({"architectures": ["BaiChuanForCausalLM"]}, r"BaiChuanForCausalLM.*Baichuan-7B"),
        ({"tie_word_embeddings": True, "z_loss_weight": 0}, r"tie_word_embeddings=True"),
        ({"tie_word_embeddings": True, "vocab_size": 125696}, r"tie_word_embeddings=True"),
        ({"hidden_act": "frobnicate"}, r"hidden_act"),
        ({"z_loss_weight": "some"}, r"z_loss_weight='some'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config"),
    ],
)
def test_what_cannot_be_expressed_stops(fields, message):
    with pytest.raises(ConfigFieldError, match=message):
        mapped("baichuan", **fields)


@pytest.mark.parametrize(
    ("fields", "normalised"),
    [
        ({}, False),
        ({"vocab_size": 64000}, False),
        ({"vocab_size": 125696}, True),
        ({"vocab_size": 125700, "z_loss_weight": 0}, True),  # resized by a fine-tune
        ({"z_loss_weight": 1e-4}, True),
    ],
)
def test_which_heads_are_normalised(fields, normalised):
    rules = find_family({"model_type": "baichuan"}).rules(mapped("baichuan", **fields))
    rule = next(rule for rule in rules if rule.source == HEAD)
    assert rule.folded is normalised and isinstance(rule.operation, Normalised) is normalised


@pytest.mark.parametrize("heads", [1, 6, 12, 40])
def test_head_counts(heads, tmp_path):
    check(baichuan, baichuan.write(tmp_path / "source", heads, layers=1), tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
def test_features(case, tmp_path):
    check(baichuan, baichuan.write(tmp_path / "source", **CASES[case]), tmp_path / "out")


@pytest.mark.parametrize("heads", [6, 12])
def test_the_normalised_head(heads, tmp_path):
    source = baichuan.write(tmp_path / "source", heads, raw=NORM_HEAD)
    check(baichuan, source, tmp_path / "out", limit=1e-7)  # the folded head is in float32, as the file
    plain = json.loads((source / "config.json").read_text())
    plain.pop("z_loss_weight")
    truth = baichuan.logits(source, tokens())
    (source / "config.json").write_text(json.dumps(plain))
    assert distance(logits(source), truth) > 0.1  # without the fold


def test_a_tied_head_of_the_first_version(tmp_path):
    source = baichuan.write(tmp_path, raw={"tie_word_embeddings": True})
    with pytest.raises(TensorError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        AlibiForCausalLM.from_pretrained(source)
    state = load_file(source / "model.safetensors")
    state[HEAD] = state["model.embed_tokens.weight"].clone()
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    assert distance(logits(source), baichuan.logits(source, tokens())) < 1e-10


def test_to_and_back_is_bit_identical_but_for_the_fold(tmp_path):
    checkpoint = Checkpoint.open(baichuan.write(tmp_path, 12, raw=NORM_HEAD))
    for group in checkpoint.groups:
        tensor = checkpoint.get(group.source)
        back = group.rule.inverse(group.rule.forward(tensor))
        assert torch.equal(back, tensor) is (group.source != HEAD)
    with pytest.raises(TensorError, match=r"\[96, 96\] cannot hold blocks of \[96, 96, 96\] rows"):
        next(g for g in checkpoint.groups if "W_pack" in g.source).rule.forward(torch.zeros(96, 96))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fold(dtype):
    weight = torch.randn(9000, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[7] = 0
    (folded,) = Normalised().forward(weight)
    exact = torch.nn.functional.normalize(weight.double(), dim=1)
    assert folded.dtype == dtype and torch.equal(folded, exact.to(dtype)) and not folded[7].any()
    (again,) = Normalised().forward(folded)
    assert (again.double() - folded.double()).abs().max() <= torch.finfo(dtype).eps
    assert Normalised().forward(weight.to("meta"))[0].shape == weight.shape


def test_the_folded_tensor_is_checked_against_the_source(tmp_path):
    source, out = baichuan.write(tmp_path / "source", layers=1, raw=NORM_HEAD), tmp_path / "out"
    conversion = convert(source, out, verify=False)
    assert next(row for row in conversion.tensors if row["source"] == HEAD)["rule"].startswith("folded: normalised")
    right = check_tensors(Checkpoint.open(source), out)
    assert right.passed and "1 of the used folded" in right.note
    state = load_file(out / "model.safetensors")
    state[HEAD] = load_file(source / "model.safetensors")[HEAD]  # as if it had not been folded
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    assert not check_tensors(Checkpoint.open(source), out).passed
    report = verify(source, out, lengths=(40,))
    assert {"tensors", "logits", "gradients"} <= {check.name for check in report.checks if not check.passed}


@pytest.mark.parametrize(("dtype", "target"), [("bfloat16", None), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_normalised_head_is_proved_in_any_dtype(dtype, target, tmp_path):
    source = baichuan.write(tmp_path / "source", layers=1, raw=NORM_HEAD, dtype=getattr(torch, dtype))
    report = prove(source, tmp_path / "out", dtype=target)
    assert "bias bits" in {check.name.split(",")[0] for check in report.checks}


def test_a_directly_loaded_head_is_the_converted_one_bit_for_bit(tmp_path):
    source = baichuan.write(tmp_path / "source", raw=NORM_HEAD, dtype=torch.bfloat16)
    convert(source, tmp_path / "out", verify=False)
    converted = load_file(tmp_path / "out" / "model.safetensors")[HEAD]
    direct = AlibiForCausalLM.from_pretrained(source).lm_head.weight
    assert converted.dtype == direct.dtype == torch.bfloat16 and torch.equal(direct, converted)
    assert (converted.float().norm(dim=1) - 1).abs().max() < 0.01


def test_a_head_in_a_wider_dtype_than_the_files_is_folded_in_it(tmp_path):
    source = baichuan.write(tmp_path / "source", raw=NORM_HEAD, dtype=torch.bfloat16)
    convert(source, tmp_path / "out", verify=False, dtype="float32")
    converted = load_file(tmp_path / "out" / "model.safetensors")[HEAD]
    assert torch.equal(AlibiForCausalLM.from_pretrained(source, dtype=torch.float32).lm_head.weight, converted)
    assert (converted.norm(dim=1) - 1).abs().max() < 1e-6
    with torch.no_grad():
        ours = AlibiForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)(tokens()).logits
    assert distance(ours, baichuan.logits(source, tokens())) < 1e-6


def test_other_heads_load_from_baichuan2_too(tmp_path):
    source = baichuan.write(tmp_path, raw=NORM_HEAD)
    assert AlibiModel.from_pretrained(source)(tokens()).last_hidden_state.shape == (2, 40, 48)
    assert AlibiForSequenceClassification.from_pretrained(source).config.vocab_size == 97


def test_a_custom_tokenizer_is_carried_and_its_code_never_runs(tmp_path):
    source, ran = baichuan.write(tmp_path / "source"), tmp_path / "ran"
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    (source / "tokenization_baichuan.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nclass BaichuanTokenizer: pass\n"
    )
    settings = {"tokenizer_class": "BaichuanTokenizer"}
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert inspect_checkpoint(source).family == "baichuan"
    convert(source, tmp_path / "out", verify=False)
    assert "random ids" in make_tokens(source, 97).origin and not ran.exists()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"sentencepiece"
    del settings["auto_map"]  # no reference to code that does not travel
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == settings


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [1, 6, 12, 40])
def test_the_rounded_bias_is_upstreams_bit_for_bit(heads, dtype, padded):
    config = mapped("baichuan", hidden_size=8 * heads, num_attention_heads=heads)
    config.alibi_rounding = "baichuan"
    given = torch.ones(2, 5000, dtype=torch.long)
    given[0, :900] = 0
    embeds = torch.zeros(2, 5000, 1, dtype=dtype)
    row = make_distances(config, embeds, given if padded else None, None, None, None, 0).row
    upstream = baichuan.rounded_bias(heads, 5000, dtype).expand(2, -1, -1)
    shown = given.bool()[:, None] if padded else torch.ones_like(given).bool()[:, None]  # no masked key is read
    assert row.dtype == dtype and torch.equal(row.expand(2, -1, -1) * shown, upstream * shown)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_upstreams_rounding_in_every_way_of_feeding(backend, tmp_path):
    source = baichuan.write(tmp_path, 12)
    model = AlibiForCausalLM.from_pretrained(
        source, alibi_rounding="baichuan", dtype=torch.float64, attn_implementation=backend
    ).eval()
    truth, padded = baichuan.logits(source, tokens()), baichuan.logits(source, tokens(), mask())
    with torch.no_grad():
        whole = model(tokens()).logits
        assert 1e-9 < distance(whole, truth) < 1e-5  # float32 products of absolute positions
        assert distance(model(tokens(), attention_mask=mask()).logits[0, 7:], padded[0, 7:]) < 1e-5
    assert distance(decoded(model, tokens(), 18), whole[:, 18:]) < 1e-10


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.05])
def test_a_wrong_bias_does_not_pass(factor, tmp_path):
    source = baichuan.write(tmp_path, 12)
    assert wrong_by(source, baichuan.logits(source, tokens()), scale_slopes(factor)) > 1e-4


@pytest.mark.parametrize("swapped", [("mlp.gate_proj", "mlp.up_proj"), ("self_attn.q_proj", "self_attn.k_proj")])
def test_a_wrong_order_does_not_pass(swapped, tmp_path):
    source = baichuan.write(tmp_path)
    assert wrong_by(source, baichuan.logits(source, tokens()), swap(*swapped)) > 1e-3
