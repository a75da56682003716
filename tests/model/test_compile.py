"""torch.compile and torch.export: one graph, no recompilation in decode, dynamic lengths, and the same numbers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import StaticCache

from tests.model.cases import assert_close, build, documents, expected
from tests.model.feeding import flattened, pad

CASES = ("six", "twelve_grouped", "sqrt")
BACKENDS = ("sdpa", "eager")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Start from an empty compilation cache, and refuse recompilation only where a test asks for it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decode(model: Any, step: Any, text: torch.Tensor, prefilled: int, padded: bool) -> torch.Tensor:
    """Return the logits of each token after the first `prefilled`, a compiled step each; one compilation is allowed."""
    cache = StaticCache(config=model.config, max_cache_len=64)
    mask = torch.ones(1, 64, dtype=torch.long) if padded else None
    given = {"past_key_values": cache, "attention_mask": mask}
    model(text[None, :prefilled], **given)
    outputs = []
    for index in range(prefilled, len(text)):
        with torch._dynamo.config.patch(error_on_recompile=bool(outputs)):
            outputs.append(step(text[None, index : index + 1], **given).logits[0, 0].clone())
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "flex_attention"])
@pytest.mark.parametrize("case", CASES)
def test_decode_is_one_graph_that_is_compiled_once(case: str, backend: str, padded: bool) -> None:
    model, text = build(case, torch.float32, backend), documents(40)[0]
    step = torch.compile(model, fullgraph=True, backend="eager")
    found = decode(model, step, text, 25, padded)
    assert_close(found, expected(case, text).logits[25:], 1e-5)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("backend", [*BACKENDS, "flex_attention"])
def test_decode_through_inductor(backend: str) -> None:
    model, text = build("six", torch.float32, backend), documents(40)[0]
    found = decode(model, torch.compile(model, fullgraph=True), text, 25, padded=False)
    assert_close(found, expected("six", text).logits[25:], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_prefill_is_one_graph_of_any_length(case: str, backend: str) -> None:
    model = build(case, torch.float32, backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, text in enumerate(documents(40, 23, 300, 7)):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            found = compiled(text[None], use_cache=False).logits[0]
        assert_close(found, expected(case, text).logits, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_and_packed_batches_compile(backend: str) -> None:
    model, texts = build("six", torch.float32, backend), documents(20, 33)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = pad(texts, "left")
    padded = compiled(ids, attention_mask=mask, use_cache=False).logits
    flat = flattened(texts)
    positions = {name: flat[name] for name in ("input_ids", "position_ids")}
    packed = [
        compiled(**positions, use_cache=False).logits[0],
        compiled(flat["input_ids"], seq_idx=flat["seq_idx"], use_cache=False).logits[0],
        compiled(flat["input_ids"], cu_seq_lens_q=flat["cu_seq_lens_q"], use_cache=False).logits[0],
    ]
    for row, text in enumerate(texts):
        truth = expected("six", text).logits
        assert_close(padded[row, mask[row].bool()], truth, 1e-5)
        for logits in packed:
            assert_close(logits.split([20, 33])[row], truth, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_padded_batch_is_one_graph_of_any_length(backend: str) -> None:
    model = build("six", torch.float32, backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, lengths in enumerate([(20, 33), (9, 50), (41, 13)]):
        texts = documents(*lengths)
        ids, mask = pad(texts, "left")
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            found = compiled(ids, attention_mask=mask, use_cache=False).logits
        for row, text in enumerate(texts):
            assert_close(found[row, mask[row].bool()], expected("six", text).logits, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_compile(backend: str) -> None:
    text = documents(40)[0][None]
    plain = build("six", torch.float32, backend)
    compiled = torch.compile(build("six", torch.float32, backend), fullgraph=True, backend="aot_eager")
    for model in (plain, compiled):
        model(text, labels=text, use_cache=False).loss.backward()
    for found, truth in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, truth.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_export_with_dynamic_length(case: str, backend: str) -> None:
    model = build(case, torch.float32, backend)
    text = documents(24)[0][None]
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {"input_ids": {1: length}, "use_cache": None}
    exported = torch.export.export(model, (), {"input_ids": text, "use_cache": False}, dynamic_shapes=shapes)
    for other in documents(2, 40, 301):
        found = exported.module()(input_ids=other[None], use_cache=False).logits[0]
        assert_close(found, expected(case, other).logits, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_export_with_a_padding_mask(backend: str) -> None:
    model = build("six", torch.float32, backend)
    ids, mask = pad(documents(20, 33), "left")
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=4096)
    shapes = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}, "use_cache": None}
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    exported = torch.export.export(model, (), given, dynamic_shapes=shapes).module()
    texts = documents(9, 50, 31)
    ids, mask = pad(texts, "left")
    found = exported(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for row, text in enumerate(texts):
        assert_close(found[row, mask[row].bool()], expected("six", text).logits, 1e-5)
