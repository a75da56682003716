"""What would silently change the answer is refused by name: lengths that do not fit, labels that are no tokens, ..."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DataCollatorWithFlattening, DynamicCache

from alibi_hf import AlibiConfig, AlibiForCausalLM, AlibiForTokenClassification
from tests.model.cases import assert_close, build, documents
from tests.model.feeding import flattened


@pytest.mark.parametrize("length", [19, 21])
def test_position_ids_of_another_length(length: int) -> None:
    with pytest.raises(ValueError, match=rf"cover {length} tokens, the input has 20"):
        build("six")(documents(20)[0][None], position_ids=torch.arange(length)[None])


def test_a_mask_that_is_too_long() -> None:
    with pytest.raises(ValueError, match=r"covers 25 tokens.*0 \+ 20 = 20"):
        build("six")(documents(20)[0][None], attention_mask=torch.ones(1, 25))


def test_a_short_mask_in_a_compiled_model() -> None:
    model = torch.compile(build("six"), backend="eager")
    with pytest.raises(Exception, match="covers 15 tokens"):
        model(documents(20)[0][None], attention_mask=torch.ones(1, 15), use_cache=False)


@pytest.mark.parametrize("name", ["seq_idx", "cu_seq_lens_q"])
def test_documents_beside_a_cache_in_a_compiled_model(name: str) -> None:
    flat, model = flattened(documents(8, 12)), build("six")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(Exception, match="several documents"):
        compiled(flat["input_ids"], past_key_values=DynamicCache(config=model.config), **{name: flat[name]})


def flatten(*lengths: int) -> dict[str, torch.Tensor]:
    """Return the documents as Trainer gets them, in one row."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return collate([{"input_ids": torch.arange(1, length + 1).tolist()} for length in lengths])


def test_a_packed_batch_of_trainer_with_a_cache() -> None:
    model = build("six").train()
    with pytest.raises(ValueError, match="several documents in one row, but a cache was passed"):
        model(**flatten(8, 12), num_items_in_batch=18, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("length", [19, 21])
@pytest.mark.parametrize("head", [AlibiForCausalLM, AlibiForTokenClassification], ids=lambda head: head.__name__)
def test_labels_of_another_length(head: type, length: int, skip: bool) -> None:
    model, options = build("six", cls=head), {"skip_logits": skip} if head is AlibiForCausalLM else {}
    labels = torch.ones(1, length, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"labels have shape \(1, {length}\), the tokens \(1, 20\)"):
        model(documents(20)[0][None], labels=labels, **options)


def test_labels_of_all_rows_in_one_line() -> None:
    """Transformers would let the last token of each row predict the first one of the next."""
    ids = documents(20)[0].view(2, 10)
    with pytest.raises(ValueError, match=r"labels have shape \(20,\), the tokens \(2, 10\)"):
        build("six")(ids, labels=ids.flatten())


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_packed_batch_with_an_empty_document(empty: int) -> None:
    lengths = [8, 12]
    lengths.insert(empty, 0)
    with pytest.raises(ValueError, match=r"\(1, 21\), the tokens \(1, 20\).*document without tokens"):
        build("six")(**flatten(*lengths), num_items_in_batch=18)


def test_a_batch_without_tokens() -> None:
    with pytest.raises(ValueError, match=r"no tokens: its shape is \(1, 0\)"):
        build("six")(**flatten(0))


@torch.no_grad()
@pytest.mark.parametrize("bounds", [[0, 0, 8, 20], [0, 8, 8, 20], [0, 8, 20, 20]], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_a_document_of_no_tokens_is_none(backend: str, bounds: list[int]) -> None:
    model, flat = build("six", backend=backend), flatten(8, 12)
    given = {"cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32)}
    found = model(flat["input_ids"], **given).logits
    assert_close(found, model(flat["input_ids"], position_ids=flat["position_ids"]).logits, 1e-12)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ([0, 8, 19], "from 0 to 19, the input has 20 tokens"),
        ([0, 8, 21], "from 0 to 21, the input has 20 tokens"),
        ([8, 20], "from 8 to 20, the input has 20 tokens"),
        ([0, 12, 8, 20], "must not decrease, found 12 before 8"),
        ([], "from None to None, the input has 20 tokens"),
    ],
    ids=str,
)
def test_bounds_that_do_not_fit_the_tokens(bounds: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build("six")(documents(20)[0][None], cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32))


def test_seq_idx_of_another_length() -> None:
    with pytest.raises(ValueError, match="seq_idx covers 21 tokens, the input has 20"):
        build("six")(documents(20)[0][None], seq_idx=torch.zeros(1, 21, dtype=torch.int32))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("label", [61, -1])
def test_a_label_outside_the_vocabulary(label: int, skip: bool) -> None:
    ids = documents(20)[0][None]
    labels = ids.clone()
    labels[0, 7] = label
    with pytest.raises(ValueError, match=rf"label {label} is outside the vocabulary of 61 tokens"):
        build("six")(ids, labels=labels, skip_logits=skip)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_labels_that_are_no_token_ids(dtype: torch.dtype) -> None:
    ids = documents(20)[0][None]
    with pytest.raises(ValueError, match=f"labels are of {dtype}"):
        build("six")(ids, labels=ids.to(dtype), skip_logits=True)


def test_a_batch_without_labels_is_named(caplog: pytest.LogCaptureFixture) -> None:
    ids = documents(21)[0].view(3, 7)
    for labels in (torch.full((3, 7), -100), ids.masked_fill(torch.arange(7) > 0, -100)):  # no token predicts the first
        assert build("six")(ids, labels=labels).loss.isnan()
    assert "No token of a batch (3, 7) has a label other than -100 to predict" in caplog.text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alibi_rounding": "bloom", "alibi_slopes": [1.0] * 4}, "alibi_rounding"),
        ({"alibi_rounding": "falcon", "alibi_bias_max": 16}, "alibi_rounding"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"clip_qkv": -3.0}, "clip_qkv"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping"),
        ({"alibi_bias_max": float("nan")}, "alibi_bias_max"),
        ({"logit_scale": float("inf")}, "logit_scale"),
        ({"hidden_dropout": 2.0}, "hidden_dropout"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ],
    ids=str,
)
def test_config_values(fields: dict, words: str) -> None:
    with pytest.raises(StrictDataclassError, match=words):
        AlibiConfig(hidden_size=32, num_attention_heads=4, **fields)


def test_flash_attention_names_what_there_is() -> None:
    with pytest.raises(ValueError, match="flash_attention_2.*'sdpa'"):
        build("six").set_attn_implementation("flash_attention_2")


def test_torch_jit_trace() -> None:
    model, ids = build("six", torch.float32).requires_grad_(False), documents(20)[0][None]
    model.config.use_cache = False
    traced = torch.jit.trace(lambda tokens: model(tokens).logits, ids, check_trace=False)
    assert torch.allclose(traced(ids), model(ids).logits, atol=1e-5)
