"""The loss of every token, under many classes of model, against their own logits in float64."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from alibi_hf import AlibiError
from alibi_hf.evaluation import losses as module
from alibi_hf.evaluation.losses import LossReader
from tests.builders import fill
from tests.model.cases import build, documents, expected

VOCAB = 61
TEXT = documents(120)[0]
LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
    "mpt": lambda: MptForCausalLM(MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=128)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=128, n_embd=32, n_layer=2, n_head=4)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    ),
    "soft cap (gemma2)": lambda: Gemma2ForCausalLM(Gemma2Config(**LLAMA_LIKE, final_logit_softcapping=2.0)),
    "scaled (cohere)": lambda: CohereForCausalLM(CohereConfig(**LLAMA_LIKE, logit_scale=0.3)),
    "divided (granite)": lambda: GraniteForCausalLM(GraniteConfig(**LLAMA_LIKE, logits_scaling=4.0)),
    "ours": lambda: build("multi_query"),
    "ours, capped": lambda: build("capped", backend="eager"),
}


def in_float64(name: str) -> nn.Module:
    model = MODELS[name]()
    return (model if name.startswith("ours") else fill(model)).double().eval()


def by_hand(model: nn.Module, ids: torch.Tensor, first: int) -> torch.Tensor:
    """The losses from the logits of the whole window, [windows, tokens - first]."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
    found = [
        [-logits[row, at - 1].log_softmax(-1)[ids[row, at]] for at in range(first, ids.shape[1])]
        for row in range(len(ids))
    ]
    return torch.tensor(found)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few tokens, and how many tokens each call of the head saw."""
    monkeypatch.setattr(module, "CHUNK_ROWS", 10)
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", [1, 33])
def test_they_are_those_of_the_models_own_logits(name: str, first: int, small_chunks: None) -> None:
    model = in_float64(name)
    reader = LossReader(model, TEXT)
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *call: rows.append(call[1][0].shape[:2].numel()))
    ids = TEXT.view(2, 60)
    found = reader.losses(ids, first)
    assert reader.decoder is not None and not reader.notes
    assert max(rows) <= 10 and sum(rows) == 2 * (60 - first)
    assert found.dtype == torch.float64
    assert torch.allclose(found, by_hand(model, ids, first), rtol=1e-9, atol=1e-9)
    assert "forward" not in vars(reader.decoder)


def test_ours_are_those_of_the_reference_past_the_training_length(small_chunks: None) -> None:
    logits = expected("six", TEXT).logits.double()
    truth = nn.functional.cross_entropy(logits[:-1], TEXT[1:], reduction="none")
    found = LossReader(build("six"), TEXT).losses(TEXT[None], 1)[0]
    assert torch.allclose(found, truth, rtol=0, atol=1e-8)
    for wrong in ({"alibi": False}, {"alibi_bias_max": 4}, {"alibi_distance": "sqrt"}):
        found = LossReader(build("six", **wrong), TEXT).losses(TEXT[None], 1)[0]
        assert (found - truth).abs()[40:].max() > 1e-3, wrong


def test_a_config_may_call_the_vocabulary_by_another_name() -> None:
    model = in_float64("llama")
    del model.config.vocab_size
    assert torch.allclose(LossReader(model, TEXT).losses(TEXT[None], 1), by_hand(model, TEXT[None], 1), atol=1e-9)


def test_a_class_that_does_more_is_read_with_whole_logits() -> None:
    class Shifted(LlamaForCausalLM):
        """Its logits depend on how many tokens there are."""

        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = found.logits * (1 + torch.arange(found.logits.shape[1])[None, :, None] / 9)
            return found

    model = fill(Shifted(LlamaConfig(**LLAMA_LIKE))).double()
    reader = LossReader(model, TEXT)
    assert reader.decoder is None and "Shifted" in reader.notes[0]
    assert torch.allclose(reader.losses(TEXT[None], 5), by_hand(model, TEXT[None], 5), atol=1e-9)


def test_a_model_that_sees_the_future_is_refused() -> None:
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(AlibiError, match="BertLMHeadModel is not causal"):
        LossReader(fill(BertLMHeadModel(config)), TEXT)


def test_the_models_own_error_is_raised_and_the_model_left_as_it_was() -> None:
    model = in_float64("gpt2")
    reader = LossReader(model, TEXT)
    with pytest.raises(IndexError):
        reader.losses(TEXT.repeat(2)[None], 1)
    assert torch.allclose(reader.losses(TEXT[None], 1), by_hand(model, TEXT[None], 1), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_summed_in_float32_at_least(dtype: torch.dtype) -> None:
    model = fill(LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE))).to(dtype)
    found = LossReader(model, TEXT).losses(TEXT[None], 1)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), by_hand(model, TEXT[None], 1), atol=1e-5 if dtype == torch.float32 else 0.05)
