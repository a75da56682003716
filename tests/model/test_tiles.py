"""Tiles: every pair in a window exactly once and no other, and what they compute against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from alibi_hf.model import tiles_alibi
from alibi_hf.model.bias_alibi import alibi_slopes
from alibi_hf.model.tiles_alibi import CHUNK, Group, plan_groups, tiled_attention
from tests.model.attending import attend, by_index, distance

SCALING = 0.2
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6}  # of the largest entry
WINDOWS = [(3.7, 40.0, 200.0, math.inf), (math.inf,) * 4, (5.0, 5.0, 300.0, 5.0), (0.0, 1e9, 130.5, 2.0)]


def states_of(
    queries: int, keys: int, kv_heads: int = 4, batch: int = 1, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    """Return query, key and value of 4 heads of 16."""
    query = torch.randn(batch, 4, queries, 16, dtype=torch.float64)
    return [query.to(dtype), *torch.randn(2, batch, kv_heads, keys, 16, dtype=torch.float64).to(dtype)]


def windowed(states: list[torch.Tensor], slopes: torch.Tensor, windows: list[int]) -> torch.Tensor:
    """Return attention in float64 from the formula, each key/value head with its window."""
    query, key, value = (each.double() for each in states)
    repeats = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
    delta = distance(query.shape[2], key.shape[2])
    reach = torch.tensor(windows).repeat_interleave(repeats)[:, None, None]
    scores = torch.matmul(query, key.transpose(2, 3)) * SCALING - slopes.double()[:, None, None] * delta
    return torch.matmul(scores.masked_fill((delta < 0) | (delta > reach), -torch.inf).softmax(-1), value)


def slopes_of(heads: int = 4) -> torch.Tensor:
    return torch.tensor(alibi_slopes(heads), dtype=torch.float32)


def close(found: torch.Tensor, truth: torch.Tensor, limit: float) -> bool:
    return bool((found.double() - truth.double()).abs().max() <= limit * truth.double().abs().max())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count pairs of query and key, over all heads but not over the rows of a batch, in every call of the kernels."""
    counted: list[int] = []

    def counting(kernel: Any, first: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            query, key = args[first : first + 2]
            counted.append(key.shape[0] * query.shape[2] * key.shape[2])
            return kernel(*args, **kwargs)

        return call

    for name, first in (("_fused", 0), ("_FORWARD", 0), ("_BACKWARD", 1)):
        monkeypatch.setattr(tiles_alibi, name, counting(getattr(tiles_alibi, name), first))
    yield counted


# What is planned


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 900), (255, 255), (256, 700), (257, 257), (600, 1000)])
@pytest.mark.parametrize("windows", WINDOWS)
def test_each_pair_in_the_window_is_in_one_tile(windows: tuple[float, ...], queries: int, keys: int) -> None:
    groups = plan_groups(windows, queries, keys)
    assert [head for group in groups for head in range(group.start, group.stop)] == [0, 1, 2, 3]
    delta = distance(queries, keys)
    for group in groups:
        assert group.window >= min(max(windows[group.start : group.stop]), keys) - 1  # tokens are whole
        seen = torch.zeros(queries, keys, dtype=torch.int32)
        for start, stop, first, last in group.tiles(queries, keys):
            seen[start:stop, first:last] += 1
        assert seen.max() == 1
        assert bool((seen[(delta >= 0) & (delta <= group.window)] == 1).all())
        for head in range(group.start, group.stop):
            assert bool((seen[(delta >= 0) & (delta <= windows[head])] == 1).all())
        assert group.pairs(queries, keys) == seen.sum() * (group.stop - group.start)


def test_heads_are_merged_where_that_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = (100.0, 110.0, 3900.0, math.inf)
    assert plan_groups(windows, 4096, 4096) == [Group(0, 2, 110), Group(2, 4, 4096)]
    monkeypatch.setattr(tiles_alibi, "CALL_PAIRS", 10**9)
    assert plan_groups(windows, 4096, 4096) == [Group(0, 4, 4096)]
    monkeypatch.setattr(tiles_alibi, "CALL_PAIRS", 0)
    assert [group.window for group in plan_groups(windows[:2], 4096, 4096)] == [100, 110]


