"""Padding and packing cost the sum of the documents' squares and change no answer; a masked token reads nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from alibi_hf.model import sdpa_alibi, segments_alibi
from alibi_hf.model.bias_alibi import Distances, alibi_slopes
from alibi_hf.model.segments_alibi import Rows, Segment, find_segments
from tests.model.cases import BACKENDS, CASES, assert_close, build, check, documents
from tests.model.feeding import FEEDS, Feed, flattened, packed_and_padded, pad, padded_cached

TEXTS = (23, 40, 1, 17)
SEGMENTED = [name for name in FEEDS if name.startswith(("left", "right", "interior", "packed", "bool", "float"))]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take documents one by one however few the queries are, in chunks that short documents cross."""
    monkeypatch.setattr(segments_alibi, "MIN_QUERIES", 2)
    monkeypatch.setattr("alibi_hf.model.tiles_alibi.CHUNK", 16)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("feed", SEGMENTED)
@pytest.mark.parametrize("case", ["six", "twelve_grouped", "sqrt"])
def test_any_way_of_padding_and_packing(case: str, feed: str, dtype: torch.dtype) -> None:
    check(build(case, dtype), FEEDS[feed], case, documents(*TEXTS))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_chunks_of_a_padded_batch(side: str, kind: str) -> None:
    check(build("six"), padded_cached(kind, side, (30, 5, 9)), "six", documents(*TEXTS))


def record_work(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record rows * queries * keys of every call of fused attention, for a model of two heads."""
    work: list[int] = []
    attend = F.scaled_dot_product_attention

    def recording(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        work.append(query.shape[0] * query.shape[1] // 2 * query.shape[2] * key.shape[2])
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    return work


def batch(kind: str, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return the documents padded or packed, as arguments of a model."""
    texts = documents(*lengths)
    if kind == "packed":
        flat = flattened(texts)
        return {name: flat[name] for name in ("input_ids", "position_ids")}
    ids, mask = pad(texts, kind)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["packed", "left", "right", "interior"])
