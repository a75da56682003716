"""What each head looks at, against the definitions on the weights of the plain float64 decoder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from alibi_hf import AlibiConfig, AlibiError, AlibiForCausalLM
from alibi_hf.evaluation import attention_sums
from alibi_hf.evaluation.attention_sums import attend_and_sum, observed_attention
from alibi_hf.evaluation.bias_alone import KEYS, round_biases, zero_distance
from alibi_hf.evaluation.measure_reach import measure_reach
from alibi_hf.evaluation.reach_report import HeadReach, LengthReach
from alibi_hf.evaluation.window_share import share_kept
from alibi_hf.model import sdpa_alibi
from alibi_hf.model.attention_alibi import ALL_ATTENTION_FUNCTIONS, FUNCTIONS
from alibi_hf.model.bias_alibi import Distances, alibi_slopes
from alibi_hf.model.tiles_alibi import tiled_attention
from alibi_hf.model.window_alibi import default_eps
from benchmarks.memory import peak_bytes
from tests.model.cases import CASES, build, documents, expected
from tests.model.test_memory import LargestTensor
from tests.references.decoder import paper_slopes

TOKENS = 300  # nine times the training length of the cases
TEXT = documents(TOKENS)[0]
MIB = 2**20


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries, the last of them short, and several groups of heads."""
    monkeypatch.setattr(attention_sums, "ROWS", 64)
    monkeypatch.setattr(attention_sums, "BLOCK_BYTES", 4 * 64 * TOKENS * 8)


def defined(weights: torch.Tensor, alone: torch.Tensor) -> dict[str, float]:
    """Return the figures of one head by their definitions, from its weights `[i, j]` and those of its bias."""
    tokens = len(weights)
    index = torch.arange(tokens)
    distance = (index[:, None] - index).clamp(min=0)
    mass = torch.tensor([weights.diagonal(-t).sum() for t in range(tokens)])
    late = weights[tokens // 2 :, 0].mean()
    return {
        "mean_distance": float((weights * distance).sum(1).mean()),
        "bias_distance": float((alone * distance).sum(1).mean()),
        "distance_50": next(t for t in range(tokens) if mass[: t + 1].sum() >= 0.5 * tokens),
        "distance_90": next(t for t in range(tokens) if mass[: t + 1].sum() >= 0.9 * tokens),
        "first_token": float(weights[:, 0].mean()),
        "late_first_token": float(late),
        "own_token": float(weights.diagonal().mean()),
        "entropy": float(torch.special.entr(weights).sum(1).mean()),
        "collapsed": bool(late > 0.5),
    }


def bias_alone(fields: dict[str, Any], head: int) -> torch.Tensor:
    """Return the weights `[i, j]` of a head to whom all keys are alike, from the formulas."""
    slopes = fields["alibi_slopes"] or paper_slopes(fields["num_attention_heads"], fields["alibi_bias_max"])
    scaling = fields["alibi_scaling"] or {}
    slope = slopes[head] / scaling.get("factor", max(1.0, TOKENS / scaling.get("train_seq_len", math.inf)))
    index = torch.arange(TOKENS).double()
    distance = index[:, None] - index
    length = distance.clamp(min=0).sqrt() if fields["alibi_distance"] == "sqrt" else distance
    return (-slope * fields["alibi"] * length).masked_fill(distance < 0, -math.inf).softmax(-1)


def assert_as_defined(found: LengthReach, case: str, tolerance: float) -> None:
    """Assert that every head of every layer has the figures that the reference's weights give."""
    model = build(case, backend="eager")
    fields, layers = model.config.to_dict(), expected(case, TEXT).weights
    heads = iter(found.heads)
    for layer, all_weights in enumerate(layers):
        for number, weights in enumerate(all_weights):
            head = next(heads)
            assert (head.layer, head.head) == (layer, number)
            for name, value in defined(weights, bias_alone(fields, number)).items():
                near = max(tolerance, 1e-6) if name == "bias_distance" else tolerance  # the bias is one of float32
                assert getattr(head, name) == pytest.approx(value, rel=near, abs=near), (layer, number, name)
    assert next(heads, None) is None


@pytest.mark.parametrize("case", CASES)
def test_every_figure_is_what_its_definition_gives(case: str, small_blocks: None) -> None:
    found = measure_reach(build(case, backend="eager"), TEXT, [TOKENS])
    assert_as_defined(found[0], case, 1e-7 if case == "sqrt" else 1e-10)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_in_float32_with_any_backend(backend: str) -> None:
    found = measure_reach(build("six", torch.float32, backend), TEXT, [TOKENS])
    assert_as_defined(found[0], "six", 2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"alibi_slopes": [0.0] * 6},
        {"alibi_slopes": [-slope for slope in alibi_slopes(6)]},
        {"alibi_bias_max": 7.9},
        {"alibi_distance": "sqrt"},
        {"alibi_scaling": {"type": "linear", "train_seq_len": TOKENS - 3}},
        {"attention_scale": 0.35},
        {"attn_logit_softcapping": 20.0},
    ],
    ids=["zero", "negative", "slopes", "sqrt", "only_past_a_length", "scale", "cap"],
)
def test_anything_wrong_with_the_bias_or_the_scores_shows(changes: dict[str, Any]) -> None:
    model = build("six", backend="eager", attention_window=False)
    for name, value in changes.items():
        setattr(model.config, name, value)
    for layer in model.model.layers:
        layer.self_attn.scaling = changes.get("attention_scale", layer.self_attn.scaling)
    with pytest.raises(AssertionError):
        assert_as_defined(measure_reach(model, TEXT, [TOKENS])[0], "six", 1e-4)