# What is read


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("train", [False, True])
def test_the_kernels_compute_what_was_planned(train: bool, kv_heads: int, calls: list[int]) -> None:
    states = [each.requires_grad_(train) for each in states_of(700, 900, kv_heads)]
    groups = plan_groups([100.0, 900.0, 150.0, math.inf][-kv_heads:], 700, 900)
    output = tiled_attention(*states, by_index(slopes_of(), 700, 900), SCALING, groups)
    if train:
        output.sum().backward()
    planned, dense = (sum(group.pairs(700, 900) for group in each) for each in (groups, [Group(0, kv_heads, 900)]))
    assert sum(calls) == planned * (2 if train else 1)
    assert planned < dense


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_what_is_far_is_not_read(poison: float) -> None:
    """Not even at weight zero, which would make it not a number; the head that looks that far does read it."""
    query, key, value = states_of(900, 900)
    key[:, :, :100] = value[:, :, :100] = poison
    groups = [Group(0, 2, 150), Group(2, 4, 900)]
    output = tiled_attention(query, key, value, by_index(slopes_of(), 900, 900), SCALING, groups)
    late = output[:, :, 2 * CHUNK :]  # tiles of queries that start 150 and more after the poison
    clean = [key.clone(), value.clone()]
    for each in clean:
        each[:, :, :100] = 0
    plain = tiled_attention(query, *clean, by_index(slopes_of(), 900, 900), SCALING, groups)
    assert torch.equal(late[:, :2], plain[:, :2, 2 * CHUNK :])
    assert not torch.equal(late[:, 2:], plain[:, 2:, 2 * CHUNK :])


def test_what_is_far_gets_no_gradient() -> None:
    query, key, value = (each.requires_grad_() for each in states_of(900, 900))
    groups = [Group(0, 2, 150), Group(2, 4, 900)]
    output = tiled_attention(query, key, value, by_index(slopes_of(), 900, 900), SCALING, groups)
    output[:, :, 800:].sum().backward()  # the first tile of these queries starts at 768
    for grad in (key.grad, value.grad):
        assert grad is not None
        assert not grad[:, :2, : 768 - 150].any()
        assert bool((grad[:, :2, 800:] != 0).any(-1).all())
        assert bool((grad[:, 2:, :618] != 0).any())


# What is computed


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("kv_heads", "batch"), [(4, 1), (4, 2), (2, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 300), (255, 255), (256, 256), (257, 257), (300, 557), (5, 600)]
)
def test_against_float64(queries: int, keys: int, kv_heads: int, batch: int, train: bool) -> None:
    windows = [40, 500, 3, 129][-kv_heads:]
    groups = [Group(head, head + 1, window) for head, window in enumerate(windows)]
    for dtype, limit in LIMITS.items():
        states = [each.requires_grad_(train) for each in states_of(queries, keys, kv_heads, batch, dtype)]
        found = tiled_attention(*states, by_index(slopes_of(), queries, keys), SCALING, groups)
        assert found.dtype == dtype and found.requires_grad == train
        assert close(found, windowed(states, slopes_of(), windows), limit)
        if train:
            grad = torch.randn_like(found)
            truth = [each.detach().double().requires_grad_() for each in states]
            expected = torch.autograd.grad(windowed(truth, slopes_of(), windows), truth, grad.double())
            for ours, theirs in zip(torch.autograd.grad(found, states, grad), expected, strict=True):
                assert ours.dtype == dtype
                if theirs.abs().max() > 1e-12:  # with one key, scores have no gradient
                    assert close(ours, theirs, 4 * limit)


@pytest.mark.parametrize("train", [False, True])
def test_tokens_before_heads_as_a_projection_gives_them(train: bool) -> None:
    states = states_of(300, 300, kv_heads=2)
    turned = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in states]
    results = []
    for each in (states, turned):
        each = [state.requires_grad_(train) for state in each]
        output = tiled_attention(*each, by_index(slopes_of(), 300, 300), SCALING, [Group(0, 1, 30), Group(1, 2, 300)])
        grads = torch.autograd.grad(output.square().sum(), each) if train else ()
        results.append((output, *grads))
    for plain, strided in zip(*results, strict=True):
        assert close(strided, plain, 1e-12)


