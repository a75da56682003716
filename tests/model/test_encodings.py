"""RoPE, learned and sinusoidal positions, alone and beside ALiBi, in every way of feeding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from alibi_hf import AlibiConfig, AlibiForCausalLM
from alibi_hf.model import bias_alibi, encodings_alibi, layers_alibi, modeling_alibi, sdpa_alibi
from alibi_hf.model.bias_alibi import Distances
from alibi_hf.model.encodings_alibi import make_rotation, rope_frequencies
from tests.model.cases import (
    BACKENDS,
    LATE,
    TRAINED,
    assert_close,
    build,
    check,
    config_of,
    documents,
    expected,
    rope_of,
)
from tests.model.feeding import FEEDS, cached, pad
from tests.model.test_compile import decode
from tests.model.test_generation import continuation, generate_batch

Patch = Callable[[pytest.MonkeyPatch], None]

ENCODINGS = ("rope", "hybrid", "learned", "sinusoidal")
TEXTS = documents(23, 40, 1, 17)
# Every way of feeding

# Learned and sinusoidal positions are added before any backend; flex costs most for the same sums.
FED = [
    (case, backend, feed)
    for case in ENCODINGS
    for backend in BACKENDS
    for feed in FEEDS
    if (case == "rope" and backend == "eager")
    or (case == "hybrid" and (backend == "sdpa" or feed in ("interior", "packed_seq_idx", "packed_and_padded")))
    or (case in ("learned", "sinusoidal") and backend == "sdpa" and not feed.startswith("mask_4d"))
]


@pytest.mark.parametrize(("case", "backend", "feed"), FED)
def test_any_way_of_feeding(case: str, backend: str, feed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in ("dense", "tiles"):  # so that short documents cross chunks
        monkeypatch.setattr(f"alibi_hf.model.{form}_alibi.CHUNK", 16)
    check(build(case, torch.float64, backend), FEEDS[feed], case, TEXTS)


@torch.no_grad()
def test_positions_of_a_custom_mask_are_the_index_unless_position_ids_cover_all_keys() -> None:
    texts = documents(9, 14)
    row, positions = torch.cat(texts)[None], torch.cat([torch.arange(9), torch.arange(14)])[None]
    mask = torch.zeros(23, 23).fill_diagonal_(1).bool()
    mask[:9, :9], mask[9:, 9:] = torch.ones(9, 9).tril(), torch.ones(14, 14).tril()
    for case in ("learned", "sinusoidal"):
        model = build(case)
        found = model(row, attention_mask=mask[None, None], position_ids=positions).logits[0].split([9, 14])
        for logits, text in zip(found, texts, strict=True):
            assert_close(logits, expected(case, text).logits, 1e-10)
        by_index = model(row, attention_mask=mask[None, None]).logits[0].split([9, 14])
        assert_close(by_index[0], found[0], 1e-12)
        assert (by_index[1] - found[1]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("case", ENCODINGS)
def test_generation(case: str) -> None:
    """Beams reorder cached keys; padding on the left shifts every index."""
    model, (one, other) = build(case, torch.float32), documents(9, 14)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": 3}
    ids, mask = pad([one, other], "left")
    written = model.generate(ids, attention_mask=mask, **options)
    for row, text in enumerate((one, other)):
        alone = build(case, torch.float64, "eager").generate(text[None], use_cache=False, **options)
        assert written[row, -12:].tolist() == alone[0, -12:].tolist()


@pytest.mark.parametrize("case", ["hybrid", "learned", "sinusoidal"])
def test_generate_batch(case: str) -> None:
    model, texts = build(case, torch.float32, "sdpa"), documents(7, 19, 12)
    assert generate_batch(model, texts, 16) == [continuation(model, text) for text in texts]


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "padded"), [("rope", False), ("hybrid", True), ("learned", True), ("sinusoidal", False)]
)
def test_decode_compiles_to_one_graph(case: str, padded: bool) -> None:
    torch._dynamo.reset()
    model, text = build(case, torch.float32), documents(36)[0]
    found = decode(model, torch.compile(model, fullgraph=True, backend="eager"), text, 31, padded)
    assert_close(found, expected(case, text).logits[31:], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", ["hybrid", "sinusoidal"])
def test_export_with_dynamic_length(case: str) -> None:
    model, text = build(case, torch.float32), documents(24)[0][None]
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=4096)}, "use_cache": None}
    exported = torch.export.export(model, (), {"input_ids": text, "use_cache": False}, dynamic_shapes=shapes)
    for other in documents(2, 40, 301):
        found = exported.module()(input_ids=other[None], use_cache=False).logits[0]
        assert_close(found, expected(case, other).logits, 1e-5)


# Frequencies that change with the length of the text


def late(kind: str, dtype: torch.dtype = torch.float64, backend: str = "sdpa", **fields: Any) -> AlibiForCausalLM:
    """Return a model whose frequencies change past 32 tokens."""
    return build("rope", dtype, backend, rope_parameters=rope_of(kind), **fields)


@torch.no_grad()
@pytest.mark.parametrize(
    "feed", ["left", "right", "interior", "packed_positions", "packed_seq_idx", "packed_and_padded"]
)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", LATE)
def test_each_text_has_the_frequencies_of_its_own_length(kind: str, backend: str, feed: str) -> None:
    model, texts = late(kind, backend=backend), documents(23, 40, 60, 32)
    for found, text in zip(FEEDS[feed](model, texts), texts, strict=True):
        assert_close(found, late(kind, backend="eager")(text[None]).logits[0], 1e-10)


@torch.no_grad()
def test_documents_without_tokens_have_no_length() -> None:
    """Their bounds may be more than there are tokens."""
    model, text = late("dynamic"), documents(3)[0][None]
    bounds = torch.tensor([0, 0, 0, 0, 0, 0, 3])
    assert_close(model(text, cu_seq_lens_q=bounds, use_cache=False).logits, model(text).logits, 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("kind", LATE)
def test_up_to_the_limit_feeding_is_free(kind: str, feed: str) -> None:
    model, texts = late(kind, max_position_embeddings=TRAINED), documents(7, 9, 1, 5)
    if feed == "packed_and_padded":
        texts = texts[:2]  # a custom mask and padding count
    for found, text in zip(FEEDS[feed](model, texts), texts, strict=True):
        assert_close(found, late(kind, backend="eager")(text[None]).logits[0], 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache, None], ids=["dynamic", "static", "growing"])
@pytest.mark.parametrize("kind", LATE)
def test_cached_keys_take_the_frequencies_of_the_call(kind: str, cache: Any) -> None:
    """In one layer the keys of a token do not depend on what was read before: pieces give what one call gives."""
    model, text = late(kind, num_hidden_layers=1, alibi=True), documents(50)[0]
    past = None
    if cache is not None:
        past = cache(config=model.config, **({"max_cache_len": 64} if cache is StaticCache else {}))
    for piece in text.split([20, 1, 13, 1, 15]):
        found = model(piece[None], past_key_values=past, use_cache=True)
        past = found.past_key_values
        read = text[: int(past.get_seq_length())]
        assert_close(found.logits[0, -1], model(read[None]).logits[0, -1], 1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", LATE)
def test_generating_across_the_limit(kind: str) -> None:
    model = late(kind, torch.float32, num_hidden_layers=1)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    ids, mask = pad(documents(20, 27), "left")
    written = model.generate(ids, attention_mask=mask, **options)
    for row, text in enumerate(documents(20, 27)):
        for cache in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(written[row, -20:], model.generate(text[None], **options, **cache)[0, -20:])


@torch.no_grad()
@pytest.mark.parametrize("kind", LATE)
def test_decoding_across_the_limit_is_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    model, text = late(kind, torch.float32, num_hidden_layers=1), documents(36)[0]
    found = decode(model, torch.compile(model, fullgraph=True, backend="eager"), text, 31, padded=True)
    truth = torch.stack([model(text[None, :end]).logits[0, -1] for end in range(32, 37)])
    assert_close(found, truth, 1e-5)


@pytest.mark.parametrize("kind", LATE)
def test_what_does_not_tell_lengths_is_refused(kind: str) -> None:
    model = late(kind)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    with pytest.raises(ValueError, match=rf"'{kind}' changes .* past 32 tokens, .* over 40 tokens"):
        model(documents(40)[0][None], attention_mask=mask)
    with pytest.raises(ValueError, match=f"rope_type='{kind}'"):
        generate_batch(model, documents(7), 16)


# The table of learned positions ends


def feed_table(model: Any, how: str) -> Any:
    """Read position 32 of a table of 32 rows."""
    text = documents(33)[0][None]
    if how == "whole":
        return model(text)
    if how == "embeddings":
        return model(inputs_embeds=model.get_input_embeddings()(text))
    if how == "positions":
        mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
        return model(text[:, :20], attention_mask=mask, position_ids=torch.arange(13, 33)[None])
    cache = StaticCache(config=model.config, max_cache_len=40) if how == "static" else DynamicCache(config=model.config)
    model(text[:, :32], past_key_values=cache)
    return model(text[:, 32:], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("how", ["whole", "embeddings", "positions", "dynamic", "static"])
def test_a_position_past_the_table(how: str) -> None:
    model = build("learned", max_position_embeddings=TRAINED)
    with pytest.raises(ValueError, match="Position 32 has no learned embedding: .*max_position_embeddings=32"):
        feed_table(model, how)


@torch.no_grad()
@pytest.mark.parametrize("feed", ["left", "interior", "packed_positions", "packed_seq_idx", "left_static"])
def test_texts_that_fit_are_read_in_rows_that_do_not(feed: str) -> None:
    model, texts = build("learned", max_position_embeddings=TRAINED), documents(23, TRAINED, 30)
    for found, text in zip(FEEDS[feed](model, texts), texts, strict=True):
        assert_close(found, model(text[None]).logits[0], 1e-10)


# What travels with the weights


@pytest.mark.parametrize("case", ENCODINGS)
def test_nothing_but_the_table_is_kept(case: str) -> None:
    model = build(case)
    assert not list(model.named_buffers())
    assert ("model.embed_positions.weight" in model.state_dict()) == (case == "learned")


@torch.no_grad()
@pytest.mark.parametrize("case", [*ENCODINGS, *LATE])
def test_saving_and_loading_in_16_bits(case: str, tmp_path: Any) -> None:
    model = late(case, torch.float32) if case in LATE else build(case, torch.float32)
    model.save_pretrained(tmp_path)
    text = documents(60)[0][None]
    loaded = AlibiForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(loaded(text).logits, model(text).logits)
    narrow = AlibiForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(narrow(text).logits, model.to(torch.bfloat16)(text).logits)


def test_angles_are_float32_in_16_bits() -> None:
    config, far = config_of("rope", rope_parameters={"rope_theta": 1e4}), 100_000
    distances = Distances(torch.zeros(4), torch.arange(far, far + 64), far + 64, far)
    truth = torch.arange(far, far + 64).double()[:, None] * 1e4 ** (-torch.arange(4).double() / 4)
    for dtype, bound in ((torch.bfloat16, 1e-2), (torch.float32, 1e-2), (torch.float64, 1e-2)):
        cos, sin = make_rotation(config, distances, dtype).query
        assert cos.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (cos[0, 0, :, :4].double() - truth.cos()).abs().max() < bound
        assert (sin[0, 0, :, :4].double() - truth.sin()).abs().max() < bound


def test_part_of_a_head() -> None:
    config = config_of("rope", head_dim=16, rope_parameters={"rope_theta": 256.0, "partial_rotary_factor": 0.5})
    assert rope_frequencies(config)[0].tolist() == [1, 1 / 4, 1 / 16, 1 / 64]


def test_the_callers_parameters_are_not_touched() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0}
    config = AlibiConfig(rope_parameters=rope)
    assert rope == {"rope_type": "yarn", "factor": 4.0}
    assert config.rope_parameters == {**rope, "rope_theta": 10000.0, "original_max_position_embeddings": 2048}
    assert AlibiConfig().rope_parameters is None


@torch.no_grad()
def test_another_scaling_where_a_model_is_loaded(tmp_path: Any) -> None:
    build("rope", torch.float32).save_pretrained(tmp_path)
    rope, text = {"rope_type": "linear", "factor": 4.0, "rope_theta": 256.0}, documents(40)[0][None]
    loaded = AlibiForCausalLM.from_pretrained(tmp_path, rope_parameters=rope)
    assert_close(loaded(text).logits, build("rope", rope_parameters=rope)(text).logits, 1e-5)
    with pytest.raises(ValueError, match="spiral"):
        AlibiForCausalLM.from_pretrained(tmp_path, rope_parameters={"rope_type": "spiral"})


# Which form computes it


@torch.no_grad()
@pytest.mark.parametrize("case", ["no_alibi", "rope", "sinusoidal"])
def test_without_alibi_no_window_is_looked_for(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("windows are infinite without ALiBi")

    monkeypatch.setattr(sdpa_alibi, "head_windows", fail)
    monkeypatch.setattr(sdpa_alibi, "tiled_attention", fail)
    check(build(case, torch.float32), FEEDS["whole"], case, documents(1100))
    monkeypatch.undo()
    check(build(case, torch.float32), cached("dynamic", (600, 500)), case, documents(1100))


# Every mistake fails the check


def turned(change: Callable[[torch.Tensor], torch.Tensor]) -> Patch:
    """Change the positions that RoPE and the embeddings of positions read."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        find = encodings_alibi.query_positions
        for module in (encodings_alibi, modeling_alibi):
            monkeypatch.setattr(module, "query_positions", lambda distances: change(find(distances)))

    return patch


