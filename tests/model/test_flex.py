"""FlexAttention's block masks: what they list, what is computed from them, what is left unread, how often it compiles.

No kernel runs here except in the slow test. `flex_kernel` computes what the kernels compute from the lists.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_block_mask

from alibi_hf.model import flex_alibi
from alibi_hf.model.bias_alibi import Distances, alibi_slopes
from alibi_hf.model.blocks_alibi import make_block_mask, make_blocks
from alibi_hf.model.dense_alibi import eager_attention
from alibi_hf.model.positions_alibi import restart
from tests.model.cases import assert_close, build, check, documents, expected, windowed
from tests.model.feeding import FEEDS, flattened, pad, whole
from tests.references.flex_kernel import blocks_read, flex_kernel

HEADS, DIM, SCALING = 4, 16, 0.25
PLAIN = ("six", "twelve_grouped", "sqrt", "multi_query", "capped", "scaled", "own_slopes", "no_alibi")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this machine for one with FlexAttention's kernels, and compute what they compute."""
    monkeypatch.setattr(flex_alibi, "has_kernels", lambda query: True)
    monkeypatch.setattr(flex_alibi, "_compiled", lambda function: function)
    monkeypatch.setattr(flex_alibi, "flex_attention", flex_kernel)
    monkeypatch.setattr(flex_alibi, "WINDOW_KEYS", 256)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Start from an empty compilation cache."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_distances(
    queries: int,
    offset: int | torch.Tensor = 0,
    keys: int | None = None,
    document: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Distances:
    """Return the distances of `HEADS` heads; `document` and `mask` are `[batch, keys]`."""
    distances = Distances(
        slopes=torch.tensor(alibi_slopes(HEADS), dtype=torch.float32),
        query_index=torch.arange(queries) + offset,
        num_keys=keys or queries + int(offset),
        offset=offset,
    )
    if mask is not None:
        distances.key_mask, distances.key_position = mask, (mask.long().cumsum(-1) - 1).clamp(min=0)
        distances.query_position = distances.key_position[:, distances.query_index]
    if document is not None:
        distances.query_document = distances.key_document = document
        distances.query_position = distances.key_position = restart(torch.arange(queries).expand_as(document), document)
    return distances


def states(queries: int, keys: int | None = None, batch: int = 1, dtype: torch.dtype = torch.float32) -> list:
    """Return random query, key and value."""
    generator = torch.Generator().manual_seed(queries)
    shape = (batch, HEADS, keys or queries, DIM)
    query = torch.randn(batch, HEADS, queries, DIM, generator=generator)
    return [(0.7 * x).to(dtype) for x in (query, *(torch.randn(shape, generator=generator) for _ in range(2)))]


