"""Sequence and token classification, question answering and the bare decoder."""

import pytest
import torch
from torch.nn import functional

from alibi_hf import (
    AlibiForCausalLM,
    AlibiForQuestionAnswering,
    AlibiForSequenceClassification,
    AlibiForTokenClassification,
    AlibiModel,
)
from tests.model.cases import BACKENDS, assert_close, build, documents, expected
from tests.model.feeding import pad

CASE, LABELS = "six", {"num_labels": 3}
TEXTS = documents(12, 20, 1, 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bare_decoder_gives_the_hidden_states(backend: str) -> None:
    model = AlibiModel(build(CASE).config).double().eval()
    model.load_state_dict(build(CASE).model.state_dict())
    model.set_attn_implementation(backend)
    with torch.no_grad():
        for text in TEXTS:
            assert_close(model(text[None]).last_hidden_state[0], expected(CASE, text).hidden, 1e-10)


@torch.no_grad()
@pytest.mark.parametrize(
    ("side", "given"),
    [(side, given) for side in ("left", "right", "interior") for given in ("mask and pad id", "mask")]
    + [("right", "pad id")],  # without a mask, padding before a token would be read as text
)
def test_sequence_classification_reads_the_last_token(side: str, given: str) -> None:
    model = build(CASE, cls=AlibiForSequenceClassification, **LABELS)
    alone = torch.cat([model(text[None]).logits for text in TEXTS])
    assert alone.shape == (4, 3)
    ids, mask = pad(TEXTS, side)
    if given == "mask":
        model.config.pad_token_id = None
    found = model(ids, attention_mask=None if given == "pad id" else mask).logits
    assert_close(found, alone, 1e-10)
    if given != "pad id":
        embeds = model.get_input_embeddings()(ids)
        assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, alone, 1e-10)


@torch.no_grad()
def test_sequence_classification_says_when_it_cannot_know_the_last_token() -> None:
    model = build(CASE, cls=AlibiForSequenceClassification, pad_token_id=None, **LABELS)
    ids, _ = pad(TEXTS, "right")
    with pytest.raises(ValueError, match="4 rows.*pass attention_mask, or set"):
        model(ids)
    assert model(ids[:1]).logits.shape == (1, 3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("labels", "settings"),
    [
        (torch.tensor([0, 2, 1, 1]), LABELS),
        (torch.randn(4, dtype=torch.float64), {"num_labels": 1}),
        (torch.eye(3)[[0, 2, 1, 1]].double(), {**LABELS, "problem_type": "multi_label_classification"}),
    ],
    ids=["single label", "regression", "multi label"],
)
def test_sequence_classification_losses(labels: torch.Tensor, settings: dict) -> None:
    model = build(CASE, cls=AlibiForSequenceClassification, **settings)
    ids, mask = pad(TEXTS, "left")
    outputs = model(ids, attention_mask=mask, labels=labels)
    if "problem_type" in settings:
        truth = functional.binary_cross_entropy_with_logits(outputs.logits, labels)
    elif settings["num_labels"] == 1:
        truth = functional.mse_loss(outputs.logits[:, 0], labels)
    else:
        truth = functional.cross_entropy(outputs.logits, labels)
    torch.testing.assert_close(outputs.loss, truth)


@torch.no_grad()
def test_token_classification() -> None:
    model = build(CASE, cls=AlibiForTokenClassification, **LABELS)
    ids, mask = pad(TEXTS, "left")
    labels = (ids % 3).masked_fill(mask == 0, -100)
    outputs = model(ids, attention_mask=mask, labels=labels)
    for row, text in enumerate(TEXTS):
        assert_close(outputs.logits[row, mask[row].bool()], model(text[None]).logits[0], 1e-10)
    torch.testing.assert_close(
        outputs.loss.double(), functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    )


@torch.no_grad()
def test_question_answering() -> None:
    model = build(CASE, cls=AlibiForQuestionAnswering)
    ids, mask = pad(TEXTS, "left")
    start, end = torch.tensor([20, 9, 24, 23]), torch.tensor([23, 12, 24, 24])
    outputs = model(ids, attention_mask=mask, start_positions=start, end_positions=end)
    for row, text in enumerate(TEXTS):
        alone = model(text[None])
        assert_close(outputs.start_logits[row, mask[row].bool()], alone.start_logits[0], 1e-10)
        assert_close(outputs.end_logits[row, mask[row].bool()], alone.end_logits[0], 1e-10)
    truth = functional.cross_entropy(outputs.start_logits, start) + functional.cross_entropy(outputs.end_logits, end)
    torch.testing.assert_close(outputs.loss, truth / 2)


@torch.no_grad()
def test_language_modelling_loss() -> None:
    model = build(CASE)
    ids, mask = pad(TEXTS, "right")
    labels = ids.masked_fill(mask == 0, -100)
    outputs = model(ids, attention_mask=mask, labels=labels)
    logits, target = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    truth = functional.cross_entropy(logits, target)
    torch.testing.assert_close(outputs.loss.double(), truth, rtol=1e-6, atol=0)
    summed = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=7).loss
    counted = (target != -100).sum()
    torch.testing.assert_close(summed.double(), truth * counted / 7, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "cls",
    [
        AlibiModel,
        AlibiForCausalLM,
        AlibiForSequenceClassification,
        AlibiForTokenClassification,
        AlibiForQuestionAnswering,
    ],
)
@torch.no_grad()
def test_tuples_attentions_and_hidden_states(cls: type) -> None:
    model, ids = build(CASE, cls=cls), TEXTS[0][None]
    plain = model(ids, use_cache=False)
    more = model(ids, use_cache=False, output_attentions=True, output_hidden_states=True)
    assert len(more.attentions) == 2 and len(more.hidden_states) == 3
    first = (
        "start_logits" if cls is AlibiForQuestionAnswering else "last_hidden_state" if cls is AlibiModel else "logits"
    )
    assert torch.equal(plain[first], more[first])
    assert torch.equal(model(ids, use_cache=False, return_dict=False)[0], plain[first])


def test_neither_or_both_inputs_are_refused() -> None:
    model, ids = build(CASE), TEXTS[0][None]
    for given in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**given)