@pytest.mark.parametrize("case", ["twelve_grouped", "capped", "sqrt"])
def test_the_model_computes_what_it_always_does_while_it_is_watched(case: str) -> None:
    model = build(case, backend="eager").train()
    other = build(case, backend="eager")
    with torch.no_grad():
        truth = other(TEXT[None], use_cache=False).logits
        with observed_attention(model, lambda *_: None):
            watched = model.eval()(TEXT[None], use_cache=False).logits
            assert torch.equal(other(TEXT[None], use_cache=False).logits, truth), "another model is left alone"
    assert (watched - truth).abs().max() < 1e-12 * truth.abs().max()
    assert all(ALL_ATTENTION_FUNCTIONS[name] is function for name, function in FUNCTIONS.items())


def test_a_model_is_left_as_it_was_and_read_without_dropout() -> None:
    model = build("six", attention_dropout=0.5, hidden_dropout=0.5).train()
    assert_as_defined(measure_reach(model, TEXT, [TOKENS])[0], "six", 1e-10)
    assert model.training
    with pytest.raises(RuntimeError, match="watched"), observed_attention(model, lambda *_: None):
        raise RuntimeError("watched")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is FUNCTIONS["sdpa"]


def test_each_length_reads_the_first_tokens() -> None:
    both = measure_reach(build("six"), TEXT, [100, TOKENS])
    assert both[0].heads == measure_reach(build("six"), TEXT[:100], [100])[0].heads
    assert both[1].heads == measure_reach(build("six"), TEXT, [TOKENS])[0].heads


