"""What users of Transformers take for granted."""

import copy
import pickle
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from alibi_hf import AlibiForCausalLM, AlibiForSequenceClassification
from alibi_hf.model import modeling_alibi
from tests.model.cases import BACKENDS, assert_close, build, check, documents, expected
from tests.model.feeding import FEEDS, whole

CASE = "six"
TEXTS = documents(40, 23)


@pytest.fixture(params=["six", "twelve_grouped"])
def case(request: pytest.FixtureRequest) -> str:
    return request.param  # tied and not tied


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_vocabulary(tied: bool, tmp_path) -> None:
    model = build(CASE, torch.float32, tie_word_embeddings=tied)
    ids = TEXTS[0][None]
    before = model(ids).logits
    model.resize_token_embeddings(70, pad_to_multiple_of=64)
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == model.model.embed_tokens.weight.shape[0] == 128
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model(ids).logits[..., :61], before)
    loss = model(ids + 60, labels=ids + 60).loss  # the new rows
    assert loss.isfinite()
    model.save_pretrained(tmp_path)
    again = AlibiForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    model.resize_token_embeddings(61)
    assert_close(model(ids).logits, before, 1e-6)


def test_saving_and_loading(case: str, tmp_path) -> None:
    model = build(case, torch.float32)
    model.save_pretrained(tmp_path)
    for loaded in (AlibiForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(loaded) is AlibiForCausalLM
        assert loaded.config._attn_implementation == "sdpa"
        check(loaded, whole, case, TEXTS)
    for backend in BACKENDS:
        check(AlibiForCausalLM.from_pretrained(tmp_path, attn_implementation=backend), whole, case, TEXTS)
    assert AlibiForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    check(AlibiForCausalLM.from_pretrained(tmp_path, dtype=torch.float64), whole, case, TEXTS, 1e-6)
    _, info = AlibiForSequenceClassification.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}


@torch.no_grad()
@pytest.mark.parametrize("devices", ["auto", "disk"])
def test_device_map_and_disk_offload(case: str, devices: str, tmp_path) -> None:
    build(case, torch.float32).save_pretrained(tmp_path)
    layers = {"model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    around = {"model.embed_tokens": "cpu", "model.embed_norm": "cpu", "model.embed_dropout": "cpu"}
    device_map = {**layers, **around} if devices == "disk" else devices
    model = AlibiForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    for feed in ("whole", "left", "packed_positions", "tokens_dynamic"):
        check(model, FEEDS[feed], case, TEXTS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_for_training(backend: str) -> None:
    rates = {"attention_dropout": 0.3, "hidden_dropout": 0.2, "embedding_dropout": 0.1}
    model, ids = build(CASE, torch.float32, backend, **rates), TEXTS[0][None]
    check(model, whole, CASE, TEXTS)
    model.train()
    with torch.no_grad():
        if backend == "flex_attention":
            with pytest.raises(ValueError, match=r"no dropout, attention_dropout is 0\.3"):
                model(ids)
            return
        first, second = model(ids).logits, model(ids).logits
    assert first.isfinite().all() and (first - second).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_dropout_keeps_the_mean(backend: str) -> None:
    model = build("one_head", torch.float32, backend, attention_dropout=0.2).train()
    found: list[torch.Tensor] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda _module, _args, result: found.append(result[0]))
    model(TEXTS[1].expand(4000, -1))
    truth = expected("one_head", TEXTS[1]).attention[0]
    assert_close(found[0].mean(0), truth, 0.05)


def test_changing_the_backend_after_loading(case: str) -> None:
    model = build(case)
    for backend in (*BACKENDS, *reversed(BACKENDS)):
        model.set_attn_implementation(backend)
        assert model.config._attn_implementation == model.model.config._attn_implementation == backend
        check(model, whole, case, TEXTS)


@torch.no_grad()
def test_half_double_to(case: str) -> None:
    model = build(case, torch.float32)
    truth = expected(case, TEXTS[0]).logits
    for changed, bound in ((model.half(), 0.02), (model.bfloat16(), 0.1), (model.to(torch.float64), 0.1)):
        logits = changed(TEXTS[0][None]).logits[0]
        assert logits.dtype == changed.dtype
        assert_close(logits, truth, bound)
    check(build(case, torch.float32).double(), whole, case, TEXTS, 1e-6)
    assert not list(model.buffers())


@torch.no_grad()
def test_pickle_and_deepcopy(case: str) -> None:
    model = build(case)
    model(TEXTS[0][None])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(TEXTS[0][None]).logits, model(TEXTS[0][None]).logits)
        twin.set_attn_implementation("eager")
        assert model.config._attn_implementation == "sdpa"
        tied = twin.lm_head.weight is twin.model.embed_tokens.weight
        assert tied == twin.config.tie_word_embeddings
    outputs = pickle.loads(pickle.dumps(model(TEXTS[0][None])))
    assert outputs.past_key_values.get_seq_length() == 40


