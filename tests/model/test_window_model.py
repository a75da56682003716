"""Whole models with windows shorter than the texts: every way of feeding gives the reference's answer."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from alibi_hf.model import dense_alibi, sdpa_alibi, segments_alibi, single_alibi, tiles_alibi, window_alibi
from alibi_hf.model.bias_alibi import Distances
from alibi_hf.model.cache_alibi import GrowingCache
from alibi_hf.model.tiles_alibi import Group
from tests.model import feeding
from tests.model.cases import ALL_BIASES, CASES, build, check, documents, expected
from tests.model.feeding import FEEDS, Feed, cached, packed, padded, padded_cached, whole

# Small scores, so that a window is little longer than the slope alone makes it, and a mistake in it shows.
STEEP = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "attention_scale": 0.05,
    "alibi_slopes": [8.0, 5.0, 6.0, 3.0, 0.5, 0.0],
}
WINDOWED = {"steep": STEEP, "steep_grouped": {**STEEP, "num_key_value_heads": 3, **ALL_BIASES}}
SCALED = {**STEEP, "num_key_value_heads": 3, "alibi_scaling": {"type": "linear", "train_seq_len": 16}}
TEXTS = (23, 40, 1, 17)
MASKED_FEEDS = ("mask_4d_bool", "mask_4d_infinity", "mask_4d_minimum")
# Static caches, and rows of a batch that have fewer tokens than a block.
DENSE_FEEDS = ("tokens_static", "chunks_static", "left_dynamic", "left_static", *MASKED_FEEDS)
DECODING_FEEDS = ("tokens_dynamic", "chunks_dynamic", "chunks_shifted_positions")
PADDED_TEXTS = (29, 40)  # of which a cache that holds the first 30 places, left-padded, has at least 4 tokens


left_padded = padded_cached("dynamic", "left", (30, 1))


@dataclasses.dataclass
class Work:
    """Pairs of query and key that attention planned to compute, and those it would compute without windows."""

    planned: int = 0
    dense: int = 0
    decoded: int = 0  # calls of decoding among them

    def add(self, groups: list[Group], queries: int, keys: int) -> None:
        """Count one call."""
        self.planned += sum(group.pairs(queries, keys) for group in groups)
        self.dense += Group(0, groups[-1].stop, keys).pairs(queries, keys)
        self.decoded += queries == 1 < keys


@pytest.fixture(autouse=True)
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Allow windows in texts of a few tokens, and count what they leave."""
    counted = Work()

    def counting(choose: Callable[..., Any]) -> Callable[..., Any]:
        def call(query: torch.Tensor, key: torch.Tensor, *args: Any) -> Any:
            result = choose(query, key, *args)
            groups = result if isinstance(result, list) else result[0]
            counted.add(groups, query.shape[2], key.shape[2])
            return result

        return call

    for module, name, value in (
        (window_alibi, "BLOCK", 4),
        (sdpa_alibi, "BLOCK", 4),
        (sdpa_alibi, "MIN_QUERIES", 1),
        (segments_alibi, "MIN_QUERIES", 2),
        (sdpa_alibi, "MIN_KEYS", 1),
        (sdpa_alibi, "JENSEN_KEYS", 1),
        (single_alibi, "JENSEN_KEYS", 1),
        (sdpa_alibi, "MAX_SHARE", math.inf),
        (sdpa_alibi, "MIN_SINGLE_KEYS", 1),
        (single_alibi, "CALL_KEYS", 0),
        (tiles_alibi, "CALL_PAIRS", 0),
        (tiles_alibi, "CHUNK", 4),
        (dense_alibi, "CHUNK", 16),
        (feeding, "DynamicCache", GrowingCache),  # plain ones keep no norms
        (sdpa_alibi, "choose_groups", counting(sdpa_alibi.choose_groups)),
        (single_alibi, "_plan", counting(single_alibi._plan)),
    ):
        monkeypatch.setattr(module, name, value)
    for case, fields in {**WINDOWED, "scaled": SCALED}.items():
        monkeypatch.setitem(CASES, case, fields)
    return counted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("case", WINDOWED)
