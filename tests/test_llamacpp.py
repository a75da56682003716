"""llama.cpp, an inference engine of its own in C++, reads our GGUF files: its logits must be ours.

Its GELU is a table of float16 values of the tanh form; our model is run with the same function beside its own, so that
what is left is float32's rounding and a bias that is wrong by one part in a hundred cannot hide behind the table.
"""

import pytest
import torch
from torch.nn import functional as F

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which is compiled: make test-llamacpp")
pytest.importorskip("gguf")

from transformers import AutoTokenizer

from alibi_hf import AlibiForCausalLM, convert, export
from tests.builders import VOCAB
from tests.checkpoints.exporting import BLOOM, GATED, MPT, REFACT, bend_bias, ours

CHECKPOINT = "examples/checkpoints/sotu-{}"
LIMIT = 1e-3  # rms of the differences as a share of the logits' rms
SAME_ACTIVATION = 1e-4
TOKENS = 300
BIASES = ("attention_bias", "attention_out_bias", "mlp_bias")
# By the architecture that has to be chosen; heads, then fields of the config.
MODELS = {
    "bloom": (6, BLOOM),
    "bloom without biases": (12, {**BLOOM, "attention_bias": False, "norm_bias": False, "tie_word_embeddings": False}),
    "bloom with fewer keys": (6, {**BLOOM, "num_key_value_heads": 2, "intermediate_size": 96}),
    "mpt": (12, MPT),
    "mpt with biases and clamps": (6, {"clip_qkv": 1.5, "alibi_bias_max": 16, **dict.fromkeys(BIASES, True)}),
    "mpt with one key head": (12, {**MPT, "num_key_value_heads": 1}),
    "mpt with scales": (6, {**MPT, "attention_scale": 0.2, "logit_scale": 0.5, "embedding_scale": 3.0}),
    "mpt with one head": (1, MPT),
    "mpt with forty heads": (40, {**MPT, "num_hidden_layers": 1}),
    "jais": (6, {**GATED, "attention_scale": 1 / 8, "embedding_scale": 14.6, "logit_scale": 0.1, "mlp_bias": True}),
    "jais for refact's norm": (12, {**GATED, "norm_bias": False, "num_key_value_heads": 1}),
    "refact": (12, {**REFACT, "num_key_value_heads": 1, "head_dim": 16}),
    "baichuan": (1, {**REFACT, "num_hidden_layers": 40, "tie_word_embeddings": False}),
}


def outside_logits(folder, tokens):
    """llama.cpp's logits `[tokens, vocab]`, with keys and values kept in float32."""
    model = llama_cpp.Llama(
        model_path=str(next(folder.glob("*.gguf"))),
        n_ctx=len(tokens) + 4,
        n_batch=512,
        n_ubatch=512,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        flash_attn=False,  # it rounds keys, values and distances to float16
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    model.eval(tokens)
    logits = torch.from_numpy(model.scores[: len(tokens)].copy())
    model.close()
    return logits


class TableGelu(torch.nn.Module):
    """ggml's GELU: the tanh form of a float16, in float16; the identity or zero far out."""

    def forward(self, x):
        inner = F.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, inner))


def inside_logits(folder, tokens, same_activation=False, **fields):
    """Our logits `[tokens, vocab]`, with our GELU or with ggml's."""
    model = AlibiForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **fields).eval()
    if same_activation and "gelu" in model.config.hidden_act:
        for layer in model.model.layers:
            layer.mlp.act_fn = TableGelu()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def error(first, second):
    """Rms of the differences as a share of the rms."""
    return float((first.double() - second).square().mean().sqrt() / second.double().square().mean().sqrt())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_llamacpps_and_a_wrong_bias_is_not(name, tmp_path, monkeypatch):
    heads, fields = MODELS[name]
    folder = ours(tmp_path / "ours", heads, **fields)
    report = export(folder, tmp_path / "out", "gguf")
    assert report.architecture == name.split()[0]
    tokens = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    theirs = outside_logits(tmp_path / "out", tokens)
    assert error(inside_logits(folder, tokens), theirs) < LIMIT
    assert error(inside_logits(folder, tokens, same_activation=True), theirs) < SAME_ACTIVATION
    wrong = [2.0 ** (-8.1 * (head + 1) / heads) for head in range(heads)]  # another maximum, no step at powers of two
    assert error(inside_logits(folder, tokens, alibi_slopes=wrong), theirs) > (LIMIT if heads > 1 else SAME_ACTIVATION)
    for factor in (0.0, 1.01):
        with monkeypatch.context() as patched:
            bend_bias(patched, factor)
            assert error(inside_logits(folder, tokens, same_activation=True), theirs) > 2 * SAME_ACTIVATION


@pytest.mark.parametrize("family", ["bloom", "mpt"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", LIMIT), ("bfloat16", 2e-2), ("q8_0", 2e-2)])
def test_trained_checkpoints(family, dtype, limit, tmp_path, monkeypatch):
    convert(CHECKPOINT.format(family), tmp_path / "ours", verify=False)
    export(tmp_path / "ours", tmp_path / "out", "gguf", dtype=dtype)
    text = "We have every right to dream heroic dreams. " * 30
    tokens = AutoTokenizer.from_pretrained(tmp_path / "ours")(text)["input_ids"][:TOKENS]
    theirs = outside_logits(tmp_path / "out", tokens)
    assert error(inside_logits(tmp_path / "ours", tokens), theirs) < limit
    if dtype == "float32":
        assert error(inside_logits(tmp_path / "ours", tokens, same_activation=True), theirs) < SAME_ACTIVATION
        bend_bias(monkeypatch, 1.01)
        assert error(inside_logits(tmp_path / "ours", tokens, same_activation=True), theirs) > 2 * SAME_ACTIVATION


def test_text_becomes_the_same_tokens(tmp_path):
    convert(CHECKPOINT.format("mpt"), tmp_path / "ours", verify=False)
    export(tmp_path / "ours", tmp_path / "out", "gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    model = llama_cpp.Llama(model_path=str(next((tmp_path / "out").glob("*.gguf"))), n_ctx=64, verbose=False)
    for text in ("My fellow Americans,  we've 1234 reasons\n\n\tto hope — naïve or not. ", "</s>a<pad> b"):
        wanted = tokenizer(text)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=True, special=True) == wanted
    assert model.token_bos() == tokenizer.bos_token_id and model.token_eos() == tokenizer.eos_token_id
    model.close()