@torch.no_grad()
def test_logits_to_keep(case: str) -> None:
    model, ids = build(case), TEXTS[0][None]
    logits = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=0).logits, logits)
    assert_close(model(ids, logits_to_keep=5).logits, logits[:, -5:], 1e-12)
    kept = torch.tensor([3, 0, 39])
    assert_close(model(ids, logits_to_keep=kept).logits, logits[:, kept], 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_attentions_and_hidden_states_change_no_number(case: str, backend: str) -> None:
    model, ids = build(case, torch.float64, backend), TEXTS[0][None]
    plain, more = model(ids), model(ids, output_attentions=True, output_hidden_states=True)
    assert torch.equal(plain.logits, more.logits)
    assert plain.attentions is None and plain.hidden_states is None
    heads = model.config.num_attention_heads
    assert [weights.shape for weights in more.attentions] == [(1, heads, 40, 40)] * 2
    assert_close(more.attentions[0].sum(-1), torch.ones(1, heads, 40), 1e-12)
    assert [states.shape for states in more.hidden_states] == [(1, 40, 48)] * 3
    assert_close(more.hidden_states[-1][0], expected(case, TEXTS[0]).hidden, 1e-10)
    if backend == "eager":  # Transformers itself refuses the config's flag with any other backend
        model.config.output_attentions = True
        assert torch.equal(model(ids).attentions[1], more.attentions[1])


def test_one_notice_past_the_training_length(monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    modeling_alibi.logger.warning_once.cache_clear()
    monkeypatch.setattr(modeling_alibi.logger, "warning", notices.append)  # what warning_once hands on
    model = build(CASE, torch.float32)
    model(TEXTS[0][None, :32])
    assert not notices
    for _ in range(3):
        model(TEXTS[0][None])
    assert len(notices) == 1 and "past the training length of 32 tokens" in notices[0]


def tokenizer() -> Any:
    """Return a word-level tokenizer of the cases' vocabulary."""
    words = {"<pad>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 61)}}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", unk_token="<unk>", padding_side="left")


def test_text_generation_pipeline() -> None:
    model, words = build(CASE, torch.float32), tokenizer()
    prompts = ["w5 w9 w11", "w3 w8 w2 w40 w17 w21 w9"]
    write = pipeline("text-generation", model=model, tokenizer=words, device="cpu")
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "return_full_text": False}
    together = [result[0]["generated_text"] for result in write(prompts, batch_size=2, **options)]
    for prompt, found in zip(prompts, together, strict=True):
        assert found == write(prompt, **options)[0]["generated_text"]
        ids = words(prompt, return_tensors="pt").input_ids
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, min_new_tokens=40)
        assert found.split() == words.decode(written[0, ids.shape[1] :]).split()


class Watched(torch.nn.Module):
    """A layer that something was put around, as quantisers do to see what it is given."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.layer(*args, **kwargs)


@pytest.mark.parametrize("case", ["six", "capped"])  # the embedding is normed, or scaled
def test_a_wrapped_first_layer_is_given_the_same(case: str) -> None:
    model = build(case, backend="eager")
    model.model.layers[0] = Watched(model.model.layers[0])
    check(model, whole, case, TEXTS)
