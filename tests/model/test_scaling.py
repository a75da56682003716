"""`alibi_scaling`: slopes divided by a factor, or by the length of each text, however it is fed and in every backend.

Documents are shorter than `TRAINED`, as long, and longer; in float64 each must give what the plain decoder gives for it
alone, read in the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from alibi_hf.model import bias_alibi, dense_alibi, positions_alibi, scaling_alibi, segments_alibi, tiles_alibi
from alibi_hf.model.bias_alibi import Distances
from tests.model.cases import ALL_BIASES, BACKENDS, CASES, MISTRAL, assert_close, build, check, documents, expected
from tests.model.feeding import FEEDS, PIECES, calls_of, pad
from tests.model.test_flash import package, sixteen_bits  # noqa: F401  a stand-in for flash_attn
from tests.model.test_generation import continuation, generate_batch
from tests.model.training import check_gradients

TRAINED = 16
BY_LENGTH = {"alibi_scaling": {"type": "linear", "train_seq_len": TRAINED}}
SIX = {"num_attention_heads": 6, "hidden_size": 48, **ALL_BIASES}
GROUPED = {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 48, "head_dim": 8, **MISTRAL}
SCALED: dict[str, dict[str, Any]] = {
    "six_by_length": {**SIX, **BY_LENGTH},
    "grouped_by_length": {**GROUPED, **BY_LENGTH},
    "six_by_factor": {**SIX, "alibi_scaling": {"type": "linear", "factor": 1.75}},
}
CASE = "grouped_by_length"
LENGTHS = (23, 1, 16, 17)
# Without a mask, what fills a row up counts as its text.
AT_ONCE = (
    "whole",
    "left",
    "right",
    "interior",
    "packed_positions",
    "packed_seq_idx",
    "packed_cu_seq_lens",
    "packed_with_a_mask_of_ones",
    "packed_rows",
    "packed_and_padded",
    "mask_4d_bool",
    "mask_4d_minimum",
)


@pytest.fixture(autouse=True)
def _cases(monkeypatch: pytest.MonkeyPatch) -> None:
    for case, fields in SCALED.items():
        monkeypatch.setitem(CASES, case, fields)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let short documents cross chunks."""
    for module in (dense_alibi, tiles_alibi):
        monkeypatch.setattr(module, "CHUNK", 16)