def test_any_way_of_feeding(case: str, feed: str, dtype: torch.dtype, work: Work) -> None:
    check(build(case, dtype), FEEDS[feed], case, documents(*TEXTS))
    if feed in DENSE_FEEDS:
        assert work.planned == work.dense
    else:
        assert work.planned < work.dense
    assert bool(work.decoded) == (feed in DECODING_FEEDS)


@pytest.mark.parametrize("feed", ["whole", "tokens_dynamic", "chunks_dynamic", "left", "packed_positions"])
def test_rotated_queries_and_keys(feed: str, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "rotated", {**STEEP, "rope_parameters": {"rope_theta": 256.0}})
    check(build("rotated"), FEEDS[feed], "rotated", documents(*TEXTS))
    assert work.planned < work.dense


@pytest.mark.parametrize("case", WINDOWED)
def test_left_padded_decoding(case: str, work: Work) -> None:
    check(build(case), left_padded, case, documents(*PADDED_TEXTS))
    assert work.decoded == 2 * 15  # two layers, and all that the prompt left of the 45 places
    assert work.planned < work.dense


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("case", WINDOWED)
def test_decoding_that_sees_everything(case: str, kind: str, work: Work) -> None:
    """After padding in the middle of a text, distances are not those of the index; a static cache keeps no norms."""
    side = "interior" if kind == "dynamic" else "left"
    check(build(case), padded_cached(kind, side, (30, 1)), case, documents(*PADDED_TEXTS))
    assert work.decoded == 0


@pytest.mark.parametrize("feed", ["whole", "tokens_dynamic", "left_dynamic", "packed_positions"])
@pytest.mark.parametrize("case", WINDOWED)
def test_without_windows(case: str, feed: str, work: Work) -> None:
    check(build(case, attention_window=False), FEEDS[feed], case, documents(*TEXTS))
    assert work.planned == work.dense
    assert not work.decoded


