"""GGUF files, read back with the package that reads them: tensors, keys, tokenizer, and what no file can hold."""

import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alibi_hf import AlibiConfig, AlibiForCausalLM, convert
from alibi_hf.checkpoints.export import export
from alibi_hf.checkpoints.gguf_architectures import choose_architecture
from alibi_hf.errors import CheckpointFileError, ConfigFieldError, TensorError
from tests.builders import VOCAB, bloom, falcon, mpt, tokenizer
from tests.checkpoints.exporting import BLOOM, GATED, MPT, REFACT, ours

gguf = pytest.importorskip("gguf")

BLOOM_CUT = " ?[^(\\s|[.,!?…。\uff0c、।\u06d4،])]+"


def read_gguf(folder):
    """The tensors of the one file by name, dequantised to float32 `[...]`, and its keys."""
    (path,) = folder.glob("*.gguf")
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(values.copy()).reshape(tuple(int(n) for n in tensor.shape[::-1]))
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return tensors, keys, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def state(folder):
    return AlibiForCausalLM.from_pretrained(folder).float().state_dict()


def expected(folder, config):
    """What the file should hold, from the names and shapes that llama.cpp asks for, without any rule of the package."""
    held = state(folder)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "token_embd_norm": "model.embed_norm"}
    if not config.tie_word_embeddings:
        names["output"] = "lm_head"
    for i in range(config.num_hidden_layers):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        names |= {f"{block}.attn_norm": f"{layer}.input_layernorm", f"{block}.attn_output": f"{layer}.self_attn.o_proj"}
        names |= {f"{block}.ffn_{part}": f"{layer}.mlp.{part}_proj" for part in ("up", "down", "gate")}
        names[f"{block}.ffn_norm"] = f"{layer}.post_attention_layernorm"
        for part in ("weight", "bias"):
            rows = [held.get(f"{layer}.self_attn.{letter}_proj.{part}") for letter in "qkv"]
            if rows[0] is not None:
                held[f"{block}.attn_qkv.{part}"] = torch.cat(rows)
        names[f"{block}.attn_qkv"] = f"{block}.attn_qkv"
    pairs = {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in names.items() for part in ("weight", "bias")}
    return {ours: held[theirs] for ours, theirs in pairs.items() if theirs in held}