def late_in_decode(positions: torch.Tensor) -> torch.Tensor:
    """Count one token too many where there is one query."""
    return positions + (positions.shape[1] == 1)


def past_training(positions: torch.Tensor) -> torch.Tensor:
    """Count no further than the training length."""
    return positions.clamp(max=TRAINED - 1)


def by_index(positions: torch.Tensor) -> torch.Tensor:
    """Forget where documents start."""
    return torch.arange(positions.shape[1])[None]


def interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn neighbouring features against each other, as GPT-J does."""
    own = layers_alibi.rotate

    def wrong(states: torch.Tensor, turn: Any) -> torch.Tensor:
        size = turn[0].shape[-1]
        order = torch.arange(size).view(2, -1).T.flatten()
        return own(torch.cat((states[..., order.argsort()], states[..., size:]), -1), turn)

    monkeypatch.setattr(encodings_alibi, "rotate", wrong)


def without_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn nothing."""
    monkeypatch.setattr(modeling_alibi, "make_rotation", lambda *_: None)


def without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave RoPE alone with the scores."""
    slopes = bias_alibi.config_slopes
    monkeypatch.setattr(bias_alibi, "config_slopes", lambda *args: 0 * slopes(*args))


MUTATIONS: dict[str, tuple[Patch, tuple[str, ...], str, tuple[int, ...]]] = {
    "late_in_decode": (turned(late_in_decode), ENCODINGS, "chunks_dynamic", (20,)),
    "past_training": (turned(past_training), ENCODINGS, "whole", (TRAINED + 2,)),
    "past_training_decode": (turned(past_training), ENCODINGS, "tokens_static", (TRAINED + 2,)),
    "documents": (turned(by_index), ("learned", "sinusoidal"), "packed_positions", (9, 14)),
    "interleaved": (interleaved, ("rope", "hybrid"), "whole", (9,)),
    "none": (without_rotation, ("rope", "hybrid"), "whole", (9,)),
    "no_bias": (without_bias, ("hybrid",), "whole", (9,)),
}


@pytest.mark.parametrize(("mutation", "case"), [(name, case) for name in MUTATIONS for case in MUTATIONS[name][1]])
def test_a_wrong_encoding_fails_the_check(mutation: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, _, feed, lengths = MUTATIONS[mutation]
    model, texts = build(case, torch.float32), documents(*lengths)
    check(model, FEEDS[feed], case, texts)
    patch(monkeypatch)
    with pytest.raises(AssertionError, match="of the largest value"):
        check(model, FEEDS[feed], case, texts)


@pytest.mark.parametrize(("case", "words"), [("two_heads", "ALiBi is made for it"), ("hybrid", "may be read worse")])
def test_the_notice_promises_only_what_alibi_does(case: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    modeling_alibi.logger.warning_once.cache_clear()
    monkeypatch.setattr(modeling_alibi.logger, "warning", notices.append)
    build(case)(documents(40)[0][None])
    assert len(notices) == 1 and words in notices[0]