def lists_of(distances: Distances, windows: torch.Tensor | None = None, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Return which pairs of blocks are read in part and in full, from the lists, key and query lists compared."""
    lengths = distances.query_index.numel(), distances.num_keys
    mask = make_block_mask(make_blocks(distances, **kwargs), lengths, lambda b, h, q, k: q >= k, windows)
    return blocks_read(mask)


def blocks_of(visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which pairs of blocks hold a visible pair of tokens, and which nothing else; `[batch, q, k]`.

    Filled up, a key past the end counts as hidden, and a query past the end as one that asks for nothing.
    """
    queries, keys = (-size % 128 for size in visible.shape[1:])
    some = torch.nn.functional.pad(visible, (0, keys, 0, queries), value=False)
    every = torch.nn.functional.pad(visible, (0, keys), value=False)
    every = torch.nn.functional.pad(every, (0, 0, 0, queries), value=True)
    some, every = (x.unflatten(1, (-1, 128)).unflatten(3, (-1, 128)) for x in (some, every))
    return some.any(4).any(2), every.all(4).all(2)


# What is listed


@pytest.mark.parametrize("offset", [0, 1, 127, 128, 300])
@pytest.mark.parametrize("queries", [1, 127, 128, 129, 700])
def test_causal_blocks_are_exactly_those_that_hold_a_visible_key(queries: int, offset: int) -> None:
    distances = make_distances(queries, offset)
    visible = (torch.arange(queries + offset) <= distances.query_index[:, None])[None]
    partial, full = lists_of(distances)
    some, every = blocks_of(visible)
    assert torch.equal(full[0], every)
    assert torch.equal(partial[0], some & ~every)
    partial, full = lists_of(distances, decoding=True)
    assert torch.equal(partial[0], some) and not full.any()


@pytest.mark.parametrize("windows", [(0, 1, 2, 127), (128, 129, 255, 256), (257.5, 1e3, math.inf, 500), (-3, 0, 0, 0)])
@pytest.mark.parametrize("tokens", [128, 640, 1000])
def test_windows_keep_the_blocks_of_create_block_mask(tokens: int, windows: tuple[float, ...]) -> None:
    limit = torch.tensor(windows)
    padded = -(-tokens // 128) * 128
    wanted = create_block_mask(
        lambda b, h, q, k: (q >= k) & ((q - k <= limit[h]) | (q == k)), 1, HEADS, padded, padded, device="cpu"
    )
    partial, full = lists_of(make_distances(tokens), limit)
    truth = blocks_read(wanted)
    assert torch.equal(partial | full, truth[0] | truth[1])
    causal = torch.arange(padded // 128)
    assert torch.equal(partial[0], torch.eye(len(causal), dtype=torch.bool).expand(HEADS, -1, -1))


@pytest.mark.parametrize("offset", [0, 50, 256])
def test_windows_with_an_offset_lose_no_key(offset: int) -> None:
    windows = torch.tensor([0.0, 90.0, 200.0, math.inf])
    distances = make_distances(400, offset)
    delta = distances.query_index[:, None] - torch.arange(400 + offset)
    visible = (delta >= 0) & (delta <= windows[:, None, None])
    partial, full = lists_of(distances, windows)
    assert torch.equal((partial | full)[0], blocks_of(visible)[0])


def test_a_window_that_is_no_number_keeps_all() -> None:
    kept = lists_of(make_distances(640), torch.full((HEADS,), math.nan))
    assert torch.equal(torch.stack(kept)[:, :, :1], torch.stack(lists_of(make_distances(640)))[:, :, :1])


def random_rows(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return documents and a mask for three rows: long documents, short ones, and one document padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(3, tokens, generator=generator) < torch.tensor([[0.004], [0.03], [0.0]])
    mask = torch.rand(3, tokens, generator=generator) < torch.tensor([[1.0], [0.98], [1.0]])
    mask[1, 200:400] = False
    mask[2, :300] = False
    return starts.long().cumsum(-1), mask


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("masked", [False, True])
def test_documents_and_padding_lose_no_key(masked: bool, seed: int) -> None:
    document, mask = random_rows(900, seed)
    distances = make_distances(900, document=document, mask=mask if masked else None)
    visible = distances.visible(0, 900, 900)[:, 0]
    partial, full = lists_of(distances)
    some, every = blocks_of(visible)
    assert not (some & ~(partial | full)[:, 0]).any(), "a block that is needed is not read"
    assert not (full[:, 0] & ~every).any(), "a block is taken for full that is not"
    assert torch.equal(full[:, 0], every)
    if not masked:
        assert torch.equal((partial | full)[:, 0], some)
    else:
        assert not (partial | full)[2, 0, 3:, :2].any(), "padding on the left is read"
        assert (partial | full).sum() < 1.2 * some.sum()


def test_documents_in_any_order_lose_no_key() -> None:
    document = torch.tensor([7, 3, 7, 0]).repeat_interleave(200)[None]
    visible = make_distances(800, document=document).visible(0, 800, 800)[:, 0]
    partial, full = lists_of(make_distances(800, document=document))
    some, every = blocks_of(visible)
    assert not (some & ~(partial | full)[:, 0]).any() and not (full[:, 0] & ~every).any()


def test_counted_work() -> None:
    distances, blocks = make_distances(4096), 32
    causal = blocks * (blocks + 1) // 2
    partial, full = lists_of(distances, torch.tensor([100.0, 1000.0, 3000.0, math.inf]))
    read = (partial | full).sum((0, 2, 3)).tolist()
    assert read[0] == 2 * blocks - 1  # the block itself and the one before
    assert (
        read[0] < read[1] < read[2] < read[3] == causal == lists_of(distances)[0].sum() + lists_of(distances)[1].sum()
    )
    packed = make_distances(4096, document=torch.arange(4096)[None] // 512)
    assert sum(int(kind.sum()) for kind in lists_of(packed)) == 8 * (4 * 5 // 2)
    cache = make_distances(1, torch.tensor(300), keys=4096)  # a static cache, mostly empty
    assert lists_of(cache, decoding=True)[0].sum() == 3


# What is computed from the lists


@pytest.mark.parametrize("length", [1, 127, 129])
@pytest.mark.parametrize("case", PLAIN)
def test_logits(case: str, length: int, kernel: None) -> None:
    check(build(case, torch.float64, "flex_attention"), whole, case, documents(length))


@pytest.mark.parametrize("feed", FEEDS)
def test_any_way_of_feeding(feed: str, kernel: None) -> None:
    check(
        build("twelve_grouped", torch.float64, "flex_attention"), FEEDS[feed], "twelve_grouped", documents(140, 1, 131)
    )


@pytest.mark.parametrize("feed", ["whole", "left", "interior", "packed_positions", "packed_and_padded"])
@pytest.mark.parametrize("rounding", ["bloom", "falcon"])
def test_rounded_bias(rounding: str, feed: str, kernel: None) -> None:
    texts = documents(140, 17)
    with torch.no_grad():
        truth = whole(build("six", torch.float64, "eager", alibi_rounding=rounding), texts)
        found = FEEDS[feed](build("six", torch.float64, "flex_attention", alibi_rounding=rounding), texts)
    for logits, true_logits in zip(found, truth, strict=True):
        assert_close(logits, true_logits, 1e-10)


@pytest.mark.parametrize("feed", ["whole", "left", "packed_positions", "tokens_static"])
def test_a_wrong_bias_fails(feed: str, kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = flex_alibi._bias_mod

    def flipped(distances: Distances, *args: Any) -> Callable[..., torch.Tensor]:
        return bias(distances.replace(slopes=distances.slopes.flip(0)), *args)

    monkeypatch.setattr(flex_alibi, "_bias_mod", flipped)
    with pytest.raises(AssertionError, match="of the largest value"):
        check(build("six", torch.float64, "flex_attention"), FEEDS[feed], "six", documents(150, 20))


def with_windows(monkeypatch: pytest.MonkeyPatch, *windows: float) -> None:
    """Let the bound give these windows."""
    monkeypatch.setattr(flex_alibi, "head_windows", lambda *_: torch.tensor(windows))


@pytest.mark.parametrize("tokens", [256, 700])
def test_windows_change_neither_outputs_nor_gradients(tokens: int, kernel: None) -> None:
    distances, grad = make_distances(tokens), torch.randn(1, HEADS, tokens, DIM, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in states(tokens, dtype=torch.float64)]
    truth = eager_attention(*inputs, distances, SCALING)[0]
    found = flex_alibi.flex_alibi(*inputs, windowed(distances, 1e-12), SCALING)
    assert_close(found, truth, 1e-10)
    for one, other in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(truth, inputs, grad), strict=True
    ):
        assert_close(one, other, 1e-9)


def test_windows_are_used(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    distances, inputs = make_distances(700), states(700, dtype=torch.float64)
    truth = eager_attention(*inputs, distances, SCALING)[0]
    with_windows(monkeypatch, 0.0, math.inf, 1.0, 400.0)
    found = flex_alibi.flex_alibi(*inputs, windowed(distances, 1e-12), SCALING)
    error = (found - truth).abs().amax((0, 2, 3))
    assert error[1] < 1e-10 and error[0] > 1e-3 and error[2] > 1e-2 and error[3] > 1e-5
    assert_close(flex_alibi.flex_alibi(*inputs, distances, SCALING), truth, 1e-10)  # only if asked for


@pytest.mark.parametrize("what", ["softcap", "sqrt", "short", "padded", "packed", "chunk"])
def test_no_window_where_none_is_proved(what: str, kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with_windows(monkeypatch, *[0.0] * HEADS)
    tokens = 255 if what == "short" else 600
    distances, inputs, softcap = make_distances(tokens), states(tokens, dtype=torch.float64), None
    if what == "softcap":
        softcap = 2.0
    elif what == "sqrt":
        distances.sqrt = True
    elif what == "padded":
        distances = make_distances(tokens, mask=(torch.arange(tokens) > 5)[None])
    elif what == "packed":
        distances = make_distances(tokens, document=(torch.arange(tokens) > 50).long()[None])
    elif what == "chunk":
        distances, inputs = make_distances(tokens, 300), states(tokens, 900, dtype=torch.float64)
    found = flex_alibi.flex_alibi(*inputs, windowed(distances, 1e-3), SCALING, softcap=softcap)
    assert_close(found, eager_attention(*inputs, distances, SCALING, softcap=softcap)[0], 1e-10)


def test_the_config_decides_about_windows(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []

    def no_window(query: torch.Tensor, key: torch.Tensor, slopes: torch.Tensor, scaling: float, eps: float) -> Any:
        found.append(eps)
        return torch.full_like(slopes, math.inf)

    monkeypatch.setattr(flex_alibi, "head_windows", no_window)
    model, text = build("two_heads", torch.float32, "flex_attention"), documents(300)[0][None]
    for wanted, eps in ((False, None), (True, None), (True, 0.5)):
        model.config.attention_window, model.config.attention_window_eps = wanted, eps
        model(text)
        with torch.no_grad():
            model(text)
    resolution = torch.finfo(torch.float32).eps
    assert found == [resolution / 16, resolution / 4, 0.5, 0.5]


# How often it compiles, and what the compiler knows


class Counter(CompileCounter):
    """Counts compilations, and keeps the query that flex_attention gets in each as the compiler sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[torch.Tensor] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> Callable:
        """Count one compilation."""
        calls = module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention)
        self.queries += [call.args[0].meta["example_value"] for call in calls]
        return super().__call__(module, inputs)


@pytest.fixture
def counter(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Compile as on a GPU, but for the code: what the compiler would be given runs as it is."""
    counter = Counter()
    compiled = functools.cache(lambda function: torch.compile(function, backend=counter, fullgraph=True))
    monkeypatch.setattr(flex_alibi, "has_kernels", lambda query: True)
    monkeypatch.setattr(flex_alibi, "_compiled", compiled)
    monkeypatch.setattr(flex_alibi, "WINDOW_KEYS", 256)
    return counter


def attend(distances: Distances, batch: int = 1, window_eps: float | None = None) -> None:
    """Check one call against eager attention; the uncompiled library reads all keys, window or not."""
    inputs = states(distances.query_index.numel(), distances.num_keys, batch)
    with torch.no_grad():
        found = flex_alibi.flex_alibi(*inputs, windowed(distances, window_eps), SCALING)
        assert_close(found, eager_attention(*inputs, distances, SCALING)[0], 1e-5)


@pytest.mark.slow
def test_compilations_do_not_grow_with_data_or_length(counter: Counter) -> None:
    lengths = (256, 300, 520, 384, 1000, 700)

    def count(*calls: Callable[[], None]) -> int:
        before = counter.frame_count
        for call in calls:
            call()
        return counter.frame_count - before

    def packed(n: int) -> Distances:
        return make_distances(n, document=torch.arange(n)[None] // (n // 3))

    def padded(n: int) -> Distances:
        return make_distances(n, mask=torch.arange(n) >= torch.tensor([[3], [n // 2]]))

    part = functools.partial
    assert count(*[part(attend, make_distances(n)) for n in lengths]) <= 2
    assert count(*[part(attend, make_distances(n)) for n in (100, 3, 128)]) <= 1  # a single block
    assert count(*[part(attend, make_distances(n), window_eps=1e-3) for n in lengths]) <= 2
    assert (
        count(*[part(attend, make_distances(n, offset)) for n, offset in zip(lengths, lengths[::-1], strict=True)]) <= 2
    )
    assert count(*[part(attend, packed(n)) for n in lengths]) <= 2
    assert count(*[part(attend, padded(n), 2) for n in lengths]) <= 2
    assert count(*[part(attend, make_distances(1, torch.tensor(at), 400)) for at in (0, 1, 127, 128, 399)]) <= 1
    assert count(*[part(attend, make_distances(1, at)) for at in (60, 61, 127, 128, 129, 300)]) <= 2
    for query in counter.queries:
        if query.shape[2] != 1:  # decoding
            length = query.shape[2]
            multiple = length % 128 if isinstance(length, int) else length.node.expr % 128
            assert multiple == 0, f"the compiler does not know that {length} is a multiple of a block"
    assert any(not isinstance(query.shape[2], int) for query in counter.queries)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_builds_its_blocks_in_the_graph(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_alibi, "has_kernels", lambda query: True)
    counter, model = Counter(), build("two_heads", torch.float32, "flex_attention")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for text in documents(140, 300, 256, 129):
        found = compiled(text[None], use_cache=False).logits[0]
        assert_close(found, expected("two_heads", text).logits, 1e-5)
    assert counter.frame_count == 1 and counter.queries[0].shape[2].node.expr % 128 == 0
    texts = documents(130, 33)
    ids, mask = pad(texts, "left")
    flat = flattened(texts)
    padded = compiled(ids, attention_mask=mask, use_cache=False).logits
    packed = compiled(flat["input_ids"], position_ids=flat["position_ids"], use_cache=False).logits[0].split([130, 33])
    for row, text in enumerate(texts):
        truth = expected("two_heads", text).logits
        assert_close(padded[row, mask[row].bool()], truth, 1e-5)
        assert_close(packed[row], truth, 1e-5)


@torch.no_grad()
def test_an_exported_model_fits_any_length(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_alibi, "has_kernels", lambda query: True)
    model = build("two_heads", torch.float32, "flex_attention")
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=4096)}, "use_cache": None}
    given = {"input_ids": documents(140)[0][None], "use_cache": False}
    exported = torch.export.export(model, (), given, dynamic_shapes=shapes).module()
    for text in documents(2, 128, 301):
        found = exported(input_ids=text[None], use_cache=False).logits[0]
        assert_close(found, expected("two_heads", text).logits, 1e-5)


# The real kernels, those of the CPU: they have no backward, and read the lists as the GPU's do


@pytest.mark.slow
@torch.no_grad()
def test_compiled_kernels_read_what_is_listed_and_nothing_else(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks, provable = flex_alibi._in_blocks, flex_alibi.head_windows
    monkeypatch.setattr(flex_alibi, "has_kernels", lambda query: True)
    monkeypatch.setattr(flex_alibi, "WINDOW_KEYS", 256)
    # The CPU's kernel cannot take a view that is made inside the graph.
    monkeypatch.setattr(flex_alibi, "_in_blocks", lambda x: in_blocks(x).flatten(2, 3))
    given = torch.zeros(HEADS)
    monkeypatch.setattr(flex_alibi, "head_windows", lambda *_: given)
    for tokens in (1024, 1300, 900):
        distances, inputs = make_distances(tokens), states(tokens)
        exact = [x.double() for x in inputs]
        truth = eager_attention(*exact, distances, SCALING)[0]
        for absurd in (False, True):
            windows = provable(*inputs[:2], distances.slopes, SCALING, 1e-8)
            given.copy_(torch.ones(HEADS) if absurd else windows)
            found = flex_alibi.flex_alibi(*inputs, windowed(distances, 1e-8), SCALING)
            with monkeypatch.context() as patch:
                patch.setattr(flex_alibi, "_compiled", lambda function: function)
                patch.setattr(flex_alibi, "flex_attention", flex_kernel)
                same = flex_alibi.flex_alibi(*exact, windowed(distances, 1e-8), SCALING)
            assert windows.min() < tokens - 256
            assert_close(found, same, 1e-6)
            assert ((found - truth).abs().max() > 0.01) == absurd
    for filled in (3, 200, 255):
        distances, inputs = make_distances(1, torch.tensor(filled), 384), states(1, 384)
        truth = eager_attention(*[x.double() for x in inputs], distances, SCALING)[0]
        inputs[2][:, :, -(-(filled + 1) // 128) * 128 :] = math.nan  # blocks of a static cache without a token
        assert_close(flex_alibi.flex_alibi(*inputs, distances, SCALING), truth, 1e-6)