def test_work_is_the_sum_of_the_squares(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (40, 150, 230, 90, 40)
    model, given = build("two_heads", dtype), batch(kind, lengths)
    work = record_work(monkeypatch)
    model(**given)
    squares = sum(length**2 for length in lengths)
    assert squares / 2 < sum(work) <= 1.2 * squares


@torch.no_grad()
def test_documents_of_equal_length_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build("two_heads", torch.float32), batch("packed", (20,) * 30)
    work = record_work(monkeypatch)
    model(**given)
    assert work == [30 * 20 * 20]


@torch.no_grad()
def test_documents_are_found_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    find = segments_alibi._find
    monkeypatch.setattr(segments_alibi, "_find", lambda *args: (calls.append(1), find(*args))[1])
    model = build("six", torch.float32)
    assert model.config.num_hidden_layers > 1
    model(**batch("left", (40, 50)))
    assert len(calls) == 1


class Written(TorchDispatchMode):
    """Adds up the entries of all tensors that operations return, views aside."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.total += tensor.numel()
        return result


def test_backward_grows_with_the_tokens() -> None:
    """Four times as many documents of the same lengths write little more than four times as much."""
    written = []
    for times in (1, 4):
        model = build("two_heads", torch.float32)
        given = batch("packed", (11, 12, 13, 14, 15, 16) * times)
        loss = model(**given, use_cache=False).logits.sum()
        with Written() as seen:
            loss.backward()
        written.append(seen.total)
    assert written[1] < 5 * written[0]


@torch.no_grad()
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kind", ["left", "right", "interior"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_token_reads_nothing(backend: str, kind: str) -> None:
    model, given = build("six", torch.float64, backend), batch(kind, (30, 41))
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _module, args: outputs.append(args[0]))
    weights = model(**given, output_attentions=True).attentions
    counts = given["attention_mask"].bool()
    for output in outputs:
        assert (output[~counts] == 0).all()
        assert (output[counts] != 0).all()
    for layer_weights in weights:
        sums = layer_weights.sum(-1).transpose(1, 2)
        assert (sums[~counts] == 0).all()
        torch.testing.assert_close(sums[counts], torch.ones_like(sums[counts]))


@torch.no_grad()
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_token_after_a_cache_reads_nothing(backend: str, queries: int) -> None:
    model, ids = build("six", torch.float64, backend), documents(40)[0].view(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 20 - queries :] = 0
    cache = DynamicCache(config=model.config)
    model(ids[:, :-queries], attention_mask=mask[:, :-queries], past_key_values=cache)
    outputs: list[torch.Tensor] = []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _module, args: outputs.append(args[0]))
    model(ids[:, -queries:], attention_mask=mask, past_key_values=cache)
    assert (outputs[0][1] == 0).all()
    assert (outputs[0][0] != 0).all()


Segments = tuple[Segment, ...]


def earlier(spans: segments_alibi.Spans) -> segments_alibi.Spans:
    """Move tokens by one place to the left."""
    return tuple((start - 1, stop - 1) for start, stop in spans)


def keys_one_early(segments: Segments) -> Segments:
    """Take the keys from one place to the left, the queries from where they are."""
    return tuple(Segment(segment.queries, earlier(segment.keys)) for segment in segments)


def all_one_early(segments: Segments) -> Segments:
    """Take queries and keys from one place to the left."""
    return tuple(Segment(earlier(segment.queries), earlier(segment.keys)) for segment in segments)


def documents_one_late(segments: Segments) -> Segments:
    """Let every document but the first start one token too late, and every one but the last end there."""
    starts = [0, *(segment.keys[0][0] + 1 for segment in segments[1:])]
    spans = [((start, stop),) for start, stop in zip(starts, [*starts[1:], segments[-1].keys[0][1]], strict=True)]
    return tuple(Segment(span, span) for span in spans)


def first_cached_key_lost(segments: Segments) -> Segments:
    """Leave out the first key of a document that began before this call."""
    ((start, stop),) = segments[0].keys
    cached = segments[0].extent[1] > segments[0].extent[0]
    return (Segment(segments[0].queries, ((start + 1, stop),)),) if cached else segments


# What is wrong with the segments of a row, and a way of feeding that shows it.
MUTATIONS: dict[str, tuple[Callable[[Segments], Segments], Feed]] = {
    "keys_one_early": (keys_one_early, FEEDS["left"]),
    "all_one_early": (all_one_early, FEEDS["left"]),
    "documents_one_late": (documents_one_late, FEEDS["packed_positions"]),
    "first_cached_key_lost": (first_cached_key_lost, padded_cached("dynamic", "left", (30, 7))),
}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_wrong_segments_fail_the_check(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, feed = MUTATIONS[mutation]
    model, texts = build("six"), documents(30, 41)
    check(model, feed, "six", texts)

    def wrong(distances: Distances, batch: int) -> list[Rows] | None:
        return [Rows(rows.count, change(rows.segments)) for rows in find_segments(distances, batch) or []] or None

    monkeypatch.setattr(sdpa_alibi, "find_segments", wrong)
    with pytest.raises(AssertionError, match="of the largest value"):
        check(model, feed, "six", texts)


def distances_of(
    mask: list[list[int]] | None = None, documents: list[list[int]] | None = None, first: int = 0
) -> Distances:
    """Return distances with what `find_segments` reads."""
    keys = len((mask or documents or [[]])[0])
    made = Distances(torch.tensor(alibi_slopes(2)), torch.arange(first, keys), keys, first)
    made.key_mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    made.query_document = made.key_document = None if documents is None else torch.tensor(documents)
    return made


@pytest.mark.usefixtures("always")
def test_where_segments_lie() -> None:
    mask = [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    left, gap = Segment(((2, 5),), ((2, 5),)), Segment(((0, 1), (2, 4)), ((0, 1), (2, 4)))
    assert find_segments(distances_of(mask), 4) == [Rows(2, (left,)), Rows(1, (gap,)), Rows(1, ())]

    cached = Segment(((0, 2),), ((2, 5),)), Segment(((0, 1),), ((0, 1), (2, 4)))
    assert find_segments(distances_of(mask, first=3), 4) == [Rows(2, cached[:1]), Rows(1, cached[1:]), Rows(1, ())]

    two = Segment(((0, 2),), ((0, 2),)), Segment(((2, 5),), ((2, 5),))
    assert find_segments(distances_of(documents=[[7, 7, 8, 8, 8]]), 3) == [Rows(3, two)]


@pytest.mark.usefixtures("always")
def test_a_static_cache_ends_at_the_last_query() -> None:
    made = distances_of([[0, 1, 1, 1, 1, 0, 0, 0]])
    made.query_index = torch.arange(2, 4)
    assert find_segments(made, 1) == [Rows(1, (Segment(((0, 2),), ((1, 4),)),))]


@pytest.mark.usefixtures("always")
def test_where_documents_alone_do_not_decide() -> None:
    padded = distances_of([[0, 1, 1]])
    assert find_segments(padded, 1)
    assert find_segments(padded.replace(custom_mask=torch.ones(1, 1, 3, 3)), 1) is None
    assert find_segments(padded.replace(row=torch.zeros(1, 2, 3)), 1) is None
    assert find_segments(distances_of([[0, 1, 1]], first=2), 1) is None  # one query
    assert find_segments(Distances(padded.slopes, torch.arange(3), 3), 1) is None


@torch.no_grad()
def test_documents_in_falling_order_agree_across_backends() -> None:
    ids = documents(60)[0][None]
    order = torch.tensor([5, 2, 9]).repeat_interleave(20)[None]
    found = [build("six", torch.float64, backend)(ids, seq_idx=order).logits for backend in BACKENDS]
    assert_close(found[1], found[0], 1e-10)
    assert_close(found[2], found[0], 1e-10)


@torch.no_grad()
@pytest.mark.usefixtures("always")
def test_a_mask_of_one_row_serves_the_whole_batch() -> None:
    ids, mask = documents(40)[0].view(2, 20), torch.ones(1, 20, dtype=torch.long)
    mask[:, :3] = 0
    found, truth = (build("six", torch.float64, name)(ids, attention_mask=mask).logits for name in ("sdpa", "eager"))
    assert_close(found, truth, 1e-10)


@pytest.mark.usefixtures("always")
def test_dropout_and_every_config_switch_pass_through() -> None:
    ids, mask = pad(documents(23, 40), "left")
    dropped = build("six", torch.float32, attention_dropout=0.5).train()
    one, other = (dropped(ids, attention_mask=mask).logits for _ in range(2))
    assert (one - other).abs().max() > 0.01
    for case in CASES:
        if case not in ("capped", "scaled_by_length"):
            check(build(case), packed_and_padded, case, documents(*TEXTS))
            check(build(case), FEEDS["interior"], case, documents(*TEXTS))


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_that_comes_back_is_another_document(backend: str) -> None:
    texts = documents(9, 14, 5)
    model, row = build("six", torch.float64, backend), torch.cat(texts)[None]
    index = torch.cat([torch.full((len(text),), place) for text, place in zip(texts, (0, 1, 0), strict=True)])[None]
    logits = model(row, seq_idx=index.int()).logits[0].split([len(text) for text in texts])
    for found, text in zip(logits, texts, strict=True):
        assert_close(found, model(text[None]).logits[0], 1e-10)
