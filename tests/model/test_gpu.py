"""What only a CUDA device can show: every backend and feeding against the float64 reference, and flex's real kernels.

The reference runs on the CPU. Compiled kernels are shared by the tests of this file; a limit on recompilation that is
reached fails.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import StaticCache

from alibi_hf.model import flex_alibi
from alibi_hf.model.bias_alibi import Distances, alibi_slopes
from alibi_hf.model.dense_alibi import eager_attention
from tests.model.cases import (
    BACKENDS,
    CASES,
    SQRT_TOLERANCE,
    TOLERANCE,
    assert_close,
    build,
    documents,
    expected,
    windowed,
)
from tests.model.feeding import FEEDS, Feed, Texts, flattened, pad, whole
from tests.model.test_precision import INPUTS
from tests.model.training import check_gradients, enable_checkpointing

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
LENGTHS = (1, 2, 127, 128, 129, 1000, 4097)
LONG = 1000  # from here on a model of two heads and one layer
SCALING = 0.125
FLASH = pytest.param(
    "flash_attention_2",
    marks=pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the package flash_attn"),
)


@pytest.fixture(autouse=True)
def room_for_kernels() -> Iterator[None]:
    """Let each function have many compiled variants, since these tests use many shapes; running out of them fails."""
    settings = {"recompile_limit": 64, "accumulated_recompile_limit": 1024, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(settings):
        yield


def fed(model: Any, feed: Callable, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the logits of each document, fed on the device."""
    with torch.no_grad(), torch.device(DEVICE):
        return [logits.cpu() for logits in feed(model, [text.to(DEVICE) for text in texts])]


def check(case: str, dtype: torch.dtype, backend: str, feed: str, *lengths: int) -> None:
    """Assert that the case gives each document the reference's logits, fed on the device."""
    texts = documents(*lengths)
    bound = max(TOLERANCE[dtype], SQRT_TOLERANCE if case == "sqrt" else 0.0)
    found = fed(build(case, dtype, backend).to(DEVICE), FEEDS[feed], texts)
    for text, logits in zip(texts, found, strict=True):
        assert_close(logits, expected(case, text).logits, bound)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_way_of_feeding(backend: str, feed: str, length: int) -> None:
    case = "two_heads" if length >= LONG else "twelve_grouped"
    check(case, torch.float32, backend, feed, length, 40, 1)


