"""flash_attention_2 against float64, through a stand-in for its package; what it refuses; what runs for its like.

The stand-in can compute on CPU and in any dtype: most feeding is checked at float64's own precision. The last tests
run the real package on a GPU.
"""

import copy
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from alibi_hf import AlibiForCausalLM
from alibi_hf.model import attention_alibi, flash_alibi
from tests.model.cases import CASES, assert_close, build, check, config_of, documents
from tests.model.feeding import FEEDS, flattened, pad
from tests.model.training import TRAINING_FEEDS, check_gradients, enable_checkpointing
from tests.references import flash_attn as stand_in

FLASH = "flash_attention_2"
FED = [name for name in FEEDS if not name.startswith("mask_4d")]
TEXTS = documents(13, 24, 1, 8)
ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")


@pytest.fixture
def sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Put the stand-in in the package's place, on CPU, in the two dtypes of the real one."""
    package = types.SimpleNamespace(**{name: getattr(stand_in, name) for name in FUNCTIONS})
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(flash_alibi, "_package", None)
    monkeypatch.setattr(flash_alibi, "DEVICE", "cpu")
    return package


@pytest.fixture
def package(sixteen_bits: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Put the stand-in in the package's place, on CPU, in every dtype."""
    monkeypatch.setattr(flash_alibi, "DTYPES", ALL_DTYPES)
    monkeypatch.setattr(stand_in, "DTYPES", ALL_DTYPES)
    return sixteen_bits


def exchange(package: types.SimpleNamespace, edit: Callable[[str, dict[str, Any]], None]) -> None:
    """Let `edit` see, and change, the name and the keywords of each call of the package."""

    def wrap(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def edited(*args: Any, **kwargs: Any) -> torch.Tensor:
            edit(name, kwargs)
            return function(*args, **kwargs)

        return edited

    for name in FUNCTIONS:
        setattr(package, name, wrap(name, getattr(package, name)))


@pytest.mark.parametrize("feed", FED)
@pytest.mark.parametrize("case", ["six", "twelve_grouped", "capped"])
def test_any_way_of_feeding(case: str, feed: str, package: Any) -> None:
    check(build(case, torch.float64, FLASH), FEEDS[feed], case, TEXTS)


@pytest.mark.parametrize("case", [case for case in CASES if case != "sqrt"])
def test_every_config(case: str, package: Any) -> None:
    check(build(case, torch.float64, FLASH), FEEDS["whole"], case, documents(1, 2, 129))


@torch.no_grad()
@pytest.mark.parametrize(
    ("feed", "dtype"),
    [(feed, torch.bfloat16) for feed in FED] + [(feed, torch.float16) for feed in ("whole", "left_dynamic")],
)
def test_sixteen_bits_are_as_near_to_float64_as_eager(feed: str, dtype: torch.dtype, sixteen_bits: Any) -> None:
    model = build("twelve_grouped", torch.float32, "eager").to(dtype)
    truth = torch.cat(FEEDS["whole"](copy.deepcopy(model).double(), TEXTS))

    def rms() -> float:
        return (torch.cat(FEEDS[feed](model, TEXTS)).double() - truth).square().mean().sqrt().item()

    eager = rms()
    model.set_attn_implementation(FLASH)
    assert 0 < rms() <= 1.1 * eager < 0.1 * truth.square().mean().sqrt()


# Which function of the package each way of feeding ends in: decoding copies no keys, whatever the cache.
PATHS = {
    "whole": {"flash_attn_func"},
    "tokens_dynamic": {"flash_attn_func"},
    "tokens_static": {"flash_attn_with_kvcache"},
    "left": {"flash_attn_varlen_func"},
    "packed_positions": {"flash_attn_varlen_func"},
    "left_dynamic": {"flash_attn_varlen_func", "flash_attn_with_kvcache"},
    "left_static": {"flash_attn_varlen_func", "flash_attn_with_kvcache"},
}


@torch.no_grad()
@pytest.mark.parametrize("feed", PATHS)
def test_which_function_is_called(feed: str, package: Any) -> None:
    called = set()
    exchange(package, lambda name, _: called.add(name))
    FEEDS[feed](build("six", torch.float64, FLASH), documents(9, 14))
    assert called == PATHS[feed]


def in_keywords(**changes: Callable[[Any], Any]) -> Callable[[str, dict[str, Any]], None]:
    """Return an edit that changes those of the keywords that are there."""

    def edit(name: str, keywords: dict[str, Any]) -> None:
        keywords.update(
            {key: change(keywords[key]) for key, change in changes.items() if keywords.get(key) is not None}
        )

    return edit


ALL_PATHS = ("whole", "tokens_dynamic", "tokens_static", "left", "left_dynamic", "packed_positions")
MUTATIONS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "dropped": (in_keywords(alibi_slopes=lambda slopes: None), ALL_PATHS),
    "sign": (in_keywords(alibi_slopes=torch.neg), ALL_PATHS),
    "heads": (in_keywords(alibi_slopes=lambda slopes: slopes.flip(0)), ALL_PATHS),
    "absolute": (in_keywords(window_size=lambda window: (-1, 0)), ALL_PATHS),
    "window": (in_keywords(window_size=lambda window: (window[0] - 5, 0)), ("whole", "left_dynamic", "left")),
    "future": (in_keywords(causal=lambda causal: False, window_size=lambda window: (-1, -1)), ("whole", "left")),
    "scale": (in_keywords(softmax_scale=lambda scale: 1.01 * scale), ALL_PATHS),
    "filled": (in_keywords(cache_seqlens=lambda length: length + 1), ("tokens_static", "chunks_static")),
    "padding": (in_keywords(cache_leftpad=lambda padding: padding * 0), ("left_dynamic", "left_static")),
}


@pytest.mark.parametrize(("mutation", "feed"), [(name, feed) for name in MUTATIONS for feed in MUTATIONS[name][1]])
def test_a_wrong_call_fails_the_check(mutation: str, feed: str, package: Any) -> None:
    model, texts = build("twelve_grouped", torch.float64, FLASH), documents(9, 14)
    check(model, FEEDS[feed], "twelve_grouped", texts)
    exchange(package, MUTATIONS[mutation][0])
    with pytest.raises(AssertionError, match="of the largest value"):
        check(model, FEEDS[feed], "twelve_grouped", texts)


@pytest.mark.parametrize("feed", ["chunks_dynamic", "chunks_static", "interior_dynamic"])
def test_alignment_at_the_first_query_fails_the_check(feed: str, package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = stand_in.attend

    def aligned_top_left(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> torch.Tensor:
        missing = len(k) - len(q)  # with queries behind the last one, the first query is at the first key
        return attend(torch.cat([q, q.new_zeros(missing, *q.shape[1:])]), k, v, *args)[: len(q)]

    model, texts = build("six", torch.float64, FLASH), documents(23, 40)
    monkeypatch.setattr(stand_in, "attend", aligned_top_left)
    check(model, FEEDS["whole"], "six", texts)
    with pytest.raises(AssertionError, match="of the largest value"):
        check(model, FEEDS[feed], "six", texts)


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    """Return a batch of one kind, for gradients."""
    texts = documents(23, 40)
    if kind == "packed":
        return {name: flattened(texts)[name] for name in ("input_ids", "position_ids")}
    ids, mask = pad(texts, "left" if kind == "plain" else kind)
    return {"input_ids": ids} if kind == "plain" else {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("feed", [feed for feed in TRAINING_FEEDS if feed in FED])
@pytest.mark.parametrize("case", ["six", "twelve_grouped"])
def test_gradients(case: str, feed: str, dtype: torch.dtype, package: Any) -> None:
    check_gradients(build(case, dtype, FLASH), FEEDS[feed], case, documents(23, 40))


@pytest.mark.parametrize("kind", ["reentrant", "not_reentrant"])
@pytest.mark.parametrize("feed", ["no_cache", "left", "packed_positions_no_cache"])
def test_gradients_with_activation_checkpointing(feed: str, kind: str, package: Any) -> None:
    model = build("six", torch.float64, FLASH)
    enable_checkpointing(model, kind)
    check_gradients(model, FEEDS[feed], "six", documents(23, 40))


def test_gradients_of_a_wrong_slope_fail_the_check(package: Any) -> None:
    exchange(package, in_keywords(alibi_slopes=lambda slopes: 1.05 * slopes))
    with pytest.raises(AssertionError):
        check_gradients(build("six", torch.float32, FLASH), FEEDS["left"], "six", documents(23, 40))


def test_gradients_through_a_static_cache(package: Any) -> None:
    called = set()
    exchange(package, lambda name, _: called.add(name))
    text = documents(23)[0][None]
    found = []
    for backend in (FLASH, "eager"):
        model = build("six", torch.float64, backend)
        cache = StaticCache(config=model.config, max_cache_len=40)
        model(text, past_key_values=cache).logits.square().mean().backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert_close(found[0], found[1], 1e-10)
    assert called == {"flash_attn_func"}  # the one for caches has no backward


def test_dropout_only_in_training(package: Any) -> None:
    model, text = build("six", torch.float64, FLASH, attention_dropout=0.5), documents(30)[0][None]
    seen = []
    exchange(package, lambda _, keywords: seen.append(keywords["dropout_p"]))
    assert not torch.allclose(model(text).logits, model.train()(text).logits)
    assert seen == [0.0, 0.0, 0.5, 0.5]


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache: str, package: Any) -> None:
    ids, mask = pad(documents(7, 12), "left")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    found = build("six", torch.float64, FLASH).generate(ids, attention_mask=mask, **options)
    assert torch.equal(found, build("six", torch.float64, "eager").generate(ids, attention_mask=mask, **options))


@torch.no_grad()
def test_nobody_counts_or_attends(package: Any) -> None:
    model, ids = build("six", torch.float64, FLASH), documents(12)[0].view(2, 6)
    mask = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert_close(model(ids, attention_mask=mask).logits[1], model(ids[1:]).logits[0], 1e-12)
    assert model(ids, attention_mask=0 * mask).logits.isfinite().all()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("feed", ["no_cache", "left", "tokens_static"])
def test_compiled(feed: str, package: Any) -> None:
    torch._dynamo.reset()
    model = build("six", torch.float64, FLASH, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=feed == "no_cache", backend="eager")
    for found, truth in zip(*(FEEDS[feed](each, documents(5, 8)) for each in (compiled, model)), strict=True):
        assert_close(found, truth, 1e-12)


@torch.no_grad()
def test_attention_weights_are_computed_beside(package: Any) -> None:
    text = documents(20)[0][None]
    for case in ("six", "capped"):
        found = build(case, torch.float64, FLASH)(text, output_attentions=True)
        truth = build(case, torch.float64, "eager")(text, output_attentions=True)
        assert_close(found.attentions[1], truth.attentions[1], 1e-10)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alibi_distance": "sqrt"}, "alibi_distance='sqrt'"),
        ({"alibi_rounding": "bloom"}, "alibi_rounding"),
        ({"head_dim": 264}, "head_dim=264"),
        ({"attention_scale": -0.5}, "attention_scale=-0.5"),
    ],
    ids=str,
)
def test_what_the_kernel_has_no_form_for(fields: dict, words: str, package: Any) -> None:
    model = build("six", torch.float32, "eager", **fields)
    with pytest.raises(ValueError, match=f"flash_attention_2 cannot.*{words}.*'eager'"):
        model.set_attn_implementation(FLASH)
    assert model.config._attn_implementation == "eager"
    model.config._attn_implementation = FLASH  # behind the model's back
    with pytest.raises(ValueError, match=words.split("=")[0]):
        model(documents(5)[0][None])


def test_calls_that_the_kernel_has_no_form_for(sixteen_bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = build("capped", torch.float32, FLASH, attention_dropout=0.1), documents(5)[0][None]
    with pytest.raises(ValueError, match=r"float16 and torch\.bfloat16, the queries are torch\.float32"):
        model(text)
    model.to(torch.bfloat16)
    model(text)
    with pytest.raises(ValueError, match="custom 4-D masks"):
        model(text, attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="attn_logit_softcapping together with attention_dropout"):
        model.train()(text)
    with pytest.raises(ValueError, match="generate_batch.*'sdpa'"):
        model.generate_batch([[1, 2, 3]])
    monkeypatch.setattr(flash_alibi, "DEVICE", "cuda")
    with pytest.raises(ValueError, match="on cuda, the model is on cpu"):
        model(text)


def test_without_the_package_or_a_device(sixteen_bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("six", torch.bfloat16)

    def refuses(words: str) -> None:
        monkeypatch.setattr(flash_alibi, "_package", None)
        with pytest.raises(ValueError, match=words):
            model.set_attn_implementation(FLASH)
        with pytest.raises(ValueError, match=words):
            AlibiForCausalLM._from_config(config_of("six"), attn_implementation=FLASH)

    monkeypatch.setattr(flash_alibi, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses("CUDA device, and torch finds none.*'sdpa'")
    sixteen_bits.flash_attn_with_kvcache = lambda q, k_cache, v_cache, alibi_slopes=None: None
    refuses("2.6 or newer.*does not know cache_leftpad.*'sdpa'")
    for module in (types.ModuleType("flash_attn"), None):  # what flash-attn-4 leaves; nothing
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        refuses("package flash_attn.*cannot be imported.*'sdpa'")


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that will hold what is warned of."""
    messages: list[str] = []
    attention_alibi.logger.warning_once.cache_clear()
    monkeypatch.setattr(attention_alibi.logger, "warning", messages.append)
    return messages


WITHOUT_SLOPES = ["flash_attention_3", "flash_attention_4", "kernels-community/flash-attn2", "someone/flash-attn3:fwd"]


@pytest.mark.parametrize("name", WITHOUT_SLOPES)
def test_flash_attention_without_slopes_is_replaced(
    name: str, warnings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = build("six", torch.float64, "eager")
    for _ in range(2):
        model.set_attn_implementation("eager")
        model.set_attn_implementation(name)
    assert len(warnings) == 1 and name in warnings[0] and "'sdpa' runs instead" in warnings[0]
    check(model, FEEDS["whole"], "six", documents(20))
    config = config_of("six")
    config._attn_implementation = name
    model.save_pretrained(tmp_path)
    found: list[Any] = [
        AlibiForCausalLM(config),
        AlibiForCausalLM._from_config(config_of("six"), attn_implementation=name),
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name),
    ]
    path = tmp_path / "config.json"
    for key in ("_attn_implementation", "attn_implementation"):
        path.write_text(path.read_text().replace("{", f'{{"{key}": "{name}",', 1))
        found.append(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert [each.config._attn_implementation for each in found] == ["sdpa"] * 5


@pytest.mark.parametrize(
    ("case", "dropout", "device", "chosen"),
    [
        ("six", 0.0, "cuda", "flex_attention"),
        ("six", 0.1, "cuda", "sdpa"),
        ("capped", 0.0, "cuda", "flex_attention"),
        ("capped", 0.1, "cuda", "eager"),
        ("capped", 0.0, "cpu", "eager"),
    ],
)
def test_what_replaces_it(case: str, dropout: float, device: str, chosen: str) -> None:
    config = config_of(case, attention_dropout=dropout)
    assert attention_alibi.resolve_attention("flash_attention_3", config, device) == chosen


def test_a_saved_config_can_ask_for_it(package: Any, tmp_path: Any) -> None:
    build("six", torch.float64, FLASH).save_pretrained(tmp_path)
    assert FLASH not in (tmp_path / "config.json").read_text()  # as with every backend, the next machine decides
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=FLASH)
    assert model.config._attn_implementation == FLASH
    check(model, FEEDS["left"], "six", documents(20, 9))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "dtype"),
    [("twelve_grouped", torch.bfloat16), ("twelve_grouped", torch.float16), ("capped", torch.bfloat16)],
)
def test_the_real_package(case: str, dtype: torch.dtype) -> None:
    pytest.importorskip("flash_attn")
    texts = documents(150, 129, 40)
    model = build(case, torch.float32, "eager").to(dtype)
    truth = torch.cat(FEEDS["whole"](copy.deepcopy(model).double(), texts))
    model.cuda()

    def rms(feed: str) -> float:
        with torch.device("cuda"):
            found = torch.cat(FEEDS[feed](model, [text.cuda() for text in texts])).cpu().double()
        return (found - truth).square().mean().sqrt().item()

    eager = rms("whole")
    model.set_attn_implementation(FLASH)
    for feed in FED:
        assert rms(feed) <= 1.1 * eager, feed


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "left", "interior", "packed"])
def test_gradients_of_the_real_package(kind: str) -> None:
    pytest.importorskip("flash_attn")
    given = {name: tensor.cuda() for name, tensor in inputs_of(kind).items()}
    counts = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()

    def gradients(backend: str, dtype: torch.dtype) -> torch.Tensor:
        model = build("twelve_grouped", torch.float32, "eager").bfloat16().to("cuda", dtype)
        model.set_attn_implementation(backend)
        loss = model(**given, use_cache=False).logits[counts].double().square().mean()
        return torch.cat([each.flatten().double() for each in torch.autograd.grad(loss, list(model.parameters()))])

    truth = gradients("eager", torch.float64)
    flash, eager = ((gradients(backend, torch.bfloat16) - truth).norm() for backend in (FLASH, "eager"))
    assert flash <= 1.1 * eager