@pytest.mark.parametrize(
    ("name", "heads", "fields"),
    [
        ("bloom", 6, BLOOM),
        ("bloom", 12, {**BLOOM, "tie_word_embeddings": False, "num_key_value_heads": 3}),
        ("mpt", 1, MPT),
        ("mpt", 40, {**MPT, "num_hidden_layers": 1, "alibi_bias_max": 16, "clip_qkv": 6}),
        ("jais", 6, {**GATED, "attention_scale": 1 / 8, "tie_word_embeddings": False, "attention_bias": True}
         | {"attention_out_bias": True, "mlp_bias": True}),
    ],
)  # fmt: skip
def test_the_file_holds_what_llamacpp_asks_for(name, heads, fields, tmp_path):
    folder = ours(tmp_path / "ours", heads, **fields)
    report = export(folder, tmp_path / "out", "gguf")
    config = AlibiConfig.from_pretrained(folder)
    tensors, keys, _ = read_gguf(tmp_path / "out")
    wanted = expected(folder, config)
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[key], wanted[key]) for key in wanted)
    assert keys["general.architecture"] == report.architecture == name and keys["general.file_type"] == 0
    sizes = {
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "context_length": 64,
        "vocab_size": VOCAB,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_epsilon": pytest.approx(1e-5),
    }
    assert {key: keys[f"{name}.{key}"] for key in sizes} == sizes
    assert keys.get(f"{name}.attention.max_alibi_bias") == (None if name == "bloom" else config.alibi_bias_max)
    assert keys.get(f"{name}.attention.clamp_kqv") == config.clip_qkv
    assert {row["type"] for row in report.tensors} == {"F32"} and report.config["to"]["block_count"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_smaller_types_round_as_they_should(dtype, tmp_path):
    folder = ours(tmp_path / "ours", 12, **MPT)
    report = export(folder, tmp_path / "out", "gguf", dtype=dtype)
    tensors, keys, types = read_gguf(tmp_path / "out")
    whole = expected(folder, AlibiConfig.from_pretrained(folder))
    assert keys["general.file_type"] == {"float16": 1, "bfloat16": 32, "q8_0": 7}[dtype]
    for name, found in tensors.items():
        if found.dim() == 1:
            assert types[name] == "F32" and torch.equal(found, whole[name])
        elif dtype == "q8_0":
            largest = whole[name].reshape(-1, 32).abs().amax(-1, keepdim=True)  # a block of 32 has 127 steps each way
            error = (found - whole[name]).reshape(-1, 32).abs()
            assert types[name] == "Q8_0" and (error <= largest * (0.5 / 127 + 2.0**-11)).all()
            assert error.max() > 0
        else:
            assert torch.equal(found, whole[name].to(getattr(torch, dtype)).float())
    assert {row["type"] for row in report.tensors} == set(types.values())


def test_rows_that_blocks_do_not_divide_are_float16(tmp_path):
    folder = ours(tmp_path / "ours", 6, **MPT)  # 48 wide, but 192 inside the MLP
    report = export(folder, tmp_path / "out", "gguf", dtype="q8_0")
    _, _, types = read_gguf(tmp_path / "out")
    assert types["blk.0.ffn_down.weight"] == "Q8_0" and types["blk.0.ffn_up.weight"] == "F16"
    assert any("no multiple of 32" in note for note in report.notes)


@pytest.mark.parametrize(("stored", "type_name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_the_type_that_is_stored_is_kept(stored, type_name, tmp_path):
    folder = ours(tmp_path / "ours", **MPT, dtype=stored)
    export(folder, tmp_path / "out", "gguf")
    tensors, _, types = read_gguf(tmp_path / "out")
    assert types["token_embd.weight"] == type_name
    assert torch.equal(tensors["token_embd.weight"], state(folder)["model.embed_tokens.weight"])


def test_missing_biases_are_zeros_and_factors_are_in_the_weights(tmp_path):
    fields = {**GATED, "norm_bias": False, "num_key_value_heads": 1, "embedding_scale": 14.0, "logit_scale": 0.25}
    folder = ours(tmp_path / "ours", **fields)
    report = export(folder, tmp_path / "out", "gguf")
    tensors, _, _ = read_gguf(tmp_path / "out")
    held = state(folder)
    embedding, layer = held["model.embed_tokens.weight"], "model.layers.1.self_attn."
    assert torch.equal(tensors["token_embd.weight"], embedding * 14)
    assert torch.equal(tensors["output.weight"], embedding * 0.25)
    queries = tensors["blk.1.attn_qkv.weight"][:48]
    assert torch.allclose(queries, held[layer + "q_proj.weight"] * 8**0.5, rtol=1e-6)  # jais divides by 8, not its root
    assert torch.equal(tensors["blk.1.attn_qkv.weight"][48:56], held[layer + "k_proj.weight"])
    padded = {row["target"] for row in report.tensors if row["fate"] == "padded"}
    biases = {name for name in tensors if name.endswith("bias")}
    assert padded == biases and "blk.1.ffn_gate.bias" in biases and not any(tensors[name].any() for name in biases)
    for words in ("attention_bias:", "norm_bias:", "embedding_scale=14.0", "logit_scale=0.25", "multiplied by 2.828"):
        assert any(words in note for note in report.notes)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (REFACT, "refact"),
        ({**REFACT, "num_hidden_layers": 40}, "baichuan"),
        ({**REFACT, "num_hidden_layers": 40, "head_dim": 16}, "refact"),
        ({**GATED, "norm_bias": False}, "jais"),  # Refact's own norm: llama.cpp's refact has the other one
        ({**MPT, "alibi": False}, "mpt"),
        ({**MPT, "alibi_slopes": [2.0 ** (-3 * i) for i in (1, 2, 3, 4, 0.5, 1.5)]}, "mpt"),
        ({**BLOOM, "alibi_slopes": torch.tensor([2.0**-i for i in (2, 4, 6, 8, 1, 3)]).tolist()}, "bloom"),
    ],
)
def test_the_architecture_that_computes_it_is_chosen(fields, named):
    config = AlibiConfig(num_attention_heads=6, hidden_size=48, **fields)
    assert choose_architecture(config).name == named


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({**MPT, "alibi_slopes": [0.3, 0.2, 0.1, 0.05, 0.04, 0.03]}, r"mpt cannot hold alibi_slopes=\[0.3, 0.2, 0.1"),
        (
            {**MPT, "alibi_slopes": torch.tensor([2.0 ** -(1.5 * i) for i in (1, 2, 3, 4, 0.5, 1.5)]).half().tolist()},
            r"alibi_bias_max only, and the nearest, 6, .* alibi_bias_max to 6 to accept",
        ),
        ({**MPT, "alibi_distance": "sqrt"}, "alibi_distance='sqrt'"),
        ({**MPT, "alibi_scaling": {"type": "linear", "train_seq_len": 64}}, "alibi_scaling="),
        ({**MPT, "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters="),
        ({**MPT, "alibi": False, "learned_positions": True}, "learned_positions=True"),
        ({**MPT, "sinusoidal_positions": True}, "sinusoidal_positions=True"),
        ({**MPT, "qk_norm": "full"}, "qk_norm='full'"),
        ({**MPT, "final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({**MPT, "head_dim": 16}, "mpt cannot hold head_dim=16"),
        ({**MPT, "clip_qkv": 2.0, "attention_scale": 0.1}, "attention_scale=0.1 with clip_qkv=2.0"),
        ({**MPT, "hidden_act": "relu"}, "hidden_act='relu'.*gelu"),
        ({**BLOOM, "alibi_bias_max": 4}, "bloom cannot hold alibi_bias_max=4: its graph computes alibi_bias_max=8"),
        ({**BLOOM, "residual_from_norm": True}, "residual_from_norm=True"),
        ({**BLOOM, "alibi_rounding": "bloom"}, "alibi_rounding='bloom'"),
        ({**REFACT, "mlp_bias": True}, "refact cannot hold mlp_bias=True"),
        ({**REFACT, "alibi": False}, "refact cannot hold alibi=False"),
        ({"norm_type": "rms_norm"}, "cannot hold this model"),
    ],
)
def test_what_no_architecture_computes_is_named_and_nothing_is_written(fields, named, tmp_path):
    folder = ours(tmp_path / "ours", num_hidden_layers=1, **fields)
    with pytest.raises(ConfigFieldError, match=named):
        export(folder, tmp_path / "out", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_other_refusals(tmp_path):
    folder = ours(tmp_path / "ours", **MPT)
    with pytest.raises(ConfigFieldError, match="dtype='int3'.*q8_0"):
        export(folder, tmp_path / "out", "gguf", dtype="int3")
    convert(falcon(tmp_path / "falcon"), tmp_path / "converted", verify=False)
    with pytest.raises(ConfigFieldError, match="alibi_slopes"):  # Falcon divides its bias by the root of the head width
        export(tmp_path / "converted", tmp_path / "out", "gguf")
    big = AlibiForCausalLM.from_pretrained(folder)
    big.model.embed_tokens.weight.data[0, 0] = 1e7
    big.model.norm.weight.data[0] = 1e7  # vectors stay float32
    big.save_pretrained(folder)
    for dtype in ("float16", "q8_0"):  # the latter's scales are float16
        with pytest.raises(TensorError, match=r"token_embd.weight has 1 values"):
            export(folder, tmp_path / "out", "gguf", dtype=dtype)
    assert not (tmp_path / "out").exists()


def byte_level(folder, *steps, normalizer=None):
    """A small byte-level BPE tokenizer with special and added tokens, one gap in its ids, and a chat template."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator(["the cat sat on the mat and that was that"] * 5, trainer)
    made.add_tokens(["<tool>"])
    if normalizer:
        made.normalizer = normalizer
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder)
    return made


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PLAIN_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("steps", "cut"),
    [
        ((BYTES,), "gpt-2"),
        ((pre_tokenizers.Digits(individual_digits=True), BYTES), "refact"),
        ((pre_tokenizers.Split(Regex(BLOOM_CUT), "isolated"), PLAIN_BYTES), "bloom"),
    ],
)
def test_the_tokenizer_is_written(steps, cut, tmp_path):
    folder = ours(tmp_path / "ours", **MPT, vocab_size=280, bos_token_id=0, eos_token_id=[1, 7])
    made = byte_level(folder, *steps)
    (folder / "LICENSE").write_text("terms")
    export(folder, tmp_path / "out", "gguf")
    _, keys, _ = read_gguf(tmp_path / "out")
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == cut
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    size = made.get_vocab_size()
    assert tokens[:size] == [made.id_to_token(i) for i in range(size)]
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, 280)]
    assert kinds[:2] == [3, 3] and kinds[tokens.index("<tool>")] == 4 and set(kinds[size:]) == {5}
    assert set(kinds[2 : size - 1]) == {1}
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert merges and keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert keys["tokenizer.ggml.add_bos_token"] is False and keys["tokenizer.chat_template"] == "{{ messages }}"
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"


def test_a_normaliser_that_llamacpp_leaves_out_is_said(tmp_path):
    folder = ours(tmp_path / "ours", **MPT, vocab_size=280)
    byte_level(folder, BYTES, normalizer=normalizers.NFC())
    assert any("NFC" in note for note in export(folder, tmp_path / "out", "gguf").notes)


def test_tokenizers_that_llamacpp_would_read_otherwise_are_refused(tmp_path):
    folder = tokenizer(ours(tmp_path / "ours", **MPT))
    with pytest.raises(CheckpointFileError, match="WordLevel tokenizer.*no-tokenizer"):
        export(folder, tmp_path / "out", "gguf")
    byte_level(folder, BYTES)
    with pytest.raises(CheckpointFileError, match=f"token 270, config.json says vocab_size={VOCAB}"):
        export(folder, tmp_path / "out", "gguf")
    export(folder, tmp_path / "out", "gguf", tokenizer=False)
    _, keys, _ = read_gguf(tmp_path / "out")
    assert keys["tokenizer.ggml.model"] == "none" and keys["mpt.vocab_size"] == VOCAB
    large = ours(tmp_path / "large", **MPT, vocab_size=300)
    byte_level(large, pre_tokenizers.Whitespace(), BYTES)
    with pytest.raises(CheckpointFileError, match="cuts text by"):
        export(large, tmp_path / "other", "gguf")
    byte_level(large, BYTES, normalizer=normalizers.Lowercase())
    with pytest.raises(CheckpointFileError, match="Lowercase"):
        export(large, tmp_path / "other", "gguf")
    (large / "tokenizer.json").unlink()
    with pytest.raises(CheckpointFileError, match=r"no tokenizer.json"):
        export(large, tmp_path / "other", "gguf")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("build", [bloom, mpt])
def test_what_came_from_a_family_goes_to_its_architecture(build, tmp_path):
    convert(build(tmp_path / "source", shards=2), tmp_path / "ours", verify=False)
    assert export(tmp_path / "ours", tmp_path / "out", "gguf").architecture == build.__name__
