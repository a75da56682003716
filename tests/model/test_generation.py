"""`generate` and `generate_batch`: every strategy, cache and backend writes what one plain greedy loop writes."""

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from tests.model.cases import BACKENDS, build, documents, expected
from tests.model.feeding import pad

CASE, LENGTHS, NEW = "twelve_grouped", (25, 40, 9), 14  # 40 + 14 tokens pass the training length of 32
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(CASE, torch.float32, request.param)


@pytest.fixture(scope="module")
def greedy() -> list[list[int]]:
    """Return what follows each prompt, from a loop that reads everything again for every token."""
    model, results = build(CASE, torch.float64, "eager"), []
    for text in documents(*LENGTHS):
        ids = text[None]
        for _ in range(NEW):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        results.append(ids[0, len(text) :].tolist())
    assert len({tuple(tokens) for tokens in results}) == len(LENGTHS)
    assert all(len(set(tokens)) > 3 for tokens in results)
    return results


def continuation(model: Any, text: torch.Tensor, **options: Any) -> list[int]:
    """Return the tokens that `generate` writes after one prompt."""
    written = model.generate(text[None], attention_mask=torch.ones_like(text)[None], **{**GREEDY, **options})
    return written[0, len(text) :].tolist()


def test_the_reference_agrees_with_the_first_token(greedy: list[list[int]]) -> None:
    for text, tokens in zip(documents(*LENGTHS), greedy, strict=True):
        assert expected(CASE, text).logits[-1].argmax().item() == tokens[0]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_greedy(model: Any, greedy: list[list[int]], options: dict[str, Any]) -> None:
    # a static cache would be compiled on a GPU; on CPU generate leaves it alone
    for text, tokens in zip(documents(*LENGTHS), greedy, strict=True):
        assert continuation(model, text, **options) == tokens


@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padded_batch(model: Any, greedy: list[list[int]], cache: str | None) -> None:
    ids, mask = pad(documents(*LENGTHS), "left")
    written = model.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY)
    assert written[:, ids.shape[1] :].tolist() == greedy


def test_prefill_in_chunks(model: Any, greedy: list[list[int]]) -> None:
    assert continuation(model, documents(*LENGTHS)[1], prefill_chunk_size=7) == greedy[1]


def test_continuing_from_a_cache(model: Any, greedy: list[list[int]]) -> None:
    text = documents(*LENGTHS)[1]
    six = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    first = model.generate(text[None], attention_mask=torch.ones(1, 40), return_dict_in_generate=True, **six)
    ids = first.sequences
    rest = {"max_new_tokens": NEW - 6, "min_new_tokens": NEW - 6, "do_sample": False}
    written = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **rest)
    assert written[0, 40:].tolist() == greedy[1]


def test_beam_search(model: Any) -> None:
    ids, mask = pad(documents(*LENGTHS), "left")
    options = {**GREEDY, "num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "num_return_sequences": 2}
    written = model.generate(ids, attention_mask=mask, **options)
    eager = build(CASE, torch.float64, "eager")
    assert torch.equal(written, eager.generate(ids, attention_mask=mask, use_cache=False, **options))
    for row, text in enumerate(documents(*LENGTHS)):
        alone = eager.generate(text[None], attention_mask=torch.ones_like(text)[None], **options)
        assert torch.equal(alone[:, -6:], written[2 * row : 2 * row + 2, -6:])


def test_assisted_and_prompt_lookup(model: Any, greedy: list[list[int]]) -> None:
    other = build(CASE, torch.float32)  # an assistant that is often wrong, so that the cache is cropped
    with torch.no_grad():
        other.model.norm.weight += 0.4 * torch.randn_like(other.model.norm.weight)
    for text, tokens in zip(documents(*LENGTHS), greedy, strict=True):
        assert continuation(model, text, assistant_model=copy.deepcopy(model)) == tokens
        assert continuation(model, text, assistant_model=other) == tokens
        assert continuation(model, text, prompt_lookup_num_tokens=3) == tokens


def test_from_embeddings(model: Any, greedy: list[list[int]]) -> None:
    ids, mask = pad(documents(*LENGTHS), "left")
    embeds = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY).tolist() == greedy


def test_sampling_several_sequences(model: Any) -> None:
    ids, mask = pad(documents(*LENGTHS), "left")
    options = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 5, "min_new_tokens": 5}
    torch.manual_seed(3)
    written = model.generate(ids, attention_mask=mask, **options)
    assert written.shape == (12, ids.shape[1] + 5)
    assert len({tuple(row.tolist()) for row in written}) > 6
    eager = build(CASE, torch.float32, "eager")
    torch.manual_seed(3)
    again = eager.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(written, again)


def generate_batch(model: Any, texts: list[torch.Tensor], tokens_at_once: int) -> list[list[int]]:
    """Return what continuous batching writes after each prompt, from a paged cache of a few blocks."""
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=tokens_at_once)
    outputs = model.generate_batch(
        [text.tolist() for text in texts],
        generation_config=settings,
        continuous_batching_config=small,
        progress_bar=False,
    )
    found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [found[tuple(text.tolist())] for text in texts]


@pytest.mark.parametrize("tokens_at_once", [128, 16])  # 16: prompts are read in pieces, beside others that write
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_generate_batch(backend: str, tokens_at_once: int, greedy: list[list[int]]) -> None:
    model, texts = build(CASE, torch.float32, backend), documents(*LENGTHS)
    assert generate_batch(model, texts, tokens_at_once) == greedy
    assert model.config._attn_implementation == backend
    assert continuation(model, texts[0]) == greedy[0]  # the model is as it was


@pytest.mark.parametrize("case", ["sqrt", "capped", "multi_query", "no_alibi"])
def test_generate_batch_of_other_shapes(case: str) -> None:
    model, texts = build(case, torch.float32, "eager"), documents(*LENGTHS)
    assert generate_batch(model, texts, 32) == [continuation(model, text) for text in texts]


def test_far_past_the_training_length() -> None:
    for backend in ("eager", "sdpa"):
        model = build("two_heads", torch.float32, backend, max_position_embeddings=8)
        written = model.generate(documents(5)[0][None], max_new_tokens=300, min_new_tokens=300, do_sample=False)
        with torch.no_grad():
            again = build("two_heads", torch.float64, "eager")(written).logits[0, 4:-1].argmax(-1)
        assert torch.equal(again, written[0, 5:])
