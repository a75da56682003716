"""The windows of heads are true bounds: what they leave out, counted in float64, is never more than eps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alibi_hf.model import tiles_alibi, window_alibi
from alibi_hf.model.bias_alibi import alibi_slopes
from alibi_hf.model.tiles_alibi import Group, plan_groups, tiled_attention
from alibi_hf.model.window_alibi import default_eps, head_windows
from tests.model.attending import DATA, attend, by_index, distance, dropped, normal, weights

SLOPES = {
    "one": alibi_slopes(1),
    "six": alibi_slopes(6),
    "twelve": alibi_slopes(12),
    "sixteen": alibi_slopes(16),
    "own": [0.9, 0.0, 0.03, 0.3],
    "middling": [0.4, 0.2, 0.1, 0.05],
}
EPS = (0.3, 1e-3, default_eps(torch.float32, gradients=True))


def slopes_of(name: str) -> torch.Tensor:
    return torch.tensor(SLOPES[name], dtype=torch.float32)


def by_norms(query: torch.Tensor, key: torch.Tensor, slopes: torch.Tensor, scaling: float, eps: float) -> torch.Tensor:
    """Return the plainest window there is, from the largest norms of queries and keys, float64 `[heads]`."""
    m = slopes.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    norms = [states.double().norm(dim=-1).amax((0, 2)) for states in (query, key)]
    return (2 * scaling * norms[0] * norms[1] - torch.tensor(eps).log() - (1 - (-m).exp()).log()) / m


@pytest.fixture(params=[128, 8], ids=["blocks_of_128", "blocks_of_8"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks as they are, and small ones: no window is shorter, and all of Jensen's sums of blocks come into play."""
    monkeypatch.setattr(window_alibi, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("slopes", SLOPES)
@pytest.mark.parametrize("data", DATA)
def test_no_row_loses_more_than_eps(data: str, slopes: str, block: int) -> None:
    heads = slopes_of(slopes)
    query, key = DATA[data]((2, len(heads), 300, 16), len(heads))
    for scaling in (1e-3, 0.25, 5.0):
        truth = weights(query, key, heads, scaling)
        for eps in EPS:
            windows = head_windows(query, key, heads, scaling, eps)
            assert windows.shape == heads.shape and windows.dtype == torch.float32
            assert bool((windows >= block).all())
            assert dropped(truth, windows).max() <= eps


@pytest.mark.parametrize("queries", [1, 77, 200])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("data", DATA)
def test_nor_with_cached_keys_and_shared_heads(data: str, kv_heads: int, queries: int, block: int) -> None:
    heads = slopes_of("middling")
    query, key = DATA[data]((2, 4, 301, 16), kv_heads)
    query = query[:, :, -queries:]
    truth = weights(query, key, heads, 0.25)
    for eps in EPS:
        both, plain = (head_windows(query, key, heads, 0.25, eps, jensen) for jensen in (True, False))
        assert dropped(truth, both).max() <= eps
        assert dropped(truth, plain).max() <= eps
        assert bool((both <= plain).all())


@pytest.mark.parametrize("data", ["tight", "equal"])
def test_the_bound_is_almost_reached(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing but the self score, and with nothing but the mean of blocks: a little less would be too little."""
    monkeypatch.setattr(window_alibi, "BLOCK", 8)
    heads = torch.tensor([0.2, 0.1, 0.05])
    query, key = DATA[data]((1, 3, 512, 16), 3)
    truth, eps = weights(query, key, heads, 0.25), 1e-3
    windows = head_windows(query, key, heads, 0.25, eps)
    assert bool((windows < 400).all())
    assert eps / 50 < dropped(truth, windows).amax(-1).min() <= eps
    assert dropped(truth, windows - 4 / heads).amax(-1).min() > eps  # exp(4) is 55


def mistaken_jensen(tokens_off: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the bound by the means of blocks with another mean distance, by place in the block."""
    right = window_alibi._jensen

    def wrong(query: torch.Tensor, centred: torch.Tensor, slopes: torch.Tensor, scaling: float) -> torch.Tensor:
        inside = torch.arange(query.shape[3]) % window_alibi.BLOCK
        return right(query, centred, slopes, scaling) + slopes[..., None] * tokens_off(inside)

    return wrong


@pytest.mark.parametrize("queries", [400, 77, 1])
@pytest.mark.parametrize("data", DATA)
def test_jensen_bounds_each_row(data: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, not only where the window is decided; the slope that hardly falls counts the keys."""
    monkeypatch.setattr(window_alibi, "BLOCK", 8)
    heads = torch.tensor([0.4, 0.05, 1e-6])
    query, key = DATA[data]((1, 3, 400, 16), 3)
    query, key = query[:, :, -queries:], key - window_alibi.centre(key)
    delta = distance(queries, 400)
    scores = 0.25 * torch.matmul(query.double(), key.double().transpose(2, 3)) - heads.double()[:, None, None] * delta
    total = scores.masked_fill(delta < 0, -torch.inf).logsumexp(-1)
    found = window_alibi._jensen(query[:, :, None], key, heads[:, None], 0.25)[:, :, 0]
    late = torch.arange(400 - queries, 400) >= 8
    assert bool((found[..., ~late] == torch.inf).all())
    assert bool((found <= total + 1e-5 * total.abs().clamp(min=1))[..., late].all())
    if data == "equal":
        assert bool((found > total - math.log(4))[:, 2, late & (torch.arange(400 - queries, 400) < 64)].all())


MISTAKES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "half": ("windows_of_gap", lambda right: lambda *args: right(*args) / 2),
    "another_head": ("windows_of_gap", lambda right: lambda *args: right(*args).roll(1)),
    "no_tail": ("windows_of_gap", lambda right: lambda gap, slopes, eps: (gap - math.log(eps)) / slopes),
    "sign": ("_jensen", lambda right: mistaken_jensen(lambda inside: 2 * inside + 9)),
    "place_in_block": ("_jensen", lambda right: mistaken_jensen(lambda inside: inside)),
    "short_norms": ("row_norms", lambda right: lambda states: right(states) * 0.8),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_alibi, "BLOCK", 8)
    heads, eps = torch.tensor([0.4, 0.2, 0.1]), 1e-3

    def lost() -> float:
        query, key = DATA["striped"]((1, 3, 400, 16), 3)
        return dropped(weights(query, key, heads, 0.5), head_windows(query, key, heads, 0.5, eps)).max().item()

    assert lost() <= eps
    name, change = MISTAKES[mistake]
    monkeypatch.setattr(window_alibi, name, change(getattr(window_alibi, name)))
    assert lost() > eps


def test_the_bound_leaves_work_out() -> None:
    heads = slopes_of("sixteen")
    query, key = (states.bfloat16() for states in normal((1, 16, 4096, 64), 16))
    eps = default_eps(torch.bfloat16, gradients=False)
    windows = head_windows(query, key, heads, 0.125, eps).double()
    row = torch.arange(4096).double()[:, None]
    share = (torch.minimum(row, windows) + 1).sum() / (16 * (row + 1).sum())
    assert share <= 0.45
    assert bool((windows <= by_norms(query, key, heads, 0.125, eps).clamp(min=128)).all())


def test_a_common_offset_of_the_keys_changes_nothing() -> None:
    heads = slopes_of("middling")
    query, key = normal((1, 4, 600, 16), 4)
    moved = key + 30 * torch.randn(16)
    plain, offset = (head_windows(query, each, heads, 0.25, 1e-3) for each in (key, moved))
    torch.testing.assert_close(plain, offset, rtol=1e-3, atol=0.1)
    assert bool((offset < by_norms(query, moved, heads, 0.25, 1e-3) / 2).all())


def test_a_very_large_offset_in_float64() -> None:
    """Rounded to float32 before the offset is taken off, these keys would all be one."""
    heads = slopes_of("middling")
    query, key = (states.double() for states in normal((1, 4, 600, 16), 4))
    moved = head_windows(query, key + 2.0**30, heads, 0.25, 1e-3)
    torch.testing.assert_close(moved, head_windows(query, key, heads, 0.25, 1e-3))


def test_a_negative_scale_of_the_scores() -> None:
    heads = slopes_of("middling")
    query, key = normal((1, 4, 300, 16), 4)
    windows = head_windows(query, key, heads, -0.25, 1e-3)
    assert torch.equal(windows, head_windows(-query, key, heads, 0.25, 1e-3))
    assert dropped(weights(query, key, heads, -0.25), windows).max() <= 1e-3


def test_slope_zero_sees_everything() -> None:
    query, key = normal((1, 4, 300, 16), 4)
    windows = head_windows(query, key, slopes_of("own"), 0.25, 0.3)
    assert windows.isinf().tolist() == [False, True, False, False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 2, 299, 5), (0, 3, 150, 15)])
@pytest.mark.parametrize("which", ["query", "key"])
def test_numbers_that_are_not_finite_see_everything(which: str, place: tuple[int, ...], value: float) -> None:
    states = dict(zip(("query", "key"), normal((2, 4, 300, 16), 4), strict=True))
    states[which][place] = value
    windows = head_windows(**states, slopes=slopes_of("middling"), scaling=0.25, eps=1e-3)
    if which == "key" or place[2] >= 128:  # queries of the first block drop nothing
        assert windows[place[1]] > 1e20
    assert not windows.isnan().any()
    if not windows.isfinite().all():
        assert plan_groups(windows.tolist(), 300, 300)[-1].stop == 4


@pytest.mark.parametrize("eps", [0.05, 0.3])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("data", ["normal", "tight", "equal", "low_rank"])
def test_how_far_output_and_gradients_move(
    data: str, kv_heads: int, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bounds in the docstring of the module, with eps so coarse that they would not hold by chance."""
    monkeypatch.setattr(window_alibi, "BLOCK", 8)
    monkeypatch.setattr(tiles_alibi, "CHUNK", 16)
    heads, scaling = slopes_of("middling"), 0.25
    query, key = (states.double() for states in DATA[data]((1, 4, 300, 16), kv_heads))
    value, grad = torch.randn_like(key), torch.randn_like(query)
    windows = head_windows(query, key, heads, scaling, eps).unflatten(0, (kv_heads, -1)).amax(-1).tolist()
    groups = [Group(head, head + 1, int(min(window, 300))) for head, window in enumerate(windows)]
    results = []
    for attention in (attend, tiled_attention):
        states = [each.clone().requires_grad_() for each in (query, key, value)]
        more = (heads, scaling) if attention is attend else (by_index(heads, 300, 300), scaling, groups)
        output = attention(*states, *more)
        results.append((output.detach(), *torch.autograd.grad(output, states, grad)))
    output, *grads = ((a - b).norm(dim=-1) for a, b in zip(*results, strict=True))

    spread = (key - window_alibi.centre(key)).norm(dim=-1).amax()
    longest, moment = query.norm(dim=-1).amax(), grad.norm(dim=-1).amax() * value.norm(dim=-1).amax()
    columns = weights(query, key, heads, scaling).sum(2).unflatten(1, (kv_heads, -1))
    assert output.max() <= 2 * eps * value.norm(dim=-1).amax()
    assert output.max() > 1e-12  # something was left out
    rounding = 1e-12
    assert grads[0].max() <= 6 * eps * scaling * moment * spread + rounding
    assert bool((grads[1] <= 2 * eps * scaling * longest * moment * (1 + 4 * columns).sum(2)).all())
    assert bool((grads[2] <= grad.norm(dim=-1).amax() * eps * (1 + 2 * columns).sum(2)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_windows_of_a_dtype_do_not_show_in_it(dtype: torch.dtype) -> None:
    heads = slopes_of("middling")
    states = [each.to(dtype) for each in (*normal((1, 4, 1500, 32), 4), torch.randn(1, 4, 1500, 32))]
    distances = by_index(heads, 1500, 1500)
    windows = head_windows(*states[:2], heads, 0.18, default_eps(dtype, gradients=False))
    groups = plan_groups(windows.tolist(), 1500, 1500)
    assert sum(group.pairs(1500, 1500) for group in groups) < 0.8 * Group(0, 4, 1500).pairs(1500, 1500)
    found, dense = (tiled_attention(*states, distances, 0.18, each) for each in (groups, [Group(0, 4, 1500)]))
    rounding = torch.finfo(dtype).eps * states[2].double().norm(dim=-1).amax()
    assert (found.double() - dense.double()).abs().max() <= rounding
    truth = attend(*states, heads, 0.18)
    rms = [(each.double() - truth).square().mean().sqrt() for each in (found, dense)]
    assert rms[0] <= 1.1 * rms[1]


def test_float32_at_4097_tokens() -> None:
    heads = torch.tensor([0.25, 0.0625])
    query, key = normal((1, 2, 4097, 32), 2)
    value = torch.randn_like(key)
    windows = head_windows(query, key, heads, 0.18, default_eps(torch.float32, gradients=False))
    groups = plan_groups(windows.tolist(), 4097, 4097)
    assert max(group.window for group in groups) < 2000
    found = tiled_attention(query, key, value, by_index(heads, 4097, 4097), 0.18, groups)
    truth = attend(query, key, value, heads, 0.18)
    assert (found - truth).abs().max() <= 2e-6 * truth.abs().max()
