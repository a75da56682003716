"""What a retrofitted model computes: the source's class with its positions removed and ALiBi's bias added."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from alibi_hf import AlibiForCausalLM, NotProvedError, retrofit
from alibi_hf.checkpoints.rules import Split, Transposed
from alibi_hf.retrofitting import gpt2, weights
from tests.builders import distance, ids
from tests.retrofitting.sources import SOURCES

LONG = 80  # the sources were made for 48

# Switches of the layouts that the usual sources leave alone.
VARIANTS = {
    "gpt2 unscaled": ("gpt2", {"scale_attn_weights": False, "n_inner": 20, "activation_function": "relu"}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-2}),
    "gpt2 upcast": ("gpt2", {"reorder_and_upcast_attn": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-2}),
    "llama tied": ("llama", {"tie_word_embeddings": True, "hidden_act": "gelu", "head_dim": None}),
    "llama yarn": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}),
    "mistral wide window": ("mistral", {"sliding_window": 48}),
}


def positionless(folder):
    """The source as Transformers loads it, in float64, with its learned positions zero and norms in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in ("LlamaRMSNorm", "MistralRMSNorm"):  # those compute in float32
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    if hasattr(model, "transformer"):
        model.transformer.wpe.weight.data = torch.zeros(1, model.config.n_embd, dtype=torch.float64)
    return model


def bias_mask(heads: int, length: int, bias_max: float) -> torch.Tensor:
    """ALiBi's bias as the paper has it, one number at a time, [1, heads, length, length]; minus infinity ahead."""
    power = 2 ** (heads.bit_length() - 1)
    steps = [head + 1 for head in range(power)] + [head + 0.5 for head in range(heads - power)]
    mask = torch.full((1, heads, length, length), float("-inf"), dtype=torch.float64)
    for head, step in enumerate(steps):
        slope = torch.tensor(2.0 ** (-bias_max * step / power), dtype=torch.float32)
        for query in range(length):
            mask[0, head, query, : query + 1] = -slope * torch.arange(query, -1, -1, dtype=torch.float32)
    return mask


@torch.no_grad()
def logits(folder, mask: torch.Tensor, length: int = LONG) -> torch.Tensor:
    """The source's logits with `mask` on its scores and every token at position 0."""
    row = ids(1, length)
    return positionless(folder)(row, attention_mask=mask, position_ids=torch.zeros_like(row)).logits


@torch.no_grad()
def ours(folder, length: int = LONG, **fields) -> torch.Tensor:
    return AlibiForCausalLM.from_pretrained(folder, dtype=torch.float64, **fields).eval()(ids(1, length)).logits


def check(source, out, heads: int, bias_max: float = 8) -> None:
    """The folder gives the source's logits, with ALiBi's bias and without any positions, past its old length."""
    mask = bias_mask(heads, LONG, bias_max)
    bare = torch.where(mask.isinf(), mask, 0.0)
    with_alibi, without = logits(source, mask), logits(source, bare)
    assert distance(ours(out), with_alibi) < 1e-10
    assert distance(ours(out, alibi=False), without) < 1e-10
    assert distance(with_alibi, without) > 1e-3  # so that the bias counts
    assert distance(ours(out), logits(source, torch.where(mask.isinf(), mask, -mask))) > 1e-3  # and its sign


@pytest.mark.parametrize("heads", [1, 6, 12])
@pytest.mark.parametrize("layout", SOURCES)
def test_the_weights_arrive_and_alibi_is_in_the_place_of_positions(layout, heads, tmp_path):
    source = SOURCES[layout](tmp_path / "source", heads)
    report = retrofit(source, tmp_path / "out")
    assert [entry.passed for entry in report.checks] == [True, True]
    check(source, tmp_path / "out", heads)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_switch_of_a_layout(variant, tmp_path):
    layout, fields = VARIANTS[variant]
    source = SOURCES[layout](tmp_path / "source", raw=fields)
    report = retrofit(source, tmp_path / "out", bias_max=4)
    assert len(report.checks) == 2
    check(source, tmp_path / "out", 6, bias_max=4)


