"""The converted and the directly loaded model compute what upstream's class computes, from float64 truth."""

import pytest
import torch

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.direct import load_foreign
from alibi_hf.checkpoints.reference import load_reference
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from tests.builders import bloom, distance, falcon, foundry, ids, mpt

CASES = {
    "bloom": (bloom, {}),
    "bloom residual from norm": (bloom, {"raw": {"apply_residual_connection_post_layernorm": True}}),
    "bloom untied": (bloom, {"tie": False}),
    "bloom bare sharded": (bloom, {"prefix": False, "shards": 3}),
    "mpt": (mpt, {}),
    "mpt clip and scale": (mpt, {"attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.2}}),
    "falcon": (falcon, {}),
    "falcon multi-query without biases": (falcon, {"raw": {"multi_query": True, "bias": False}}),
    "foundry bias_max 16": (foundry, {"attn_config": {"alibi_bias_max": 16}}),
    "foundry int clip": (foundry, {"attn_config": {"clip_qkv": 1}}),
    "foundry qk_ln": (foundry, {"attn_config": {"qk_ln": True, "clip_qkv": 2.0}}),
    "foundry qk_gn": (foundry, {"attn_config": {"qk_gn": True}}),
    "foundry multi-query qk_ln": (foundry, {"attn_config": {"attn_type": "multiquery_attention", "qk_ln": True}}),
    "foundry biases": (foundry, {"raw": {"no_bias": False}}),
    "foundry attention without biases": (foundry, {"raw": {"no_bias": False, "attention_bias": False}}),
    "foundry rmsnorm gated": (
        foundry,
        {"raw": {"norm_type": "rmsnorm", "ffn_config": {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}}}},
    ),
    "foundry scales and caps": (
        foundry,
        {
            "raw": {"logit_scale": "inv_sqrt_d_model", "final_logit_softcapping": 2.0, "expansion_ratio": 1.5},
            "attn_config": {"attn_logit_softcapping": 5.0},
        },
    ),
    "foundry untied": (foundry, {"raw": {"tie_word_embeddings": False}}),
}


def truth(folder, tokens, exact=True, **inputs):
    """Float64 logits of the reference, and the reference model in float32."""
    checkpoint = Checkpoint.open(folder)
    reference, model = load_reference(checkpoint, torch.float64)
    with torch.no_grad(), reference.exact_truth() if exact else reference.truth():
        return model(tokens, **inputs).logits, reference, load_reference(checkpoint, torch.float32)[1]


@pytest.mark.parametrize("heads", [1, 6, 12, 40])
@pytest.mark.parametrize("build", [bloom, mpt, falcon])
def test_head_counts(build, heads, tmp_path):
    check(build(tmp_path / "source", heads=heads, layers=1), tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
def test_features(case, tmp_path):
    build, kwargs = CASES[case]
    check(build(tmp_path / "source", **kwargs), tmp_path / "out")


@pytest.mark.parametrize("kv_heads", [2, 3])
def test_grouped_heads(kv_heads, tmp_path):
    grouped = {"attn_type": "grouped_query_attention", "kv_n_heads": kv_heads, "qk_ln": True}
    check(foundry(tmp_path / "source", attn_config=grouped), tmp_path / "out")


def check(folder, out):
    tokens = ids()
    expected, _, _ = truth(folder, tokens)
    convert(folder, out, verify=False, max_shard_size="40KB")
    backend = "eager" if Checkpoint.open(folder).config.attn_logit_softcapping else "sdpa"  # sdpa has no soft cap
    converted = AlibiForCausalLM.from_pretrained(out, attn_implementation=backend).eval()
    direct = load_foreign(AlibiForCausalLM, folder, attn_implementation=backend).eval()
    padded = torch.ones_like(tokens)
    padded[0, :7] = 0
    with torch.no_grad():
        for model in (converted, direct):
            assert distance(model(tokens).logits, expected) < 2e-6
            assert distance(model.double()(tokens).logits, expected) < 1e-7
        alone = converted(tokens[:1, 7:]).logits
        assert distance(converted(tokens, attention_mask=padded).logits[:1, 7:], alone) < 1e-6


@pytest.mark.parametrize(("build", "rounding"), [(bloom, "bloom"), (falcon, "falcon")])
def test_upstreams_own_rounding_on_request(build, rounding, tmp_path):
    folder = build(tmp_path / "source", heads=12)
    tokens = ids(length=200)
    _, _, upstream = truth(folder, tokens)
    ours = load_foreign(AlibiForCausalLM, folder, alibi_rounding=rounding, attn_implementation="eager").eval()
    with torch.no_grad():
        assert distance(ours(tokens).logits, upstream(tokens).logits) < 2e-6


def test_falcons_own_rounding_is_the_truth_of_its_gate(tmp_path):
    folder = falcon(tmp_path / "source", heads=12)
    tokens = ids(length=200)
    own, _, upstream = truth(folder, tokens, exact=False)
    exact, _, _ = truth(folder, tokens, exact=True)
    with torch.no_grad():
        assert distance(upstream(tokens).logits, own) < 2e-6
    assert distance(own, exact) > 1e-4  # what the rounding costs, already at 200 tokens


@pytest.mark.parametrize("build", [bloom, mpt])
def test_float64_truth_is_finer_than_upstream_as_it_stands(build, tmp_path):
    folder = build(tmp_path, heads=12)
    tokens = ids()
    expected, _, _ = truth(folder, tokens)
    _, model = load_reference(Checkpoint.open(folder), torch.float64)
    ours = load_foreign(AlibiForCausalLM, folder, dtype=torch.float64, attn_implementation="eager").eval()
    with torch.no_grad():
        as_it_stands, ours64 = distance(model(tokens).logits, expected), distance(ours(tokens).logits, expected)
    assert 1e-10 < as_it_stands < 1e-6  # upstream drops to float32 inside a float64 model
    assert ours64 < 1e-7


@pytest.mark.parametrize("change", [0.0, -1.0, 1.5])
def test_a_wrong_bias_does_not_pass(change, tmp_path):
    """Zero slopes, the wrong sign and a wrong slope are far outside the limits above."""
    folder = bloom(tmp_path, heads=12)
    tokens = ids()
    expected, _, _ = truth(folder, tokens)
    model = load_foreign(AlibiForCausalLM, folder, attn_implementation="eager").eval()
    model.config.alibi_slopes = (torch.tensor([2.0 ** -(i + 1) for i in range(12)]) * change).tolist()
    with torch.no_grad():
        assert distance(model(tokens).logits, expected) > 1e-3
