"""The growing cache: everywhere what `DynamicCache` gives, to the bit, and no copy of what is already in the cache."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from alibi_hf import AlibiForCausalLM
from alibi_hf.model.cache_alibi import MIN_ROOM, GrowingCache, GrowingLayer, capacity_for, grow, make_cache
from tests.model.cases import build, documents
from tests.model.feeding import pad

CASE, LENGTHS = "twelve_grouped", (25, 40, 9)
BATCH, HEADS, DIM = 3, 2, 4
PLANS = {  # tokens of each update; the last one outgrows the first buffers twice
    "prefill_and_tokens": (7, 1, 1, 1),
    "chunks": (3, 20, 1, 64, 5),
    "long": (10, *[1] * (3 * MIN_ROOM)),
}


class GrowingLM(AlibiForCausalLM):
    """A model whose `generate` starts from a growing cache, as the decoder's own does."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if given is None and made is not None and generation_config.cache_implementation is None:
            model_kwargs["past_key_values"] = grow(made)


def states(tokens: int, seed: int, batch: int = BATCH, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, tokens, HEADS, DIM, generator=generator).to(dtype)
    return keys.transpose(1, 2), values.transpose(1, 2)  # as a model's projections lie


def feed(cache: Any, plan: tuple[int, ...], seed: int = 0, **options: Any) -> list[Any]:
    """Fill two layers; return all that the updates returned."""
    returned = []
    for step, tokens in enumerate(plan):
        for layer in (0, 1):
            returned.append(cache.update(*states(tokens, seed + 1000 * layer + step, **options), layer))
    return returned


def assert_same(found: Any, truth: Any) -> None:
    """Assert that two caches hold the same, and say the same of themselves."""
    assert len(found) == len(truth)
    for layer in range(len(truth)):
        assert found.get_seq_length(layer) == truth.get_seq_length(layer)
        assert found.get_mask_sizes(5, layer) == truth.get_mask_sizes(5, layer)
        assert found.get_query_offset(layer) == truth.get_query_offset(layer)
    for ours, theirs in zip(found, truth, strict=True):
        assert len(ours) == len(theirs)
        if theirs[0] is None:
            assert ours[0] is None and ours[1] is None
            continue
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert ours[0].dtype == theirs[0].dtype


@pytest.fixture
def caches() -> tuple[GrowingCache, DynamicCache]:
    return GrowingCache(), DynamicCache()


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


# The layers, one by one


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates(caches: Any, plan: tuple[int, ...], dtype: torch.dtype) -> None:
    ours, theirs = (feed(cache, plan, dtype=dtype) for cache in caches)
    assert_same(*caches)
    for found, truth in zip(ours, theirs, strict=True):  # checked last: no later update may change an earlier view
        assert torch.equal(found[0], truth[0]) and torch.equal(found[1], truth[1])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "crop": lambda cache: cache.crop(-4),
    "crop_nothing": lambda cache: cache.crop(0),
    "crop_all": lambda cache: cache.crop(-10),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
    "select_by_mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "replace": lambda cache: (
        setattr(cache.layers[0], "keys", cache.layers[0].keys[:, :, :7].clone() * 2)
        or setattr(cache.layers[0], "values", cache.layers[0].values[:, :, :7].clone())
    ),
    "edit": lambda cache: cache.layers[0].keys.mul_(2),
    "offload": lambda cache: [(layer.offload(), layer.prefetch()) for layer in cache.layers],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_between_updates(caches: Any, change: Callable[[Any], Any]) -> None:
    before = [feed(cache, (8, 1, 1)) for cache in caches]
    for cache in caches:
        change(cache)
    assert_same(*caches)
    batch = caches[1].layers[0].keys.shape[0]
    for cache in caches:
        feed(cache, (1, 3, 1), seed=7, batch=batch)
    assert_same(*caches)
    if change is not CHANGES["edit"]:
        for found, truth in zip(*before, strict=True):  # what was shown before is still what it was
            assert torch.equal(found[0], truth[0]) and torch.equal(found[1], truth[1])