def test_yarn_s_factor_on_queries_and_keys_is_kept(tmp_path):
    source = SOURCES["llama"](tmp_path / "source", raw=VARIANTS["llama yarn"][1])
    report = retrofit(source, tmp_path / "out")
    scale = report.config["to"]["attention_scale"] * 12**0.5
    assert scale == pytest.approx((0.1 * torch.tensor(8.0).log().item() + 1) ** 2, rel=1e-6)
    assert any("attention_scale" in note for note in report.notes)
    assert "rope_theta" not in report.config["from"]["rope_scaling"]  # the source's config as it was


def swapped(config):
    """GPT-2's rules with query and key exchanged."""
    operation = Transposed(Split((config.hidden_size,) * 3))
    rules = gpt2_rules(config)
    for rule in rules:
        if rule.operation == operation:
            object.__setattr__(rule, "targets", (rule.targets[1], rule.targets[0], rule.targets[2]))
    return rules


gpt2_rules, gpt2_config = gpt2.rules, gpt2.config


def wrong_config(**fields):
    def config(raw):
        found = gpt2_config(raw)
        for name, value in fields.items():
            setattr(found, name, value)
        return found

    return config


WRONG = {
    "query and key swapped": ({"rules": swapped}, weights.WITHOUT),
    "another scale": ({"config": wrong_config(attention_scale=0.5)}, weights.WITHOUT),
    "another activation": ({"config": wrong_config(hidden_act="gelu")}, weights.WITHOUT),
    "no ALiBi": ({"config": wrong_config(alibi=False)}, weights.WITH),
    "slopes off by a millionth": (
        {"config": wrong_config(alibi_slopes=[2.0**-step * (1 + 1e-6) for step in (2, 4, 6, 8, 1, 3)])},
        weights.WITH,
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_retrofit_that_is_wrong_is_caught_and_nothing_is_kept(wrong, tmp_path, monkeypatch):
    changes, where = WRONG[wrong]
    source = SOURCES["gpt2"](tmp_path / "source")
    for name, value in changes.items():
        monkeypatch.setattr(gpt2, name, value)
    with pytest.raises(NotProvedError, match=where):
        retrofit(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("layout", SOURCES)
def test_one_weight_that_is_off_is_caught(layout, tmp_path, monkeypatch):
    source = SOURCES[layout](tmp_path / "source")
    load = weights.AlibiForCausalLM.from_pretrained

    def damaged(*args, **kwargs):
        model = load(*args, **kwargs)
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1e-6
        return model

    monkeypatch.setattr(weights.AlibiForCausalLM, "from_pretrained", damaged)
    with pytest.raises(NotProvedError, match=r"1e-10 is the limit"):
        retrofit(source, tmp_path / "out")


def test_rounded_weights_are_compared_with_the_source_s_rounded_alike(tmp_path):
    source = SOURCES["llama"](tmp_path / "source")
    report = retrofit(source, tmp_path / "out", dtype="bfloat16")
    assert len(report.checks) == 2
    model = AlibiForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_where_memory_lacks_the_weights_are_not_checked_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "available_memory", lambda: 1000)
    report = retrofit(SOURCES["gpt2"](tmp_path / "source"), tmp_path / "out")
    assert report.checks == [] and report.weights == "not checked"
    assert any("GiB are available" in note for note in report.notes)


def test_weights_that_are_allowed_to_be_nan_are_written_and_nothing_is_compared(tmp_path):
    source = SOURCES["llama"](tmp_path / "source")
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, path)
    report = retrofit(source, tmp_path / "out", allow_nonfinite=True)
    assert report.weights == "not checked" and "the source are not finite" in report.notes[-1]
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"][0].isnan()
