"""Slopes and rounded biases against the code they are said to reproduce."""

import math

import pytest
import torch
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from alibi_hf import AlibiConfig
from alibi_hf.model.bias_alibi import alibi_slopes, config_slopes, rounded_slopes
from alibi_hf.model.positions_alibi import make_distances
from tests.references.decoder import paper_slopes

UPSTREAM = {"bloom": modeling_bloom.build_alibi_tensor, "falcon": modeling_falcon.build_alibi_tensor}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = {
    "none": None,
    "left": [[0, 0, 0, 1, 1, 1, 1, 1] * 40, [1] * 320],
    "right": [[1] * 300 + [0] * 20, [1] * 320],
    "interior": [[1] * 10 + [0] * 7 + [1] * 303, [1, 0] * 160],
    "all": [[0] * 320, [1] * 320],
}


def upstream_slopes(heads: int) -> torch.Tensor:
    """Return BLOOM's slopes: the bias of the key at position 1."""
    return modeling_bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]


def test_slopes_are_the_papers() -> None:
    for heads in range(1, 131):
        for bias_max in (8.0, 16.0, 4.5):
            assert alibi_slopes(heads, bias_max) == pytest.approx(paper_slopes(heads, bias_max), rel=1e-14)


def test_slopes_are_blooms_and_mpts() -> None:
    for heads in range(1, 131):
        slopes = torch.tensor(alibi_slopes(heads))
        torch.testing.assert_close(slopes, upstream_slopes(heads), rtol=5e-6, atol=0)  # a power of a rounded base
        torch.testing.assert_close(slopes, -build_mpt_alibi_tensor(heads, 2)[:, 0, 0], rtol=5e-7, atol=0)
        for bias_max in (4, 16):
            truth = -build_mpt_alibi_tensor(heads, 2, bias_max)[:, 0, 0]
            torch.testing.assert_close(torch.tensor(alibi_slopes(heads, bias_max)), truth, rtol=1e-6, atol=0)


def test_rounded_slopes_are_blooms_bit_for_bit() -> None:
    for heads in range(1, 131):
        assert torch.equal(rounded_slopes(heads), upstream_slopes(heads))


def test_slopes_fall_in_a_power_of_two_of_heads() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]
    assert alibi_slopes(6) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


def config(rounding: str, heads: int) -> AlibiConfig:
    """Return a config whose head dimension (12) makes Falcon's factor no power of two."""
    slopes = alibi_slopes(heads)
    if rounding == "falcon":
        slopes = [slope / math.sqrt(12) for slope in slopes]  # folded, as the family's config has it
    return AlibiConfig(
        hidden_size=12 * heads,
        num_attention_heads=heads,
        alibi_rounding=rounding,
        alibi_slopes=slopes,
        num_hidden_layers=1,
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 6, 12, 16, 40, 112])
@pytest.mark.parametrize("rounding", UPSTREAM)
def test_rounded_bias_is_upstreams_bit_for_bit(rounding: str, heads: int, dtype: torch.dtype, mask: str) -> None:
    given = None if MASKS[mask] is None else torch.tensor(MASKS[mask])
    counted = torch.ones(2, 320, dtype=torch.long) if given is None else given
    upstream = UPSTREAM[rounding](counted, heads, dtype).view(2, heads, 320)
    if rounding == "falcon":
        upstream = upstream / math.sqrt(12)  # FalconAttention does so before it adds it to the mask
    embeds = torch.zeros(2, 320, 1, dtype=dtype)
    found = make_distances(config(rounding, heads), embeds, given, None, None, None, 0).row
    assert found is not None
    assert found.dtype == upstream.dtype
    assert torch.equal(found.expand_as(upstream), upstream)


@pytest.mark.parametrize("rounding", UPSTREAM)
def test_rounded_bias_past_the_exact_integers_of_bfloat16(rounding: str) -> None:
    upstream = UPSTREAM[rounding](torch.ones(1, 5000, dtype=torch.long), 12, torch.bfloat16).view(1, 12, 5000)
    if rounding == "falcon":
        upstream = upstream / math.sqrt(12)
    embeds = torch.zeros(1, 5000, 1, dtype=torch.bfloat16)
    assert torch.equal(make_distances(config(rounding, 12), embeds, None, None, None, None, 0).row, upstream)


def test_config_slopes() -> None:
    given = AlibiConfig(num_attention_heads=2, hidden_size=8, alibi_slopes=[0.1, 0.0])
    assert config_slopes(given).tolist() == torch.tensor([0.1, 0.0]).tolist()
    assert config_slopes(AlibiConfig(alibi=False)).tolist() == [0.0] * 16
    exact = config_slopes(AlibiConfig(num_attention_heads=12, hidden_size=48, alibi_bias_max=16))
    assert exact.dtype == torch.float32
    assert torch.equal(exact, torch.tensor(alibi_slopes(12, 16), dtype=torch.float64).float())
    assert torch.equal(config_slopes(config("bloom", 12)), rounded_slopes(12))
    assert torch.equal(config_slopes(config("falcon", 12)), rounded_slopes(12).bfloat16().float())
