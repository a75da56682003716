"""BTLM and Jais: config in both dialects, layout, stored slopes, scaling by length, rounding, and parity with the
formulas."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.direct import load_foreign
from alibi_hf.checkpoints.inspect import inspect_checkpoint
from alibi_hf.checkpoints.reference import load_reference
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import ConfigFieldError, TensorError
from alibi_hf.families import find_family
from alibi_hf.model.bias_alibi import alibi_slopes, config_slopes
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from alibi_hf.model.positions_alibi import make_distances
from alibi_hf.model.sdpa_alibi import choose_form
from alibi_hf.verification.tensors import check_tensors
from tests.builders import distance, ids
from tests.families.test_fields import MINIMAL, mapped
from tests.references import btlm

OLD = {**dict.fromkeys(btlm.MUP), **btlm.OLD_MUP}
DYNAMIC = {"alibi_scaling": {"type": "linear", "train_seq_len": 16}}
FIXED = {"alibi_scaling": {"type": "linear", "factor": 1.7}}
SLOPES = "transformer.relative_pe.slopes"
TRAINED = torch.tensor([0.4, 0.11, 0.05, 0.3, 0.013, 0.27])
CASES = {
    "mup": {},
    "jais in older names": {"family": "jais", "raw": OLD},
    "no mup": {"raw": dict.fromkeys(btlm.MUP)},
    "plain mlp, default activation, default width": {"raw": {"activation_function": "gelu_new", "n_inner": None}},
    "relu": {"raw": {"activation_function": "relu"}},
    "unscaled scores": {"raw": {"scale_attn_weights": False}},
    "untied, another eps": {"raw": {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}},
    "factor": {"raw": FIXED},
    "by length": {"raw": DYNAMIC},
    "slopes of their own": {"slopes": TRAINED},
    "slopes as a row": {"slopes": TRAINED[:, None]},
    "slopes in bfloat16": {"dtype": torch.bfloat16, "slopes": TRAINED},
    "no slopes, no buffers": {"stored": False, "buffers": False},
    "bare and sharded": {"prefix": False, "shards": 5},
}


def published_btlm() -> dict:
    return {
        "activation_function": "swiglu",
        "architectures": ["BTLMLMHeadModel"],
        "attn_pdrop": 0.0,
        "auto_map": {"AutoConfig": "configuration_btlm.BTLMConfig"},
        "bos_token_id": 50256,
        "embd_pdrop": 0.0,
        "eos_token_id": 50256,
        "initializer_range": 0.073,
        "layer_norm_epsilon": 1e-05,
        "model_type": "btlm",
        "n_embd": 2560,
        "n_head": 32,
        "n_inner": 6826,
        "n_layer": 32,
        "n_positions": 8192,
        "mup_width_scale": 0.1,
        "mup_embeddings_scale": 14.6,
        "mup_output_alpha": 2.2200000000000003,
        "mup_scale_qk_dot_by_d": True,
        "position_embedding_type": "alibi",
        "reorder_and_upcast_attn": False,
        "resid_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 50257,
    }


def test_a_published_btlm_config_maps():
    raw = published_btlm()
    config = find_family(raw).config(raw)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (2560, 32, 32)
    assert (config.intermediate_size, config.max_position_embeddings, config.norm_eps) == (6826, 8192, 1e-5)
    assert (config.mlp_type, config.hidden_act, config.norm_type) == ("gated", "silu", "layer_norm")
    assert config.attention_scale == 1 / 80 and config.embedding_scale == 14.6
    assert config.logit_scale == pytest.approx(0.222)
    assert config.attention_bias and config.attention_out_bias and config.mlp_bias and config.tie_word_embeddings
    assert (config.hidden_dropout, config.embedding_dropout, config.attention_dropout) == (0.0, 0.0, 0.0)
    assert config.alibi_scaling is None and config.alibi_rounding == "exact"


def test_the_older_names_of_jais_map():
    raw = {name: value for name, value in published_btlm().items() if not name.startswith("mup_")}
    raw |= {"model_type": "jais", "architectures": ["JAISLMHeadModel"], "n_embd": 5120, "n_head": 40, "n_inner": 13653}
    raw |= {"width_scale": 0.111, "embeddings_scale": 14.6, "scale_qk_dot_by_d": True, "pad_token_id": 0}
    family = find_family(raw)
    config = family.config(raw)
    assert family.NAMES[0] == "jais"
    assert (config.logit_scale, config.embedding_scale, config.attention_scale) == (0.111, 14.6, 1 / 128)


@pytest.mark.parametrize("family", ["btlm", "jais"])
def test_absent_fields_have_upstreams_defaults(family):
    config = mapped(family)
    assert (config.hidden_act, config.mlp_type, config.intermediate_size) == ("gelu_new", "plain", 4 * 48)
    assert (config.attention_scale, config.embedding_scale, config.logit_scale) == (None, None, None)
    assert (config.hidden_dropout, config.attention_dropout, config.embedding_dropout) == (0.1, 0.1, 0.1)
    assert (config.max_position_embeddings, config.bos_token_id, config.eos_token_id) == (1024, 50256, 50256)
    assert mapped(family, mup_output_alpha=2.0, mup_width_scale=0.25).logit_scale == 0.5
    assert mapped(family, scale_attn_weights=False, mup_scale_qk_dot_by_d=True).attention_scale == 1.0
    assert mapped(family, **DYNAMIC).alibi_scaling == DYNAMIC["alibi_scaling"]
    assert mapped(family, n_ctx=7, summary_type="cls_index", reorder_and_upcast_attn=True).hidden_size == 48


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": "learned"}, r"position_embedding_type='learned'.*trust_remote_code=True"),
        ({"position_embedding_type": None}, r"position_embedding_type=None"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx=True"),
        ({"activation_function": "swish_glu"}, r"hidden_act='swish_glu'"),
        ({"width_scale": 0.2, "mup_width_scale": 0.1, "mup_output_alpha": 2.22}, r"width_scale=0.2.*0\.222"),
        ({"embeddings_scale": 14.6, "mup_embeddings_scale": 10.0}, r"embeddings_scale.*disagree"),
        ({"scale_qk_dot_by_d": True, "mup_scale_qk_dot_by_d": False}, r"scale_qk_dot_by_d.*disagree"),
        ({"alibi_scaling": {"type": "linear"}}, r"alibi_scaling"),
        ({"alibi_scaling": {"type": "dynamic", "factor": 2.0}}, r"alibi_scaling"),
        ({"alibi_scaling": {"type": "linear", "factor": 1.0}}, r"alibi_scaling"),
        ({"alibi_scaling": {"type": "linear", "factor": float("nan")}}, r"alibi_scaling"),
        ({"alibi_scaling": {"type": "linear", "factor": 2.0, "train_seq_len": 16}}, r"alibi_scaling"),
        ({"alibi_scaling": [2.0]}, r"alibi_scaling=\[2.0\] should be of type dict"),
        ({"add_cross_attention": True}, r"add_cross_attention=True"),
    ],
)
@pytest.mark.parametrize("family", ["btlm", "jais"])
def test_what_cannot_be_expressed_stops(family, fields, message):
    with pytest.raises(ConfigFieldError, match=message):
        mapped(family, **fields)


def test_learned_positions_are_upstreams_default_and_refused():
    raw = {name: value for name, value in MINIMAL["jais"].items() if name != "position_embedding_type"}
    with pytest.raises(ConfigFieldError, match=r"'learned' \(upstream's default\)"):
        find_family(raw).config(raw)


@pytest.mark.parametrize("heads", [1, 6, 12, 40])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_to_and_back_is_bit_identical(heads, activation, tmp_path):
    checkpoint = Checkpoint.open(btlm.write(tmp_path, heads, layers=1, raw={"activation_function": activation}))
    read = [group for group in checkpoint.groups if group.fate != "dropped"]
    for group in read:
        tensor = checkpoint.get(group.source)
        assert torch.equal(group.rule.inverse(group.rule.forward(tensor)), tensor)
    names = {group.source for group in checkpoint.groups} - {group.source for group in read}
    assert names == {"transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"}  # not c_attn.bias


def test_weights_are_transposed_and_c_fc2_is_the_gate(tmp_path):
    folder = btlm.write(tmp_path)
    held = load_file(folder / "model.safetensors")
    model, info = load_foreign(AlibiForCausalLM, folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]  # nothing to warn of
    layer = model.model.layers[1]
    assert torch.equal(layer.self_attn.k_proj.weight, held["transformer.h.1.attn.c_attn.weight"][:, 48:96].T)
    assert torch.equal(layer.self_attn.v_proj.bias, held["transformer.h.1.attn.c_attn.bias"][96:])
    assert torch.equal(layer.mlp.gate_proj.weight, held["transformer.h.1.mlp.c_fc2.weight"].T)
    assert torch.equal(layer.mlp.up_proj.weight, held["transformer.h.1.mlp.c_fc.weight"].T)


def changed(folder, **tensors):
    """The checkpoint with some tensors replaced, or taken out (None)."""
    held = {**load_file(folder / "model.safetensors"), **tensors}
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    weight = "transformer.h.0.attn.c_attn.weight"
    folder = changed(btlm.write(tmp_path / "a"), **{weight: torch.zeros(144, 48)})
    with pytest.raises(TensorError, match=r"c_attn.weight has shape \[144, 48\], config.json gives \[48, 144\]"):
        Checkpoint.open(folder)
    folder = changed(btlm.write(tmp_path / "b"), **{"transformer.h.0.mlp.c_fc2.weight": None})
    with pytest.raises(TensorError, match=r"missing.*h.0.mlp.c_fc2.weight"):
        Checkpoint.open(folder)
    folder = changed(btlm.write(tmp_path / "c"), **{"transformer.wpe.weight": torch.zeros(64, 48)})
    with pytest.raises(TensorError, match=r"not understood.*wpe.weight"):
        load_foreign(AlibiForCausalLM, folder)


@pytest.mark.parametrize("heads", [1, 12, 40])
def test_head_counts(heads, tmp_path):
    check(btlm.write(tmp_path / "source", heads, layers=1), tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
def test_features(case, tmp_path):
    check(btlm.write(tmp_path / "source", layers=2, **CASES[case]), tmp_path / "out")


def check(folder, out):
    """Converted, directly loaded and plain models against the formulas, past the training length of 64 too."""
    tokens = ids(length=80)
    expected = btlm.logits(folder, tokens)
    convert(folder, out, verify=False, max_shard_size="40KB")
    assert check_tensors(Checkpoint.open(folder), out).passed
    converted = AlibiForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    direct = load_foreign(AlibiForCausalLM, folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for model in (converted, direct):
            assert distance(model(tokens).logits, expected) < 2e-6
            assert distance(model.double()(tokens).logits, expected) < 1e-10
        plain = load_reference(Checkpoint.open(folder), torch.float64)[1]
        assert distance(plain(tokens).logits, btlm.logits(folder, tokens, single=False)) < 1e-7
        if "train_seq_len" not in (converted.config.alibi_scaling or {}):
            check_padding(converted, plain, folder, tokens)


def check_padding(model, plain, folder, tokens):
    """A left-padded batch, and what it continues with token by token."""
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    kept, expected = mask.bool(), btlm.logits(folder, tokens, mask)
    assert distance(model(tokens, attention_mask=mask).logits[kept], expected[kept]) < 1e-10
    assert distance(plain(tokens, attention_mask=mask).logits[kept], expected[kept]) < 1e-7
    cache = model(tokens[:, :70], attention_mask=mask[:, :70], use_cache=True).past_key_values
    for end in range(71, 81):
        output = model(tokens[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
        assert distance(output.logits, expected[:, end - 1 : end]) < 1e-10


@pytest.mark.parametrize("slope_factor", [0.0, -1.0, 1.05])
@pytest.mark.parametrize("length", [10, 80])
def test_a_wrong_bias_does_not_pass(slope_factor, length, tmp_path):
    tokens = ids(length=length)
    folder = btlm.write(tmp_path)
    model = load_foreign(AlibiForCausalLM, folder, dtype=torch.float64).eval()
    with torch.no_grad():
        assert distance(model(tokens).logits, btlm.logits(folder, tokens, slope_factor=slope_factor)) > 1e-3


@pytest.mark.parametrize("names", [("mlp.c_fc", "mlp.c_fc2"), ("ln_1", "ln_2")])
def test_a_wrong_order_does_not_pass(names, tmp_path):
    folder, tokens = btlm.write(tmp_path), ids()
    expected, held = btlm.logits(folder, tokens), load_file(folder / "model.safetensors")
    first, second = (f"transformer.h.0.{name}.weight" for name in names)
    model = load_foreign(AlibiForCausalLM, changed(folder, **{first: held[second], second: held[first]})).eval()
    with torch.no_grad():
        assert distance(model(tokens).logits, expected) > 1e-3


@pytest.mark.parametrize("calls", [[80], [10, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [40, *[1] * 10], [1] * 30, [7, 20, 3]])
def test_scaling_by_length_in_prefill_and_decode(calls, tmp_path):
    folder, tokens = btlm.write(tmp_path, raw=DYNAMIC), ids(length=sum(calls))
    expected = btlm.logits(folder, tokens, calls=calls)
    model = load_foreign(AlibiForCausalLM, folder, dtype=torch.float64).eval()
    plain = load_reference(Checkpoint.open(folder), torch.float64)[1]
    for reader, bound in ((model, 1e-10), (plain, 1e-7)):
        cache, found = None, []
        for part in tokens.split(calls, dim=1):
            with torch.no_grad():
                output = reader(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
        assert distance(torch.cat(found, dim=1), expected) < bound
    if len(calls) > 1:  # one call is another computation, and so is reading without scaling
        assert distance(btlm.logits(folder, tokens), expected) > 1e-4
    assert distance(btlm.logits(btlm.write(tmp_path / "plain"), tokens), expected) > 1e-3


@torch.no_grad()
def test_scaling_by_length_reads_padded_rows_as_upstream_reads_them_alone(tmp_path):
    folder, tokens = btlm.write(tmp_path, raw=DYNAMIC), ids(3, length=60)
    model = load_foreign(AlibiForCausalLM, folder, dtype=torch.float64).eval()
    mask = torch.ones_like(tokens)
    mask[0, :25], mask[1, 10:55] = 0, 0  # 35 tokens, 15 and 60: below and above the 16 of training
    kept, calls = mask.bool(), [50, *[1] * 10]
    assert distance(model(tokens, attention_mask=mask).logits[kept], btlm.logits(folder, tokens, mask)[kept]) < 1e-10
    cache, found = None, []
    for end, part in zip(itertools.accumulate(calls), tokens.split(calls, dim=1), strict=True):
        output = model(part, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    logits = torch.cat(found, dim=1)
    for row, keep in enumerate(kept):
        own = [int(part.sum()) for part in keep.split(calls) if part.any()]
        alone = btlm.logits(folder, tokens[row, keep][None], calls=own)
        assert distance(logits[row, keep][None], alone) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slopes", [None, TRAINED[:, None]], ids=["paper", "own"])
def test_stored_slopes_are_kept_as_stored(dtype, slopes, tmp_path):
    folder = btlm.write(tmp_path / "source", dtype=dtype, slopes=slopes)
    stored = load_file(folder / "model.safetensors")[SLOPES]
    conversion = convert(folder, tmp_path / "out", dtype="float16", verify=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["alibi_slopes"]
    assert torch.equal(torch.tensor(written, dtype=torch.float64), stored.double().flatten())
    model = load_foreign(AlibiForCausalLM, folder)
    assert model.config.alibi_slopes == written
    assert torch.equal(config_slopes(model.config), stored.float().flatten())
    row = next(row for row in conversion.tensors if row["source"] == SLOPES)
    assert (row["target"], row["fate"]) == (["config.json: alibi_slopes"], "used")
    notes = inspect_checkpoint(folder).notes
    assert notes == conversion.notes
    if dtype == torch.float32 and slopes is None:
        assert not notes
    else:
        assert f"{SLOPES} is kept as stored, in {str(dtype).removeprefix('torch.')}" in notes[0]


def test_stored_slopes_hold_beside_a_config_of_the_callers_that_names_none(tmp_path):
    folder = btlm.write(tmp_path, slopes=torch.tensor([0.9, 0.7, 0.5, 0.3, 0.2, 0.1]))
    raw = json.loads((folder / "config.json").read_text())
    given = find_family(raw).config(raw)
    model = AlibiForCausalLM.from_pretrained(folder, config=given, dtype=torch.float64).eval()
    with torch.no_grad():
        assert distance(model(ids()).logits, btlm.logits(folder, ids())) < 1e-7
    given.alibi_slopes = alibi_slopes(6)
    assert AlibiForCausalLM.from_pretrained(folder, config=given).config.alibi_slopes == alibi_slopes(6)


def test_slopes_that_no_file_holds_are_the_formulas(tmp_path):
    checkpoint = Checkpoint.open(btlm.write(tmp_path, stored=False))
    assert checkpoint.config.alibi_slopes is None and not checkpoint.notes
    plain = load_reference(checkpoint, torch.float64)[1]
    assert plain.transformer.relative_pe.slopes.flatten().tolist() == pytest.approx(alibi_slopes(6), rel=1e-15)


@pytest.mark.parametrize(
    ("slopes", "message"),
    [
        (torch.ones(8, 1), r"slopes has shape \[8, 1\], config.json gives 6 heads"),
        (torch.ones(1, 6), r"slopes has shape \[1, 6\]"),
        (torch.full((6, 1), float("nan")), r"relative_pe.slopes holds 6 NaN"),
        (-torch.ones(6, 1), r"relative_pe.slopes holds the slope -1.0"),
    ],
)
def test_slopes_that_cannot_be_are_refused(slopes, message, tmp_path):
    folder = btlm.write(tmp_path / "source", slopes=slopes)
    with pytest.raises(TensorError, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(TensorError, match=message):
        load_foreign(AlibiForCausalLM, folder)


@pytest.mark.parametrize("change", ["absent", "one bit"])
def test_slopes_that_config_json_changed_are_found(change, tmp_path):
    source, out = btlm.write(tmp_path / "source", slopes=TRAINED), tmp_path / "out"
    convert(source, out, verify=False)
    config = json.loads((out / "config.json").read_text())
    larger = [torch.nextafter(TRAINED[0], torch.tensor(1.0)).item(), *config["alibi_slopes"][1:]]
    config["alibi_slopes"] = larger if change == "one bit" else None
    (out / "config.json").write_text(json.dumps(config))
    found = check_tensors(Checkpoint.open(source), out)
    assert not found.passed and f"{SLOPES} (in config.json)" in found.note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("raw", [{}, FIXED, DYNAMIC], ids=["plain", "factor", "by length"])
@pytest.mark.parametrize("slopes", [None, TRAINED[:, None]], ids=["paper", "own"])
def test_rounded_bias_is_upstreams_bit_for_bit(slopes, raw, dtype, tmp_path):
    folder, queries = btlm.write(tmp_path, layers=1, slopes=slopes, raw=raw), 700
    config = Checkpoint.open(folder, alibi_rounding="jais").config
    distances = make_distances(config, torch.zeros(1, queries, 1, dtype=dtype), None, None, None, None, 0)
    expected = btlm.upstream_bias(folder, queries, queries, dtype)
    assert expected.dtype == dtype
    seen = torch.ones(queries, queries, dtype=torch.bool).tril()
    assert torch.equal(distances.block(0, queries, queries)[0][0][:, seen], expected[:, seen].float())
    exact = make_distances(
        Checkpoint.open(folder).config, torch.zeros(1, queries, 1, dtype=dtype), None, None, None, None, 0
    )
    differ = (exact.block(0, queries, queries)[0][0][:, seen] != expected[:, seen].float()).any()
    if dtype != torch.float16:  # whose 11 bits are enough for the paper's slopes here
        assert bool(differ) == (dtype == torch.bfloat16)


def test_rounded_bias_takes_no_shortcut():
    config = mapped("jais")
    query = torch.zeros(1, 6, 40, 8, dtype=torch.bfloat16)
    for rounding, form in (("exact", "row"), ("jais", "tiles")):
        config.alibi_rounding = rounding
        distances = make_distances(config, query[:, 0], None, None, None, None, 0)
        with torch.no_grad():
            assert choose_form(query, distances, 0.0)[0] == form
        assert distances.window == (rounding == "exact")


def test_only_its_own_rounding_is_taken(tmp_path):
    folder = btlm.write(tmp_path)
    assert load_foreign(AlibiForCausalLM, folder, alibi_rounding="jais").config.alibi_rounding == "jais"
    with pytest.raises(ConfigFieldError, match=r"'bloom'.*cannot be combined|'bloom' is not the rounding of btlm"):
        Checkpoint.open(folder, alibi_rounding="bloom")
    with pytest.raises(ConfigFieldError, match=r"cannot be combined.*alibi_distance='sqrt'"):
        load_foreign(AlibiForCausalLM, folder, alibi_rounding="jais", alibi_distance="sqrt")


@pytest.mark.parametrize(
    ("family", "kwargs", "rounding"),
    [
        ("jais", {"raw": OLD}, "exact"),
        ("btlm", {"raw": DYNAMIC, "dtype": torch.bfloat16, "slopes": TRAINED}, "exact"),
        ("jais", {"stored": False, "raw": {**OLD, **FIXED}, "heads": 1}, "jais"),
    ],
)
def test_conversions_are_proved_and_wrong_ones_caught(family, kwargs, rounding, tmp_path):
    folder = btlm.write(tmp_path / "source", family=family, layers=1, length=32, **kwargs)
    result = convert(folder, tmp_path / "out", alibi_rounding=rounding).verification
    assert result.proved, [check for check in result.checks if not check.passed]
    assert [control.caught for control in result.negative_controls] == [True] * 4  # in layers and whole
    assert {check.name for check in result.checks} >= {'bias bits, alibi_rounding="jais"', "logits, cached decode"}
    padded = "logits, left-padded batch" in {check.name for check in result.checks}
    assert padded == (kwargs.get("raw") != DYNAMIC) and any("alibi_scaling" in note for note in result.notes) != padded
    assert any("kept as stored, in bfloat16" in note for note in result.notes) == ("dtype" in kwargs)


def test_inspection_says_where_the_slopes_are(tmp_path):
    found = inspect_checkpoint(btlm.write(tmp_path, slopes=TRAINED, raw=FIXED))
    assert "slopes stored in the checkpoint" in found.position and "factor" in found.position
    assert found.slopes == pytest.approx(TRAINED.tolist()) and found.dtype == "float32"
    assert "PlainBtlm" in found.reference and "no class for btlm" in found.reference_note