def test_progress_goes_up_to_the_end_of_every_layer() -> None:
    seen: list[tuple[str, int, int]] = []
    measure_reach(build("six"), TEXT, [100, TOKENS], lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert {total for *_, total in seen} == {seen[-1][1]} and len(seen) == 2 * (1 + 2)


def sums(slopes: list[float], query: torch.Tensor, key: torch.Tensor, **fields: Any) -> attention_sums.AttentionSums:
    tokens = query.shape[2]
    distances = Distances(torch.tensor(slopes), torch.arange(tokens), tokens, **fields)
    return attend_and_sum(query, key, key, distances, 1.0)[1]


def test_a_head_to_whom_all_keys_are_alike_attends_evenly() -> None:
    found = sums([0.0], torch.zeros(1, 1, 700, 4), torch.randn(1, 1, 700, 4))
    harmonic = sum(1 / number for number in range(1, 701))
    assert found.mean_distance.item() == pytest.approx(699 / 4, rel=1e-6)  # query i: i / 2
    assert found.first.item() == pytest.approx(harmonic, rel=1e-6) == found.mass[0, 0].item()
    assert found.late_first.item() == pytest.approx(sum(1 / number for number in range(351, 701)), rel=1e-6)
    assert found.entropy.item() == pytest.approx(sum(math.log(number) for number in range(1, 701)), rel=1e-6)


def test_a_slope_that_is_huge_leaves_a_head_its_own_token() -> None:
    found = sums([1e4], torch.randn(1, 1, 300, 4), torch.randn(1, 1, 300, 4))
    assert found.mean_distance.item() == 0 and found.distance_of(0.999).item() == 0
    assert found.mass[0, 0].item() == 300 and found.entropy.item() == 0
    assert found.first.item() == 1 and found.late_first.item() == 0


def test_a_head_that_looks_only_back_by_seven() -> None:
    index = torch.arange(300)
    places = torch.nn.functional.one_hot(index, 300).double()[None, None]
    found = sums([0.01], 1e4 * places.roll(-7, 3), places)
    assert found.distance_of(0.5).item() == found.distance_of(0.9).item() == 7
    assert found.mass[0, 7].item() == pytest.approx(293)


def first_looker(layer: int, head: int) -> AlibiForCausalLM:
    """Return a model one head of which looks at the first token of `TEXT` alone, whatever its slope."""
    model = build("six")
    tokens = torch.cat([TEXT[:1], TEXT[1:][TEXT[1:] != TEXT[0]]])
    inputs: list[torch.Tensor] = []
    attention = model.model.layers[layer].self_attn
    hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        model(tokens[None], use_cache=False)
        hook.remove()
        rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        attention.q_proj.weight[rows], attention.q_proj.bias[rows] = 0.0, 1.0
        attention.k_proj.weight[rows], attention.k_proj.bias[rows] = 1e4 * inputs[0][0, 0], 0.0
    return model


def test_a_head_that_looks_at_the_first_token_only_is_collapsed_and_no_other() -> None:
    tokens = torch.cat([TEXT[:1], TEXT[1:][TEXT[1:] != TEXT[0]]])
    found = measure_reach(first_looker(1, 2), tokens, [len(tokens)])[0]
    assert [(head.layer, head.head) for head in found.collapsed] == [(1, 2)]
    head = found.collapsed[0]
    assert head.first_token == pytest.approx(1) and head.late_first_token == pytest.approx(1)
    assert head.mean_distance == pytest.approx((len(tokens) - 1) / 2)


@pytest.mark.parametrize("part", ["q_proj", "k_proj"])
def test_attention_that_is_not_finite_is_named(part: str) -> None:
    model = build("six")
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, part).weight[2 * 8 : 3 * 8] = math.nan
    with pytest.raises(AlibiError, match=r"layer 1, head 2, is not finite .* at 300 tokens"):
        measure_reach(model, TEXT, [TOKENS])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.inf
    with pytest.raises(AlibiError, match=r"layer 1, heads 0, 1, 2, 3, 4, 5, is not finite"):
        measure_reach(model, TEXT, [TOKENS])