@pytest.mark.parametrize("feed", ["whole", "left", "packed_positions", "interior_static", "mask_4d_bool"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64(backend: str, feed: str) -> None:
    check("twelve_grouped", torch.float64, backend, feed, 129, 40, 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_case(backend: str, case: str) -> None:
    if (case, backend) == ("capped", "sdpa"):
        pytest.skip("sdpa has no soft cap on scores")
    for length in (1, 129, 300):
        check(case, torch.float32, backend, "whole", length)
    if case != "scaled_by_length":  # refuses padded and packed rows
        check(case, torch.float32, backend, "left", 150, 20)
        check(case, torch.float32, backend, "packed_positions", 150, 20)


@pytest.mark.parametrize("rounding", ["bloom", "falcon"])
@pytest.mark.parametrize("feed", ["whole", "left", "packed_positions"])
def test_rounded_bias(feed: str, rounding: str) -> None:
    texts = documents(140, 17)
    with torch.no_grad():
        truth = whole(build("after_norm", torch.float64, "eager", alibi_rounding=rounding), texts)
    for backend in BACKENDS:
        # Float64 keeps the row exact; float32 rounds it, which the other backends do alike.
        model = build("after_norm", torch.float32, backend, alibi_rounding=rounding).to(DEVICE)
        for logits, true_logits in zip(fed(model, FEEDS[feed], texts), truth, strict=True):
            assert_close(logits, true_logits, 1e-4)


def moved(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the inputs on the device."""
    return {name: value.to(DEVICE) for name, value in given.items()}


@torch.no_grad()
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention", FLASH])
def test_sixteen_bits_are_as_near_to_float64_as_eager(backend: str, dtype: torch.dtype, inputs: str) -> None:
    given, counts = INPUTS[inputs]()
    given, counts = moved(given), counts.to(DEVICE)
    model = build("twelve_grouped", torch.float32, head_dim=16).to(DEVICE, dtype)
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    reference = exact(**given).logits[counts]

    def rms(name: str) -> float:
        model.set_attn_implementation(name)
        return (model(**given).logits[counts].double() - reference).square().mean().sqrt().item()

    eager = rms("eager")
    assert 0 < eager < 0.1 * reference.square().mean().sqrt()
    assert rms(backend) <= 1.1 * eager


def on_device(feed: Feed) -> Feed:
    """Return the same way of feeding, on the device."""

    def moving(model: Any, texts: Texts) -> list[torch.Tensor]:
        with torch.device(DEVICE):
            return feed(model, [text.to(DEVICE) for text in texts])

    return moving


@pytest.mark.parametrize("checkpointing", [None, "not_reentrant"])
@pytest.mark.parametrize("feed", ["no_cache", "left", "packed_positions_no_cache"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["six", "twelve_grouped", "multi_query", "sqrt"])
def test_gradients_of_a_model(case: str, backend: str, feed: str, checkpointing: str | None) -> None:
    model = build(case, torch.float32, backend).to(DEVICE)
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
    check_gradients(model, on_device(FEEDS[feed]), case, documents(150, 400, 90))


# The attention function alone, long enough for windows


def make_distances(tokens: int, heads: int = 2, offset: int | torch.Tensor = 0, keys: int | None = None) -> Distances:
    """Return the distances of one document a row."""
    return Distances(
        slopes=torch.tensor(alibi_slopes(heads), dtype=torch.float32, device=DEVICE),
        query_index=torch.arange(tokens, device=DEVICE) + offset,
        num_keys=keys or tokens,
        offset=offset,
    )


def states(tokens: int, dtype: torch.dtype, heads: int = 2, key_heads: int = 2, batch: int = 1) -> list[torch.Tensor]:
    """Return random query, key, value and gradient of the output."""
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    shapes = [(batch, count, tokens, 64) for count in (heads, key_heads, key_heads, heads)]
    return [torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for shape in shapes]


def results(attend: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output of `attend(query, key, value)` and the gradients of all three."""
    *leaves, grad = (x.detach().clone() for x in inputs)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def exactly(distances: Distances, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return output and gradients of eager attention in float64."""
    return results(lambda *x: eager_attention(*x, distances, SCALING)[0], [x.double() for x in inputs])


def assert_near(found: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    """Assert that output and gradients are float32's own distance from the truth."""
    for one, other, bound in zip(found, truth, (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        assert_close(one, other, bound)


@pytest.mark.parametrize("window_eps", [None, torch.finfo(torch.float32).eps / 16], ids=["dense", "windowed"])
@pytest.mark.parametrize("shape", [(2, 2, 1), (2, 1, 2)], ids=["heads", "grouped_batch"])
@pytest.mark.parametrize("tokens", [8192, 8300])
def test_gradients_of_flex(tokens: int, shape: tuple[int, ...], window_eps: float | None) -> None:
    distances, inputs = make_distances(tokens), states(tokens, torch.float32, *shape)
    found = results(
        lambda *x: flex_alibi.flex_alibi(*x, windowed(distances, window_eps), SCALING),
        inputs,
    )
    assert_near(found, exactly(distances, inputs))


@pytest.mark.parametrize("window_eps", [None, torch.finfo(torch.bfloat16).eps / 16], ids=["dense", "windowed"])
def test_gradients_of_flex_in_bfloat16_are_as_near_as_those_of_eager(window_eps: float | None) -> None:
    distances, inputs = make_distances(8300), states(8300, torch.bfloat16)
    truth = exactly(distances, inputs)
    eager = results(lambda *x: eager_attention(*x, distances, SCALING)[0], inputs)
    found = results(lambda *x: flex_alibi.flex_alibi(*x, windowed(distances, window_eps), SCALING), inputs)
    for one, other, true in zip(found, eager, truth, strict=True):
        assert (one.double() - true).square().mean() <= 1.1**2 * (other.double() - true).square().mean()


def test_kernels_read_what_is_listed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward under windows that lose a lot equal attention masked to the same blocks."""
    tokens, windows = 8192, torch.tensor([1.0, 300.0], device=DEVICE)
    monkeypatch.setattr(flex_alibi, "head_windows", lambda *_: windows)
    distances, inputs = make_distances(tokens), states(tokens, torch.float32, batch=2)
    found = results(lambda *x: flex_alibi.flex_alibi(*x, windowed(distances, 1e-3), SCALING), inputs)
    block = torch.arange(tokens, device=DEVICE) // 128
    gap = 128 * (block[:, None] - block) - 127
    masked = make_distances(tokens)
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).tril()
    masked.custom_mask = (causal & (gap <= windows[:, None, None]))[None]
    assert_near(found, exactly(masked, inputs))
    dense = exactly(distances, inputs)
    assert all((one - other).abs().max() > 1e-3 * other.abs().max() for one, other in zip(found, dense, strict=True))


@pytest.mark.parametrize("window_eps", [None, 1e-3], ids=["dense", "windowed"])
def test_lists_shared_by_heads_are_read_as_lists_of_each_head(
    window_eps: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances, inputs = make_distances(8300, heads=4), states(8300, torch.float32, 4, 4, 2)
    shared = results(lambda *x: flex_alibi.flex_alibi(*x, windowed(distances, window_eps), SCALING), inputs)
    make = flex_alibi.make_block_mask

    def contiguous(*args: Any) -> BlockMask:
        mask = make(*args)
        for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
            setattr(mask, name, getattr(mask, name).contiguous())
        return mask

    monkeypatch.setattr(flex_alibi, "make_block_mask", contiguous)
    torch._dynamo.reset()
    own = results(lambda *x: flex_alibi.flex_alibi(*x, windowed(distances, window_eps), SCALING), inputs)
    torch._dynamo.reset()
    assert all(map(torch.equal, shared, own))


def test_decoding_against_a_static_cache_reads_only_what_is_filled() -> None:
    capacity = 4096
    _, key, value, _ = states(capacity, torch.float32)
    for filled in (0, 1, 127, 128, 2000, capacity - 1):
        offset = torch.tensor(filled, device=DEVICE)
        distances, query = make_distances(1, 2, offset, capacity), torch.randn(1, 2, 1, 64, device=DEVICE)
        truth = eager_attention(query.double(), key.double(), value.double(), distances, SCALING)[0]
        spoilt = value.clone()
        spoilt[:, :, -(-(filled + 1) // 128) * 128 :] = math.nan
        with torch.no_grad():
            assert_close(flex_alibi.flex_alibi(query, key, spoilt, distances, SCALING), truth, 1e-5)


def test_nothing_reaches_the_host() -> None:
    inputs = [x.requires_grad_() for x in states(8192, torch.bfloat16)[:3]]

    def step() -> None:
        flex_alibi.flex_alibi(*inputs, windowed(distances, 1e-3), SCALING).sum().backward()

    for number in range(3):
        distances = make_distances(8192)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first call compiles
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("window_eps", [None, 1e-3], ids=["dense", "windowed"])
def test_memory_grows_with_the_length_alone(window_eps: float | None) -> None:
    tokens = 32768
    inputs = [x.requires_grad_() for x in states(tokens, torch.bfloat16)[:3]]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flex_alibi.flex_alibi(*inputs, windowed(make_distances(tokens), window_eps), SCALING).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 64 * inputs[0].nbytes  # one head's scores alone would be 256 times as much


# Whole models that a user compiles


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_compiled_model(backend: str) -> None:
    torch._dynamo.reset()
    model = build("twelve_grouped", torch.float32, backend, head_dim=16).to(DEVICE)
    exact = build("twelve_grouped", torch.float64, "eager", head_dim=16)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for text in documents(140, 300, 256, 23):
        found = compiled(text[None].to(DEVICE), use_cache=False).logits.cpu()
        assert_close(found, exact(text[None]).logits, 1e-5)
    texts = documents(130, 33)
    ids, mask = pad(texts, "left")
    found = compiled(ids.to(DEVICE), attention_mask=mask.to(DEVICE), use_cache=False).logits.cpu()
    flat = moved({name: flattened(texts)[name] for name in ("input_ids", "position_ids")})
    packed = compiled(**flat, use_cache=False).logits[0].cpu().split([130, 33])
    for row, text in enumerate(texts):
        truth = exact(text[None]).logits[0]
        assert_close(found[row, mask[row].bool()], truth, 1e-5)
        assert_close(packed[row], truth, 1e-5)


@pytest.mark.parametrize("length", [128, 200])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_compiled_model(backend: str, length: int) -> None:
    torch._dynamo.reset()
    text = documents(length)[0][None]
    exact, model = build("six", torch.float64, "eager"), build("six", torch.float32, backend).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True)
    exact(text, labels=text, use_cache=False).loss.backward()
    compiled(text.to(DEVICE), labels=text.to(DEVICE), use_cache=False).loss.backward()
    for (name, one), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        if not name.endswith("k_proj.bias"):
            assert_close(one.grad.cpu(), other.grad, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_compiled_decoding_compiles_once(backend: str) -> None:
    torch._dynamo.reset()
    text, start = documents(300)[0], 250
    model = build("two_heads", torch.float32, backend).to(DEVICE)
    step = torch.compile(model, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=512)
    ids = text[None].to(DEVICE)
    model(ids[:, :start], past_key_values=cache)
    outputs: list[torch.Tensor] = []
    for index in range(start, len(text)):
        with torch._dynamo.config.patch(error_on_recompile=bool(outputs)):
            outputs.append(step(ids[:, index : index + 1], past_key_values=cache).logits[0, 0].clone())
    assert_close(torch.stack(outputs).cpu(), expected("two_heads", text).logits[start:], 1e-5)