def test_reset_forgets_and_keeps_what_was_shown() -> None:
    cache = GrowingCache()
    shown = feed(cache, (8, 1))[-1][0]
    kept = shown.clone()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(3, 0) == (3, 0)
    feed(cache, (5, 1), seed=3, batch=1)
    truth = DynamicCache()
    feed(truth, (5, 1), seed=3, batch=1)
    assert_same(cache, truth)
    assert torch.equal(shown, kept)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deep", "pickle"]
)
def test_copies_are_independent(copied: Callable[[Any], Any]) -> None:
    first, truth = GrowingCache(), DynamicCache()
    feed(first, (8, 1))
    feed(truth, (8, 1))
    second, other = copied(first), copied(truth)
    for cache in (first, truth):
        feed(cache, (1, 1), seed=11)
    for cache in (second, other):
        cache.crop(-2)
        feed(cache, (2, 1), seed=22)
    assert_same(first, truth)
    assert_same(second, other)


def test_a_shallow_copy_of_a_layer_writes_elsewhere() -> None:
    first = GrowingLayer()
    first.update(*states(8, 0))
    second = copy.copy(first)
    mine, other = first.update(*states(1, 1))[0], second.update(*states(1, 2))[0]
    assert torch.equal(mine[:, :, 8:], states(1, 1)[0]) and torch.equal(other[:, :, 8:], states(1, 2)[0])


def test_a_saved_cache_has_no_spare_room() -> None:
    sizes = []
    for cache in (GrowingCache(), DynamicCache()):
        feed(cache, (8, 1))
        stream = io.BytesIO()
        torch.save(cache, stream)
        sizes.append(stream.tell())
    assert sizes[0] < sizes[1] + 1000


def test_from_the_states_of_another_cache() -> None:
    truth = DynamicCache()
    feed(truth, (8, 1))
    again, taken = GrowingCache(iter(truth)), grow(copy.deepcopy(truth))
    for cache in (truth, again, taken):
        feed(cache, (1, 2), seed=5)
    assert_same(again, truth)
    assert_same(taken, truth)


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_dtypes_are_promoted_as_by_concatenation(caches: Any, first: torch.dtype) -> None:
    for cache in caches:
        feed(cache, (8,), dtype=first)
        feed(cache, (1, 1), seed=5, dtype=torch.float32 if first == torch.bfloat16 else torch.bfloat16)
    assert_same(*caches)


def test_another_batch_is_refused_as_by_concatenation(caches: Any) -> None:
    for cache in caches:
        feed(cache, (8, 1))
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            feed(cache, (1,), batch=1)  # would broadcast


def test_inference_mode_and_back(caches: Any) -> None:
    for cache in caches:
        with torch.inference_mode():
            feed(cache, (8, 1))
        feed(cache, (1, 1), seed=3)
        with torch.inference_mode():
            feed(cache, (1, 1), seed=4)
    assert_same(*caches)


def test_what_it_says_of_itself() -> None:
    config = build(CASE).config
    cache = GrowingCache(config=config)
    assert isinstance(cache, DynamicCache) and len(cache) == config.num_hidden_layers
    assert all(type(layer) is GrowingLayer for layer in cache.layers)
    assert cache.is_croppable and not cache.is_compileable and not cache.is_initialized
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(4, 0) == (4, 0) and cache.get_max_length(0) == -1
    assert type(make_cache(config)) is GrowingCache
    assert grow(cache) is cache and grow(None) is None


# How much is copied


