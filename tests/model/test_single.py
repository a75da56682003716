"""One query against a cache: true bounds from norms that are never stale, and what is left out is not read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alibi_hf.model import single_alibi, window_alibi
from alibi_hf.model.cache_alibi import GrowingLayer, capacity_for
from alibi_hf.model.single_alibi import single_attention
from alibi_hf.model.tiles_alibi import Group
from alibi_hf.model.window_alibi import KeyNorms, decode_windows, default_eps
from tests.model.attending import DATA, attend, by_index, dropped, normal, weights

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.03125])
EPS = (0.3, 1e-3, default_eps(torch.bfloat16, gradients=False), default_eps(torch.float32, gradients=False))

# The windows


@pytest.mark.parametrize("block", [128, 8])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("data", DATA)
def test_no_query_loses_more_than_eps(data: str, kv_heads: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_alibi, "BLOCK", block)
    for keys in (1, 5, 600):
        query, key = DATA[data]((2, 4, keys, 16), kv_heads)
        for place in {0, keys // 2, keys - 1}:  # of the query's numbers; it sits at the last key all the same
            one = query[:, :, place : place + 1]
            for scaling in (1e-3, 0.25, 5.0, -0.25):
                truth = weights(one, key, SLOPES, scaling)
                for eps in EPS:
                    windows = decode_windows(one, key, KeyNorms(key), SLOPES, scaling, eps)
                    assert windows.shape == SLOPES.shape
                    assert dropped(truth, windows).max() <= eps


def test_the_bound_leaves_work_out_and_is_almost_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_alibi, "BLOCK", 8)
    query, key = DATA["tight"]((1, 4, 600, 16), 4)
    query = query[:, :, -1:]  # it looks at the far half of the keys, and away from the near one
    key[:, :, 580:] = 0  # where its bound is tight again
    truth = weights(query, key, SLOPES, 0.25)
    windows = decode_windows(query, key, KeyNorms(key), SLOPES, 0.25, 1e-3)
    assert bool((windows < 400).all())
    assert 1e-3 / 100 < dropped(truth, windows)[0, 3] <= 1e-3
    assert dropped(truth, windows - 5 / SLOPES)[0, 3] > 1e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_see_everything(value: float) -> None:
    for which, place in (("query", (0, 1, 0, 3)), ("key", (0, 1, 4, 3)), ("key", (0, 1, 599, 3))):
        states = dict(zip(("query", "key"), normal((1, 4, 600, 16), 4), strict=True))
        states["query"] = states["query"][:, :, -1:]
        states[which][place] = value
        windows = decode_windows(**states, norms=KeyNorms(states["key"]), slopes=SLOPES, scaling=0.25, eps=1e-3)
        assert windows[1].isinf() and windows[[0, 2, 3]].isfinite().all()


# The norms


def test_stale_norms_show() -> None:
    query, key = DATA["aligned"]((1, 4, 600, 16), 4)
    query, truth = query[:, :, -1:], weights(query[:, :, -1:], key, SLOPES, 0.25)
    fresh, stale = KeyNorms(key), KeyNorms(key[:, :, 1:])  # the key that was overlooked is the one that counts
    assert dropped(truth, decode_windows(query, key, fresh, SLOPES, 0.25, 1e-3)).max() <= 1e-3
    assert dropped(truth, decode_windows(query, key, stale, SLOPES, 0.25, 1e-3)).max() > 1e-3


def test_norms_grow_with_the_keys() -> None:
    key = torch.randn(2, 3, 700, 16)
    norms = KeyNorms(key[:, :, :300])
    for tokens in (301, 302, 302, 450, 700):
        norms.extend(key[:, :, :tokens])
        assert norms.tokens == tokens
        true = (key[:, :, :tokens] - norms.centre).double().norm(dim=-1).amax(-1)
        torch.testing.assert_close(norms.spread.double(), true, rtol=1e-6, atol=0)


def filled(tokens: int) -> GrowingLayer:
    """Return a layer that holds that many tokens and knows their norms."""
    layer = GrowingLayer()
    layer.update(*torch.randn(2, 3, 2, tokens, 16))
    assert layer.key_norms() is not None
    return layer


def append(layer: GrowingLayer, tokens: int = 1, scale: float = 3.0) -> None:
    layer.update(*scale * torch.randn(2, layer.keys.shape[0] if layer.is_initialized else 3, 2, tokens, 16))


def edit(layer: GrowingLayer) -> None:
    layer.keys.mul_(5)


def edit_and_outgrow(layer: GrowingLayer) -> None:
    layer.keys[0, 0, 0] += 100
    append(layer, capacity_for(200))


def replace(layer: GrowingLayer) -> None:
    layer.keys = layer.keys[:, :, :50] * 5
    layer.values = layer.values[:, :, :50]


CHANGES: dict[str, Callable[[GrowingLayer], Any]] = {
    "append": append,
    "append_many": lambda layer: append(layer, 30),
    "outgrow": lambda layer: append(layer, capacity_for(200)),
    "crop": lambda layer: layer.crop(-100),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 2, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
    "reset": lambda layer: layer.reset(),
    "offload": lambda layer: (layer.offload(), layer.prefetch()),
    "edit": edit,
    "edit_and_outgrow": edit_and_outgrow,
    "replace": replace,
}


def assert_fresh(layer: GrowingLayer) -> None:
    norms = layer.key_norms()
    if norms is not None:
        assert norms.tokens == layer.keys.shape[2]
        true = (layer.keys - norms.centre).norm(dim=-1).amax(-1)
        assert bool((norms.spread >= true * (1 - 1e-6)).all())


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_norms_are_never_stale(change: str) -> None:
    torch.manual_seed(1)
    layer = filled(200)
    CHANGES[change](layer)
    if layer.is_initialized:
        assert_fresh(layer)
    for _ in range(3):
        append(layer)
        assert_fresh(layer)
        assert layer.key_norms() is not None


@torch.no_grad()
@pytest.mark.parametrize(
    "twice", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_norms_of_a_copy_are_its_own(twice: Callable[[GrowingLayer], GrowingLayer]) -> None:
    layer = filled(200)
    other = twice(layer)
    append(layer, scale=50.0)
    append(other)
    for each in (layer, other):
        assert_fresh(each)
    norms = layer.key_norms(), other.key_norms()
    assert norms[0] is not None and norms[1] is not None
    assert norms[0].spread.amin() > 2 * norms[1].spread.amax()


def test_no_norms_where_a_graph_may_hold_the_keys() -> None:
    layer = GrowingLayer()
    layer.update(*torch.randn(2, 3, 2, 200, 16))
    assert layer.key_norms() is None


# What is computed


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(dtype: torch.dtype, batch: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_alibi, "CALL_KEYS", 0)
    query, key = (each.to(dtype) for each in normal((batch, 4, 900, 16), kv_heads))
    query, value = query[:, :, -1:], torch.randn_like(key)
    distances = by_index(SLOPES, 1, 900, window=True)
    found, dense = (single_attention(query, key, value, distances, 0.25, norms) for norms in (KeyNorms(key), None))
    truth = attend(query, key, value, SLOPES, 0.25)
    bound = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    assert found.dtype == dtype
    assert (found - truth).abs().max() <= bound * value.abs().max()
    assert (dense - truth).abs().max() <= bound * value.abs().max()
    if kv_heads > 1:
        assert single_alibi._plan(query, key, KeyNorms(key), distances, 0.25)[0].window < 600


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_last_key_of_a_window_is_read(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one is not."""
    groups = [Group(0, 1, 5), Group(1, kv_heads, 900)]
    monkeypatch.setattr(single_alibi, "_plan", lambda *_: groups)
    query, key = normal((2, 4, 300, 16), kv_heads)
    query, value = query[:, :, -1:], torch.randn_like(key)
    found = single_attention(query, key, value, by_index(SLOPES, 1, 300), 0.25, KeyNorms(key))
    near = 4 // kv_heads
    short = attend(query[:, :near], key[:, :1, -6:], value[:, :1, -6:], SLOPES[:near], 0.25)
    truth = torch.cat([short, attend(query, key, value, SLOPES, 0.25)[:, near:]], dim=1)
    assert (found - truth).abs().max() <= 1e-6 * truth.abs().max()


def test_what_is_far_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_alibi, "CALL_KEYS", 0)
    query, key = normal((1, 4, 900, 16), 4)
    value = torch.randn_like(key)
    value[:, :, :300] = torch.nan
    found = single_attention(query[:, :, -1:], key, value, by_index(SLOPES, 1, 900, window=True), 0.25, KeyNorms(key))
    assert found.isnan().all(-1).flatten().tolist() == [False, False, False, True]