@pytest.fixture(params=[*BACKENDS, "blocks", "flash_attention_2"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend; "blocks" is sdpa with a materialised bias, "flash_attention_2" the stand-in."""
    if request.param == "flash_attention_2":
        request.getfixturevalue("package")
    if request.param == "blocks":
        monkeypatch.setattr(segments_alibi, "MIN_QUERIES", 1000)
        return "sdpa"
    return request.param


def check_fed(model: Any, feed: str, case: str, *lengths: int) -> None:
    """Assert that documents, fed in one way, give what the plain decoder gives for each, read in the same calls."""
    name = model.config._attn_implementation
    if feed.startswith("mask_4d") and name == "flash_attention_2":
        pytest.skip("refused by name")
    if feed in PIECES and feed != "chunks_static" and name == "flex_attention":
        pytest.skip("uncompiled, it decodes slowly; chunks of one token do")
    texts = documents(*lengths)
    check(model, FEEDS[feed], case, texts, calls=calls_of(feed, texts))


@pytest.mark.parametrize("feed", [*AT_ONCE, *PIECES])
def test_each_text_is_scaled_by_its_own_length(feed: str, backend: str, chunks: None) -> None:
    check_fed(build(CASE, torch.float64, backend), feed, CASE, *LENGTHS)


@pytest.mark.parametrize("feed", ["whole", "chunks_static", "left", "packed_positions"])
def test_a_factor(feed: str, backend: str, chunks: None) -> None:
    check_fed(build("six_by_factor", torch.float64, backend), feed, "six_by_factor", 23, 17)


@pytest.mark.parametrize("feed", ["whole", "left", "packed_and_padded", "mask_4d_bool"])
@pytest.mark.parametrize("name", BACKENDS)
def test_in_float32_and_past_a_chunk(feed: str, name: str) -> None:
    check_fed(build(CASE, torch.float32, name), feed, CASE, 300, 257, 12)


@pytest.mark.parametrize("pieces", [(8, 8), (1,) * 16, (9, 1, 7)])
def test_what_the_calls_are_matters_past_the_training_length(pieces: tuple[int, ...]) -> None:
    document = documents(sum(pieces))[0]
    whole, read_on = (expected(CASE, document, calls=calls).logits for calls in ((), pieces))
    assert torch.equal(whole, read_on) == (len(document) <= TRAINED)


SCALED_SLOPES, TEXT_LENGTHS = bias_alibi.scaled_slopes, scaling_alibi.text_lengths


def undivided(config: Any, length: Any, *args: Any) -> torch.Tensor:
    """Divide by one, whatever the length."""
    return SCALED_SLOPES(config, torch.as_tensor(length) * 0 + 1, *args)


def multiplied(config: Any, *args: Any) -> torch.Tensor:
    """Multiply where the slopes should be divided."""
    return undivided(config, *args) ** 2 / SCALED_SLOPES(config, *args)


def divided_below_too(config: Any, length: Any, *args: Any) -> torch.Tensor:
    """Divide by less than one where the text is shorter than the training length."""
    return SCALED_SLOPES(config, length, *args) * TRAINED / torch.as_tensor(length).clamp(max=TRAINED)


def length_of_the_call(distances: Distances) -> torch.Tensor | None:
    """Divide by the key length of the call, as upstream does, padding and neighbours included."""
    return None


def longest_of_the_call(distances: Distances) -> torch.Tensor | None:
    """Divide by the length of the longest text of the call."""
    lengths = TEXT_LENGTHS(distances)
    return None if lengths is None else lengths.amax().expand(1, 1, 1)


def one_token_short(distances: Distances) -> torch.Tensor | None:
    """Count one token of each text too few."""
    lengths = TEXT_LENGTHS(distances)
    return None if lengths is None else lengths - 1


# What is wrong, and the ways of feeding that must show it.
MUTATIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    undivided: ("whole", "tokens_dynamic", "left", "left_dynamic", "packed_positions"),
    multiplied: ("whole", "tokens_static", "left_static", "packed_seq_idx"),
    divided_below_too: ("whole", "left", "left_dynamic", "packed_rows"),
    length_of_the_call: ("left", "interior", "left_dynamic", "packed_positions", "packed_and_padded", "mask_4d_bool"),
    longest_of_the_call: ("left", "right", "left_static", "packed_cu_seq_lens", "mask_4d_bool"),
    one_token_short: ("left", "interior_dynamic", "packed_rows", "mask_4d_minimum"),
}


@pytest.mark.parametrize(("wrong", "feed"), [(wrong, feed) for wrong in MUTATIONS for feed in MUTATIONS[wrong]])
def test_a_wrong_scale_fails_the_check(
    wrong: Callable[..., Any], feed: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "scaled_slopes" if wrong in (undivided, multiplied, divided_below_too) else "text_lengths"
    monkeypatch.setattr(positions_alibi, name, wrong)
    model = build("six_by_length", torch.float64, backend)
    with pytest.raises(AssertionError, match="of the largest value"):
        check_fed(model, feed, "six_by_length", 9, 23, 17)


@pytest.mark.parametrize("feed", ["no_cache", "left", "packed_and_padded", "mask_4d_bool"])
@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2"])
def test_gradients(feed: str, name: str, request: pytest.FixtureRequest) -> None:
    if name == "flash_attention_2":
        request.getfixturevalue("package")
        feed = "packed_positions_no_cache" if feed == "mask_4d_bool" else feed
    check_gradients(build("six_by_length", torch.float64, name), FEEDS[feed], "six_by_length", documents(23, 40, 9))


GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
PROMPTS = (25, 9, 1)  # of which the second passes the training length as it is continued, and the last does not


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_batch_is_continued_as_each_prompt_alone(cache: str | None, backend: str) -> None:
    texts, model = documents(*PROMPTS), build(CASE, torch.float64, backend)
    ids, mask = pad(texts, "left")
    written = model.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY)[:, ids.shape[1] :].tolist()
    alone, plain = (build(CASE, torch.float64, "eager", **fields) for fields in ({}, {"alibi_scaling": None}))
    assert written == [continuation(alone, text, **GREEDY) for text in texts]
    assert written != [continuation(plain, text, **GREEDY) for text in texts]


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_continuous_batching_continues_each_prompt_as_alone(name: str) -> None:
    texts, model = documents(*PROMPTS), build(CASE, torch.float32, name)
    assert generate_batch(model, texts, 128) == [continuation(model, text) for text in texts]


@pytest.mark.parametrize("feed", ["left", "packed_positions", "left_dynamic", "mask_4d_bool"])
@pytest.mark.parametrize("name", BACKENDS)
def test_slopes_rounded_to_16_bits_are_divided_alike(name: str, feed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # It rounds in models of 16 bits only, where backends agree less than the bias differs.
    monkeypatch.setattr(positions_alibi, "bias_dtype", lambda *_: torch.bfloat16)
    texts = documents(17, 23, 9)
    calls = calls_of(feed, texts) or [[len(text)] for text in texts]
    alone = build(CASE, torch.float64, "eager", alibi_rounding="jais")
    with torch.no_grad():
        found = FEEDS[feed](build(CASE, torch.float64, name, alibi_rounding="jais"), texts)
        for logits, text, own in zip(found, texts, calls, strict=True):
            truth = read_alone(alone, text, own)
            assert_close(logits, truth, 1e-10)
            assert (truth - expected(CASE, text, calls=own).logits).abs().max() > 1e-7  # it does round


def read_alone(model: Any, text: torch.Tensor, calls: Sequence[int]) -> torch.Tensor:
    """Return the logits `[tokens, vocab]` of a text that is read in several calls."""
    cache = DynamicCache(config=model.config)
    return torch.cat([model(part[None], past_key_values=cache).logits[0] for part in text.split(list(calls))])


def distances_of(length: int, mask: list[int] | None = None, documents: list[int] | None = None) -> Distances:
    """Return the distances of a call with one row."""
    config = build("six_by_length").config
    given = [None if row is None else torch.tensor([row]) for row in (mask, documents)]
    embeds = torch.zeros(1, length, config.hidden_size)
    return positions_alibi.make_distances(config, embeds, given[0], None, given[1], None, 0)


def test_calls_in_which_no_text_can_be_too_long_keep_their_forms() -> None:
    assert distances_of(TRAINED, mask=[0] + [1] * (TRAINED - 1)).query_slopes is None
    assert distances_of(TRAINED, documents=[0] * 9 + [1] * (TRAINED - 9)).query_slopes is None
    assert distances_of(TRAINED + 1).by_index  # nor is a text alone, however long, anything but a function of distance


def test_slopes_of_each_query() -> None:
    made = distances_of(35, documents=[0] * 30 + [1] * 5)
    unscaled = bias_alibi.config_slopes(build("six_by_length").config)
    assert made.query_slopes is not None and not made.by_index
    assert torch.equal(made.query_slopes[0, :, 30:], unscaled[:, None].expand(-1, 5))
    assert torch.equal(made.query_slopes[0, :, :30], (unscaled / (30 / TRAINED))[:, None].expand(-1, 30))
    assert torch.equal(made.heads(2, 3).block(0, 35, 35)[0], made.block(0, 35, 35)[0][:, 2:5])  # of one rank


def test_masked_tokens_are_of_no_text() -> None:
    made = distances_of(44, mask=[1] * 20 + [0] * 4 + [1] * 20, documents=[0] * 20 + [1] * 24)
    lengths = scaling_alibi.text_lengths(made)
    assert lengths is not None and lengths.tolist() == [[[20] * 44]]


@pytest.mark.slow
@pytest.mark.parametrize("feed", ["no_cache", "left", "left_static", "packed_seq_idx"])
def test_compiled(feed: str) -> None:
    torch._dynamo.reset()
    model = build(CASE, torch.float64, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=feed == "no_cache", backend="eager")
    with torch.no_grad():
        for found, truth in zip(*(FEEDS[feed](each, documents(20, 31)) for each in (compiled, model)), strict=True):
            assert_close(found, truth, 1e-12)