def test_windows_leave_out_what_they_say_and_nothing_that_matters() -> None:
    eps = default_eps(torch.float64, gradients=False)
    model = build("six", alibi_slopes=[0.9, 0.4, 0.3, 0.2, 0.1, 0.0])
    captured: list[torch.Tensor] = []
    with torch.no_grad():
        captured += model(TEXT[None], use_cache=False, output_attentions=True).attentions
    heads = measure_reach(model, TEXT, [TOKENS])[0].heads
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    causal = TOKENS * (TOKENS + 1) / 2
    assert 128 <= min(head.window for head in heads) < TOKENS
    for head in heads:
        outside = captured[head.layer][0, head.head].masked_fill(distance <= head.window, 0.0).sum(1)
        assert outside.max() <= eps
        assert head.saved == pytest.approx(int((distance > head.window).sum()) / causal)
        assert (head.window == TOKENS) == (head.saved == 0.0) or head.window == TOKENS - 1
        assert head.planned == 0.0, "sdpa reads texts as short as this whole"
    assert [head.window for head in heads if head.slope == 0.0] == [TOKENS] * 2


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_the_plan_is_what_sdpa_computes(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("six", torch.float32, alibi_bias_max=4, num_key_value_heads=kv_heads).eval()
    text = documents(1500)[0]
    computed: list[list[float]] = []

    def count(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any) -> torch.Tensor:
        pairs = [0] * key.shape[1]
        for group in args[-1]:
            for start, stop, first, last in group.tiles(query.shape[2], key.shape[2]):
                for head in range(group.start, group.stop):
                    pairs[head] += (stop - start) * (last - first)
        dense = sum((min(start + 256, 1500) - start) * min(start + 256, 1500) for start in range(0, 1500, 256))
        computed.append([1 - pairs[head * kv_heads // 6] / dense for head in range(6)])
        return tiled_attention(query, key, value, *args)

    monkeypatch.setattr(sdpa_alibi, "tiled_attention", count)
    with torch.no_grad():
        model(text[None], use_cache=False)
    found = measure_reach(model, text, [1500])[0]
    planned = [[head.planned for head in found.heads if head.layer == layer] for layer in range(2)]
    assert planned == [pytest.approx(layer) for layer in computed] and max(planned[0]) > 0.3
    assert all(plan.startswith("window: ") for plan in found.plans)
    assert found.planned == pytest.approx(sum(map(sum, planned)) / 12)


def test_a_slope_past_float32_is_one_that_looks_at_its_own_token() -> None:
    found = measure_reach(build("six", alibi_slopes=[3e38, 1e30, 0.5, 0.1, 0.01, 0.0]), TEXT, [TOKENS])[0]
    assert [(h.mean_distance, h.entropy, h.own_token) for h in found.heads if h.slope > 1] == [(0.0, 0.0, 1.0)] * 4


@pytest.mark.parametrize(
    "changes",
    [{"alibi_distance": "sqrt"}, {"alibi_rounding": "bloom"}, {"attn_logit_softcapping": 5.0, "backend": "eager"}],
    ids=["sqrt", "rounded", "soft cap, of which sdpa has none"],
)
def test_where_nothing_is_proved_there_is_no_window(changes: dict[str, Any]) -> None:
    found = measure_reach(build("six", **changes), TEXT, [TOKENS])[0]
    assert {(head.gap, head.window, head.saved, head.planned) for head in found.heads} == {(None, TOKENS, 0.0, 0.0)}
    assert all(plan.startswith("dense: windows are proved for") for plan in found.plans)


@pytest.mark.parametrize("window", [0, 3, 9, 50])
def test_share_kept_counts_causal_pairs(window: int) -> None:
    kept = sum(1 for query in range(10) for key in range(query + 1) if query - key <= window)
    assert share_kept(window, 10) == pytest.approx(kept / 55)


@pytest.mark.parametrize(("tokens", "few"), [(8192, 2), (600, 9), (20, 20)])
def test_stored_biases_are_counted_as_bloom_stores_them(tokens: int, few: int) -> None:
    found = round_biases(torch.tensor(alibi_slopes(8)), False, tokens)
    for dtype in (torch.bfloat16, torch.float16):
        stored = build_alibi_tensor(torch.ones(1, tokens), 8, dtype)[:, 0, -KEYS:]
        own = [entry for entry in found if entry.dtype == str(dtype).removeprefix("torch.")]
        assert [entry.absolute_values for entry in own] == [len(row.unique()) for row in stored]
    assert [entry.absolute_values for entry in found[:8]] == [few] * 8, "powers of two lose what positions lose"
    assert {entry.relative_values for entry in found} == {min(KEYS, tokens)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sqrt", [False, True])
def test_the_bias_is_zero_from_where_it_is_said(sqrt: bool, dtype: torch.dtype) -> None:
    for slope in (*alibi_slopes(12), 0.9, 3.0):
        zero = zero_distance(slope, sqrt, dtype)
        assert zero is not None
        distance = torch.tensor([zero - 1, zero], dtype=torch.float64)
        weight = torch.exp(-slope * (distance.sqrt() if sqrt else distance))
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert weight[0] > smallest / 2 >= weight[1], slope
        if not sqrt:  # neighbours are so alike there that float32, by way of which torch converts, cannot tell them
            assert weight.to(dtype)[0] > 0 and weight.to(dtype)[1] == 0, slope
    assert zero_distance(0.0, sqrt, dtype) is None


def test_no_tensor_is_as_large_as_the_weights_of_a_text() -> None:
    config = AlibiConfig(vocab_size=16, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    with LargestTensor() as seen:
        measure_reach(AlibiForCausalLM(config), torch.zeros(4096, dtype=torch.long), [4096])
    assert seen.largest <= 4 * 4096 * 4096 // 8


@pytest.mark.slow
def test_memory_is_bounded_by_blocks_not_by_the_square_of_the_length() -> None:
    config = AlibiConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model, tokens = AlibiForCausalLM(config), torch.zeros(8192, dtype=torch.long)
    measure_reach(model, tokens, [64])
    found = peak_bytes(lambda: measure_reach(model, tokens, [8192]), "cpu")
    if found is None:
        pytest.skip("this system does not count the peak anew")
    assert found < 200 * MIB  # the weights of its two heads alone would be 512 MiB


def test_heads_can_be_told_apart_by_layer_and_number() -> None:
    found = measure_reach(build("twelve_grouped"), TEXT, [TOKENS])[0]
    assert [(head.layer, head.head) for head in found.heads] == [
        (layer, head) for layer in (0, 1) for head in range(12)
    ]
    assert [head.slope for head in found.heads[:12]] == pytest.approx(alibi_slopes(12))
    assert isinstance(found.heads[0], HeadReach)
    assert found.mean_distance == pytest.approx(sum(head.mean_distance for head in found.heads) / 24)
    assert found.saved == pytest.approx(sum(head.saved for head in found.heads) / 24)