@pytest.mark.parametrize("arithmetic", [True, False], ids=["in_16_bits", "in_float32"])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, kv_heads: int, arithmetic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to float64 as attention with all scores in float32 is, forward and backward."""
    monkeypatch.setattr(tiles_alibi, "has_16_bit_arithmetic", lambda: arithmetic)
    states, grad = states_of(400, 400, kv_heads, dtype=dtype), states_of(400, 400, dtype=dtype)[0]
    distances = by_index(slopes_of(), 400, 400)

    def tiles(*states: torch.Tensor) -> torch.Tensor:
        return tiled_attention(*states, distances, SCALING, [Group(0, kv_heads, 400)])

    def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (each.repeat_interleave(4 // kv_heads, dim=1) for each in (key, value))
        scores = torch.matmul(query, key.transpose(2, 3)).float() * SCALING
        return torch.matmul((scores + distances.block(0, 400, 400)[0]).softmax(-1).to(dtype), value)

    def run(attention: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [each.detach().to(dtype).requires_grad_() for each in states]
        output = attention(*given)
        assert output.dtype == dtype
        return [output.detach(), *torch.autograd.grad(output, given, grad.to(dtype))]

    def dense(*states: torch.Tensor) -> torch.Tensor:
        return attend(*states, slopes_of(), SCALING)

    for found, upstream, truth in zip(run(tiles, dtype), run(eager, dtype), run(dense, torch.float64), strict=True):
        ours, theirs = ((each.double() - truth).square().mean().sqrt() for each in (found, upstream))
        assert 0 < ours <= 1.1 * theirs


def test_square_roots_of_distances() -> None:
    states = states_of(600, 600)
    found = tiled_attention(*states, by_index(slopes_of(), 600, 600, sqrt=True), SCALING, [Group(0, 4, 600)])
    delta = distance(600, 600).double()
    scores = torch.matmul(states[0], states[1].transpose(2, 3)) * SCALING
    scores = scores - slopes_of().double()[:, None, None] * delta.clamp(min=0).sqrt()
    truth = torch.matmul(scores.masked_fill(delta < 0, -torch.inf).softmax(-1), states[2])
    assert close(found, truth, 1e-7)  # the root is taken in float32


# What autograd asks for


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_gradients_where_pytorch_has_no_such_kernel(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [each.requires_grad_() for each in states_of(300, 557, kv_heads, batch=2)]
    groups = [Group(0, 1, 30), Group(1, kv_heads, 557)]

    def gradients() -> tuple[torch.Tensor, ...]:
        output = tiled_attention(*states, by_index(slopes_of(), 300, 557), SCALING, groups)
        return output, *torch.autograd.grad(output.square().sum(), states)

    kernel = gradients()
    monkeypatch.setattr(tiles_alibi, "_BACKWARD", None)
    fallback = gradients()
    assert "Tiles" not in str(fallback[0].grad_fn)
    for ours, theirs in zip(kernel, fallback, strict=True):
        assert close(ours, theirs, 1e-12)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some_inputs_only(wanted: tuple[int, ...]) -> None:
    def gradients(inputs: tuple[int, ...]) -> dict[int, torch.Tensor]:
        torch.manual_seed(1)
        states = states_of(300, 300)
        for index in inputs:
            states[index].requires_grad_()
        output = tiled_attention(*states, by_index(slopes_of(), 300, 300), SCALING, [Group(0, 4, 100)])
        found = torch.autograd.grad(output.square().sum(), [states[index] for index in inputs])
        return dict(zip(inputs, found, strict=True))

    everything = gradients((0, 1, 2))
    for index, gradient in gradients(wanted).items():
        assert torch.equal(gradient, everything[index])


def test_gradients_through_a_checkpoint() -> None:
    states = [each.requires_grad_() for each in states_of(300, 300)]

    def run(*states: torch.Tensor) -> torch.Tensor:
        return tiled_attention(*states, by_index(slopes_of(), 300, 300), SCALING, [Group(0, 2, 40), Group(2, 4, 300)])

    plain = torch.autograd.grad(run(*states).square().sum(), states)
    again = torch.autograd.grad(checkpoint(run, *states, use_reentrant=False).square().sum(), states)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_gradients_of_gradients_are_refused() -> None:
    states = [each.requires_grad_() for each in states_of(20, 20)]
    output = tiled_attention(*states, by_index(slopes_of(), 20, 20), SCALING, [Group(0, 4, 20)])
    (grad,) = torch.autograd.grad(output.square().sum(), states[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