def wrong_windows(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """Change the windows of every call."""
    right = window_alibi.windows_of_gap

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(window_alibi, "windows_of_gap", lambda *args: change(right(*args)).clamp(min=1))

    return patch


def half_in_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halve the windows of single queries."""
    right = single_alibi.decode_windows
    monkeypatch.setattr(single_alibi, "decode_windows", lambda *args: right(*args) / 2)


half, another_head = wrong_windows(lambda windows: windows / 2), wrong_windows(lambda windows: windows.flip(-1))
MISTAKES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Feed]] = {
    "half": (half, whole),
    "half_packed": (half, packed("position_ids")),
    "half_padded": (half, padded("left")),
    "half_in_decoding": (half_in_decoding, cached("dynamic", (1,))),
    "half_in_padded_decoding": (half_in_decoding, left_padded),
    "another_head": (another_head, whole),
    "another_head_in_decoding": (another_head, cached("dynamic", (1,))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("case", WINDOWED)
def test_a_wrong_window_fails_the_check(case: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, feed = MISTAKES[mistake]
    model, texts = build(case), documents(*PADDED_TEXTS)
    check(model, feed, case, texts)
    patch(monkeypatch)
    with pytest.raises(AssertionError, match="of the largest value"):
        check(model, feed, case, texts)


def of_unscaled_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the windows of slopes before they are divided: those are shorter."""
    right, slopes = window_alibi.windows_of_gap, torch.tensor(SCALED["alibi_slopes"])

    def wrong(gap: torch.Tensor, scaled: torch.Tensor, eps: float) -> torch.Tensor:
        return right(gap, slopes, eps)

    monkeypatch.setattr(window_alibi, "windows_of_gap", wrong)


# Ways of feeding, and how many tokens of `PADDED_TEXTS` each call reads.
SCALED_FEEDS: dict[str, tuple[Feed, list[list[int]] | None]] = {
    "whole": (whole, None),
    "packed": (packed("position_ids"), None),
    "padded": (padded("left"), None),
    "decoding": (cached("dynamic", (1,)), [[1] * 29, [1] * 40]),
    "padded_decoding": (left_padded, [[14, *[1] * 15], [25, *[1] * 15]]),
}


@pytest.mark.parametrize("feed", SCALED_FEEDS)
def test_windows_are_those_of_scaled_slopes(feed: str, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    (function, calls), model, texts = SCALED_FEEDS[feed], build("scaled"), documents(*PADDED_TEXTS)
    check(model, function, "scaled", texts, calls=calls)
    assert work.planned < work.dense and bool(work.decoded) == ("decoding" in feed)
    of_unscaled_slopes(monkeypatch)
    with pytest.raises(AssertionError, match="of the largest value"):
        check(model, function, "scaled", texts, calls=calls)


@torch.no_grad()
def test_a_coarse_eps_is_taken_at_its_word(work: Work) -> None:
    text = documents(40)[0]
    errors, left = [], []
    for eps in (0.5, 1e-4, 1e-12, None):
        logits = build("steep", attention_window_eps=eps)(text[None]).logits[0]
        errors.append((logits - expected("steep", text).logits).abs().max().item())
        left.append(work.planned / work.dense)
        work.planned = work.dense = 0
    assert errors[0] > errors[1] > errors[2] > 1e-12 > errors[3]
    assert left[0] < left[1] < left[2] < left[3] < 1


@pytest.mark.parametrize("case", WINDOWED)
def test_gradients(case: str, work: Work) -> None:
    text = documents(40)[0][None]
    results = []
    for window in (True, False):
        model = build(case, attention_window=window)
        loss = model(text, labels=text).loss
        results.append(torch.autograd.grad(loss, list(model.parameters())))
        assert (work.planned < work.dense) == window
        work.planned = work.dense = 0
    for found, truth in zip(*results, strict=True):
        assert (found - truth).abs().max() <= 1e-12 * max(1, truth.abs().max())


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the debug log says of sdpa since the last call."""
    logger = transformers_logging.get_logger(sdpa_alibi.__name__)
    caplog.set_level(logging.DEBUG, logger=logger.name)
    logger.addHandler(caplog.handler)  # Transformers' loggers need not reach the root

    def taken() -> list[str]:
        found = sorted({(record.created, record.getMessage()) for record in caplog.records})
        caplog.clear()
        return [message for _, message in found if message.startswith("sdpa: ")]

    yield taken
    logger.removeHandler(caplog.handler)


@torch.no_grad()
def test_one_line_a_call_says_what_runs_and_why(lines: Callable[[], list[str]]) -> None:
    text = documents(40)[0][None]
    model = build("steep")
    cache = model(text).past_key_values
    (line,) = lines()
    assert line.startswith("sdpa: window form (") and "of the work left" in line and "40 queries and 40 keys" in line
    model(text[:, :1], past_key_values=cache)
    (line,) = lines()
    assert line.startswith("sdpa: single form (one query on CPU) for 1 queries and 41 keys, 6 heads")
    build("steep", attention_window=False)(text)
    (line,) = lines()
    assert line.startswith("sdpa: tiles form (attention_window is off")
    model(text, attention_mask=torch.ones(1, 1, 40, 40, dtype=torch.bool).tril())
    (line,) = lines()
    assert line.startswith("sdpa: block form (masks or rounded biases)")
    model(text, attention_mask=torch.ones(1, 40).tril(-1 + 40) * (torch.arange(40) > 3))
    assert lines()[0].startswith("sdpa: segments form (padding or documents)")


def test_rounded_biases_have_no_windows(work: Work) -> None:
    model = build("six", torch.float32, alibi_rounding="bloom")
    with torch.no_grad():
        model(documents(40)[0][None])
    assert work.dense == 0


def test_the_distances_of_a_call_carry_the_settings() -> None:
    seen: list[Distances] = []
    model = build("steep", attention_window=False, attention_window_eps=0.25)
    model.model.layers[0].register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["distances"]), with_kwargs=True
    )
    model(documents(5)[0][None])
    assert (seen[0].window, seen[0].window_eps) == (False, 0.25)
