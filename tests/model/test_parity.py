"""Every backend computes what the plain float64 decoder computes, for every config switch and at awkward lengths."""

import pytest
import torch

from alibi_hf import AlibiConfig
from tests.model.cases import BACKENDS, CASES, assert_close, build, check, documents, expected
from tests.model.feeding import FEEDS, whole

PAIRS = [(case, backend) for case in CASES for backend in BACKENDS if (case, backend) != ("capped", "sdpa")]
ROUNDED_TOLERANCE = 1e-10
FED = ("six", "twelve_grouped", "sqrt")  # plain, grouped and with a bias that is not linear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129])
@pytest.mark.parametrize(("case", "backend"), PAIRS)
def test_logits(case: str, backend: str, length: int, dtype: torch.dtype) -> None:
    check(build(case, dtype, backend), whole, case, documents(length))


@pytest.mark.parametrize("length", [1000, 4097])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_long(backend: str, length: int) -> None:
    for dtype in (torch.float64, torch.float32):
        check(build("two_heads", dtype, backend), whole, "two_heads", documents(length))


@pytest.mark.parametrize("case", CASES)
def test_what_rounding_the_bias_to_float32_costs(case: str) -> None:
    # A bias of -x is off by at most x * 2^-23, its weight by x * exp(-x) * 2^-23: far below float32's own errors.
    document = documents(129)[0]
    assert_close(expected(case, document).logits, expected(case, document, single=False).logits, 1e-6)


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FED)
def test_any_way_of_feeding(case: str, backend: str, feed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in ("dense", "tiles"):  # so that short documents cross chunks
        monkeypatch.setattr(f"alibi_hf.model.{form}_alibi.CHUNK", 16)
    check(build(case, torch.float64, backend), FEEDS[feed], case, documents(23, 40, 1, 17))


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_way_of_feeding_in_float32(backend: str, feed: str) -> None:
    check(build("six", torch.float32, backend), FEEDS[feed], "six", documents(23, 40, 1, 17))


@pytest.mark.parametrize("feed", ["whole", "left", "interior", "packed_positions", "mask_4d_bool"])
def test_feeding_past_one_chunk(feed: str) -> None:
    check(build("six", torch.float64, "sdpa"), FEEDS[feed], "six", documents(300, 257))


@pytest.mark.parametrize("feed", ["left", "interior", "packed_positions", "interior_static", "mask_4d_bool"])
def test_feeding_where_memory_allows_one_query_at_a_time(feed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alibi_hf.model.dense_alibi.BLOCK_BYTES", 1)
    monkeypatch.setattr("alibi_hf.model.segments_alibi.MIN_QUERIES", 1000)  # in the block form
    check(build("six", torch.float64, "sdpa"), FEEDS[feed], "six", documents(23, 40))


@pytest.mark.parametrize("feed", [name for name in FEEDS if not name.startswith("mask_4d")])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["bloom", "falcon"])
def test_rounded_modes_agree_across_backends_and_feeds(rounding: str, backend: str, feed: str) -> None:
    texts = documents(23, 40, 1, 17)
    with torch.no_grad():
        truth = whole(build("after_norm", torch.float64, "eager", alibi_rounding=rounding), texts)
        found = FEEDS[feed](build("after_norm", torch.float64, backend, alibi_rounding=rounding), texts)
    for logits, true_logits, text in zip(found, truth, texts, strict=True):
        assert_close(logits, true_logits, ROUNDED_TOLERANCE)
        if len(text) > 1:
            assert (true_logits - expected("after_norm", text).logits).abs().max() > 1e-7  # it does round


@pytest.mark.parametrize("feed", [name for name in FEEDS if not name.startswith("mask_4d")])
def test_baichuans_rounding_agrees_across_feeds_to_float32(feed: str) -> None:
    texts = documents(23, 40, 1, 17)
    found = FEEDS[feed](build("twelve_grouped", torch.float64, "sdpa", alibi_rounding="baichuan"), texts)
    for logits, text in zip(found, texts, strict=True):  # padding on the left shifts what is rounded
        assert_close(logits, expected("twelve_grouped", text).logits, 1e-6)


@pytest.mark.parametrize("feed", ["left", "packed_positions", "chunks_dynamic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_by_distance_agrees_across_backends_and_feeds(
    backend: str, feed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always_bfloat16(config: AlibiConfig, _: torch.dtype) -> torch.dtype | None:
        return torch.bfloat16 if config.alibi_rounding == "jais" else None

    # It rounds in models of 16 bits only, where backends agree less than the bias differs.
    monkeypatch.setattr("alibi_hf.model.positions_alibi.bias_dtype", always_bfloat16)
    test_rounded_modes_agree_across_backends_and_feeds("jais", backend, feed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["twelve_grouped", "twelve_grouped"])
def test_attention_output_and_weights_of_each_layer(case: str, backend: str) -> None:
    model, document = build(case, torch.float64, backend), documents(129)[0]
    outputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _module, _args, result: outputs.append(result[0][0]))
    with torch.no_grad():
        found = model(document[None], output_attentions=True)
    truth = expected(case, document)
    for output, weights, attention, true_weights in zip(
        outputs, found.attentions, truth.attention, truth.weights, strict=True
    ):
        assert_close(output, attention, 1e-10)
        assert_close(weights[0], true_weights, 1e-10)