class Copied(TorchDispatchMode):
    """Counts the entries of the results of operations that are no views: what was allocated or written."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(result, torch.Tensor):
            self.largest, self.total = max(self.largest, result.numel()), self.total + result.numel()
        return result


NEW_TOKEN = states(1, 0)


def copied_by_an_update(cache: Any, context: int) -> int:
    feed(cache, (context,))
    with Copied() as copied:
        cache.update(*NEW_TOKEN, 0)
    return copied.largest


def test_an_update_copies_one_token() -> None:
    token = NEW_TOKEN[0].numel()
    assert [copied_by_an_update(GrowingCache(), context) for context in (16, 256, 2048)] == [token] * 3
    assert copied_by_an_update(DynamicCache(), 2048) == 2049 * token  # so the count sees what it should


def test_all_updates_together_copy_each_token_a_few_times() -> None:
    cache, tokens = GrowingCache(), 4000
    with Copied() as copied:
        for _ in range(tokens):
            cache.update(*NEW_TOKEN, 0)
    held = 2 * tokens * NEW_TOKEN[0].numel()
    assert copied.total < 12 * held  # with DynamicCache: 2000 times
    keys = cache.layers[0].keys
    assert keys.untyped_storage().nbytes() <= 4 * keys.numel() * capacity_for(tokens) // tokens


def test_a_decode_step_of_the_model_copies_no_keys() -> None:
    model = build("one_head", torch.float32)
    limit = 600 * model.config.head_dim  # the keys of the context; a row of scores or bias is far smaller
    largest = []
    for kind in (GrowingCache, DynamicCache):
        cache = kind(config=model.config)
        ids = documents(600)[0][None]
        model(ids, past_key_values=cache)
        with Copied() as copied:
            model(ids[:, :1], past_key_values=cache)
        largest.append(copied.largest)
    assert largest[0] < limit <= largest[1]


def test_a_reorder_and_an_update_copy_the_cache_once() -> None:
    cache = GrowingCache()
    feed(cache, (500,))
    with Copied() as copied:
        cache.layers[0].reorder_cache(torch.tensor([1, 1, 0]))
        cache.update(*NEW_TOKEN, 0)
    assert copied.total < 1.4 * 2 * 2 * 500 * NEW_TOKEN[0].numel()  # allocated with room, written once: keys and values


@pytest.mark.parametrize("name", ["select", "repeat", "select_by_mask"])
def test_memory_is_let_go(name: str) -> None:
    cache = GrowingCache()
    feed(cache, (8, 1))
    CHANGES[name](cache)
    assert all(layer._buffers is None for layer in cache.layers)


# Gradients


@torch.enable_grad()
@pytest.mark.parametrize("first", ["with", "without"])
def test_gradients_through_a_cache(first: str) -> None:
    """A first part read with or without gradients, then two parts with them, in one graph."""
    gradients = []
    for kind in (GrowingCache, DynamicCache):
        model = build(CASE)
        cache = kind(config=model.config)
        text = documents(30)[0][None]
        with torch.set_grad_enabled(first == "with"):
            outputs = [model(text[:, :10], past_key_values=cache).logits]
        outputs += [model(text[:, a:b], past_key_values=cache).logits for a, b in ((10, 20), (20, 21), (21, 30))]
        sum(each.square().sum() for each in outputs if each.requires_grad).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@torch.enable_grad()
def test_gradients_of_the_queries_alone() -> None:
    """Only q_proj learns: keys need no gradient, but the graph needs them as they were."""
    gradients = []
    for kind in (GrowingCache, DynamicCache):
        model = build(CASE)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.0.self_attn.q_proj" in name)
        cache = kind(config=model.config)
        text = documents(12)[0][None]
        total = sum(model(text[:, a:b], past_key_values=cache).logits.sum() for a, b in ((0, 6), (6, 7), (7, 12)))
        total.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


@torch.enable_grad()
def test_a_graph_may_hold_what_the_cache_has_shown() -> None:
    cache = GrowingCache()
    with torch.no_grad():
        feed(cache, (8, 1))
    keys = cache.layers[0].keys
    weight = torch.ones(DIM, requires_grad=True)
    product, truth = (keys * weight).sum(), keys.sum((0, 1, 2)).clone()
    with torch.no_grad():
        feed(cache, (1, 1), seed=4)
    product.backward()
    torch.testing.assert_close(weight.grad, truth)


# The model and `generate`


def generated(cls: Any, kind: Any, prompt: slice = slice(None), new: int = 70, **options: Any) -> Any:
    """Return what a model of `cls` writes, starting from an empty `kind` of cache if there is one."""
    model = build(CASE, torch.float32, cls=cls)
    ids, mask = pad(documents(*LENGTHS), "left")
    if kind is not None:
        options["past_key_values"] = kind(config=model.config)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "return_dict_in_generate": True, "do_sample": False}
    torch.manual_seed(5)
    return model.generate(ids[prompt], attention_mask=mask[prompt], output_logits=True, **{**settings, **options})


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunked_prefill": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_generate(options: dict[str, Any]) -> None:
    ours, theirs = generated(GrowingLM, None, **options), generated(AlibiForCausalLM, DynamicCache, **options)
    assert type(ours.past_key_values) is GrowingCache
    assert type(theirs.past_key_values) is DynamicCache
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(map(torch.equal, ours.logits, theirs.logits))
    assert_same(ours.past_key_values, theirs.past_key_values)


@pytest.mark.parametrize("way", ["assistant", "prompt_lookup"])
def test_generate_with_candidates(way: str) -> None:
    results = []
    for cls, kind in ((GrowingLM, None), (AlibiForCausalLM, DynamicCache)):
        other = build(CASE, torch.float32, cls=cls)  # an assistant that is often wrong, so that the cache is cropped
        torch.manual_seed(2)
        other.model.norm.weight += 0.4 * torch.randn_like(other.model.norm.weight)
        options = {"assistant_model": other} if way == "assistant" else {"prompt_lookup_num_tokens": 3}
        results.append(generated(cls, kind, slice(1, 2), 40, **options))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert type(results[0].past_key_values) is GrowingCache
    assert_same(results[0].past_key_values, results[1].past_key_values)


def test_generate_goes_on_from_a_cache() -> None:
    """Three answers to one prompt, each from a copy of its cache."""
    results: dict[Any, list[torch.Tensor]] = {GrowingCache: [], DynamicCache: []}
    text = documents(40)[0][None]
    for kind, written in results.items():
        model = build(CASE, torch.float32)
        cache = kind(config=model.config)
        model(text[:, :30], past_key_values=cache)
        branches = [copy.deepcopy(cache), copy.deepcopy(cache), cache]
        for row, branch in enumerate(branches):
            ids = torch.cat([text[:, :30], text[:, 30 + row : 33 + row]], dim=1)
            given = {"attention_mask": torch.ones_like(ids), "past_key_values": branch}
            written.append(model.generate(ids, **given, max_new_tokens=9, min_new_tokens=9, do_sample=False))
        assert all(type(branch) is kind and branch.get_seq_length() == 41 for branch in branches)
    assert all(map(torch.equal, *results.values()))


def test_a_cache_that_was_asked_for_is_left_alone() -> None:
    assert type(generated(GrowingLM, DynamicCache, new=3).past_key_values) is DynamicCache
    for name in ("dynamic", "static"):
        cache = generated(GrowingLM, None, new=3, cache_implementation=name).past_key_values
        assert not isinstance(cache, GrowingCache)
    assert generated(GrowingLM, None, new=3, use_cache=False).past_key_values is None


def test_compiled_updates_concatenate(caches: Any) -> None:
    def step(cache: Any, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        keys, values = cache.update(keys, values, 0)
        return keys.sum() + values.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for cache in caches:
        feed(cache, (8, 1))
        run = compiled if isinstance(cache, GrowingCache) else step
        results = [run(cache, *states(1, seed)) for seed in (5, 6, 7)]
        feed(cache, (1,), seed=9)
    assert_same(*caches)
    assert all(result.isfinite() for result in results)
