"""Quantised while loading: only the layers' linear weights change, and attention is what it is without.

The truth is the plain decoder in float64 with the quantised weights written out, so that quantisation itself, which may
be as coarse as it likes, cannot hide a bias, a mask or a window that went wrong.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from alibi_hf import AlibiForCausalLM
from alibi_hf.checkpoints.convert import convert
from alibi_hf.errors import AlibiError
from alibi_hf.model import sdpa_alibi
from alibi_hf.model.bias_alibi import Distances
from tests.all_families import FAMILIES
from tests.builders import HEAD_DIM, distance, ids
from tests.model.cases import CASES, TOLERANCE, assert_close, build, documents
from tests.model.feeding import FEEDS
from tests.references.decoder import decode
from tests.scratch import scratch_folder

torchao_quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")

from torchao.utils import TorchAOBaseTensor
from transformers import BitsAndBytesConfig, TorchAoConfig

INT8 = 0.1  # of the largest logit: what eight bits a weight cost these models at most
STEEP = {"hidden_size": 48, "num_attention_heads": 6, "attention_scale": 0.05, "alibi_slopes": [8, 5, 6, 3, 0.5, 0]}
FEEDINGS = ("whole", "tokens_dynamic", "chunks_static", "interior", "left_dynamic", "packed_positions")


def int8() -> TorchAoConfig:
    return TorchAoConfig(torchao_quantization.Int8WeightOnlyConfig())


@functools.cache
def saved(case: str) -> Path:
    """The folder of a case in float32."""
    folder = scratch_folder() / case
    build(case, torch.float32).save_pretrained(folder)
    return folder


@functools.cache
def quantised(case: str) -> AlibiForCausalLM:
    return AlibiForCausalLM.from_pretrained(saved(case), quantization_config=int8()).eval()


def is_quantised(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, TorchAOBaseTensor)


def written_out(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict in plain numbers."""
    return {name: w.dequantize() if is_quantised(w) else w for name, w in model.state_dict().items()}


def truth(model: AlibiForCausalLM, text: torch.Tensor) -> torch.Tensor:
    return decode(written_out(model), model.config.to_dict(), text).logits


@pytest.mark.parametrize("feed", FEEDINGS)
@pytest.mark.parametrize("case", ["one_head", "twelve_grouped", "forty", "multi_query"])
def test_everything_else_is_exact(case, feed):
    model, texts = quantised(case), documents(23, 40, 1, 17)
    with torch.no_grad():
        found = FEEDS[feed](model, texts)
    for text, logits in zip(texts, found, strict=True):
        assert_close(logits, truth(model, text), TOLERANCE[torch.float32])


def test_a_wrong_bias_is_found(monkeypatch):
    right, model, text = Distances.bias, quantised("six"), documents(40)[0]
    monkeypatch.setattr(Distances, "bias", lambda self, delta: right(self, delta) * 1.01)
    with torch.no_grad(), pytest.raises(AssertionError, match="error"):
        assert_close(model(text[None]).logits[0], truth(model, text), TOLERANCE[torch.float32])


def test_windows_are_as_right_as_ever(monkeypatch):
    monkeypatch.setitem(CASES, "steep", STEEP)
    planned, choose = [], sdpa_alibi.choose_groups

    def watch(query, key, *args):
        groups = choose(query, key, *args)
        planned.append(sum(group.pairs(query.shape[2], key.shape[2]) for group in groups[0]))
        return groups

    monkeypatch.setattr(sdpa_alibi, "choose_groups", watch)
    model, text = quantised("steep"), documents(1300)[0]
    with torch.no_grad():
        assert_close(model(text[None]).logits[0], truth(model, text), TOLERANCE[torch.float32])
        left = sum(planned)
        planned.clear()
        model.config.attention_window = False
        model(text[None])
    assert 0 < left < 0.8 * sum(planned)


@pytest.mark.parametrize("heads", [1, 6, 12, 40])
@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon"])
def test_a_converted_folder(family, heads, tmp_path):
    """Projections are quantised; embedding, head and norms are not; the logits stay near and generation runs."""
    convert(FAMILIES[family](tmp_path / "source", heads, layers=1), tmp_path / "ours", verify=False)
    plain = AlibiForCausalLM.from_pretrained(tmp_path / "ours").eval()
    model = AlibiForCausalLM.from_pretrained(tmp_path / "ours", quantization_config=int8()).eval()
    names = {name for name, weight in model.named_parameters() if is_quantised(weight)}
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + ["mlp.up_proj", "mlp.down_proj"]
    assert names == {f"model.layers.0.{part}.weight" for part in parts}
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (heads * HEAD_DIM, heads * HEAD_DIM)
    with torch.no_grad():
        found, expected = model(ids()).logits, plain(ids()).logits
    assert 0 < distance(found, expected) < INT8
    written = model.generate(ids(1, 8), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written.shape == (1, 13)
    row = model(written[:, :-1]).logits[0, 7:]
    assert torch.equal(row.argmax(-1), written[0, 8:])


def test_saved_and_loaded_again(tmp_path):
    model, text = quantised("twelve_grouped"), documents(30)[0][None]
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "torchao" and len(written["auto_map"]) == 6
    again = AlibiForCausalLM.from_pretrained(tmp_path).eval()
    assert is_quantised(again.model.layers[1].mlp.gate_proj.weight)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 0.6 * (saved("twelve_grouped") / "model.safetensors").stat().st_size
    with torch.no_grad():
        assert torch.equal(again(text).logits, model(text).logits)


SCRIPT = """
import sys, torch
sys.modules["alibi_hf"] = None
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig
folder, given, saved, found = sys.argv[1:]
load = AutoModelForCausalLM.from_pretrained
model = load(folder, trust_remote_code=True, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())).eval()
model.save_pretrained(saved)
text = torch.load(given)
with torch.no_grad():
    logits = [each(text).logits for each in (model, load(saved, trust_remote_code=True).eval())]
torch.save(logits, found)
"""


@pytest.mark.slow
def test_where_the_package_is_not(tmp_path):
    """The folder's own code loads it quantised, saves it, and loads it again."""
    text = documents(30)[0][None]
    torch.save(text, tmp_path / "text.pt")
    places = [saved("six"), tmp_path / "text.pt", tmp_path / "quantised", tmp_path / "found.pt"]
    subprocess.run([sys.executable, "-c", SCRIPT, *map(str, places)], check=True, cwd=tmp_path, capture_output=True)
    with torch.no_grad():
        expected = quantised("six")(text).logits
    assert all(torch.equal(logits, expected) for logits in torch.load(tmp_path / "found.pt"))


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon"])
def test_upstreams_fused_tensors_must_be_converted_first(family, tmp_path):
    folder = FAMILIES[family](tmp_path / "source")
    with pytest.raises(AlibiError, match=r"quantization_config.*(query_key_value|Wqkv).*Convert it first"):
        AlibiForCausalLM.from_pretrained(folder, quantization_config=int8())


@pytest.mark.parametrize("case", ["six", "twelve_grouped"])
def test_modules_are_what_quantisers_look_for(case):
    """Every weight of a layer that is worth it sits in an `nn.Linear` of its own; what must stay whole is found."""
    from transformers.quantizers.base import get_keys_to_not_convert

    model = build(case)
    kept = get_keys_to_not_convert(model)
    assert "lm_head" in kept and ("model.embed_tokens" in kept) == model.config.tie_word_embeddings
    for layer in model.model.layers:
        linear = {name for name, module in layer.named_modules() if type(module) is nn.Linear}
        large = {name.rpartition(".")[0] for name, weight in layer.named_parameters() if weight.dim() == 2}
        assert linear == large and len(linear) == (7 if model.config.mlp_type == "gated" else 6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", ["six", "twelve_grouped", "forty"])
def test_four_bits(case, device):
    """bitsandbytes: the projections become 4-bit, embedding and head do not, and everything else is exact."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": four, "device_map": device, "dtype": torch.float32}
    model = AlibiForCausalLM.from_pretrained(saved(case), **options).eval()
    layers = {name: module for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}
    assert layers and all(isinstance(module, bitsandbytes.nn.Linear4bit) for module in layers.values())
    assert type(model.lm_head) is nn.Linear
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    for name, module in layers.items():
        packed = module.weight
        plain = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
        state[f"model.layers.{name}.weight"] = plain.cpu()
    for text in documents(23, 40):
        with torch.no_grad():
            found = model(text[None].to(device)).logits[0].cpu()
        assert_close(found, decode(state, model.config.to_dict(), text).logits, TOLERANCE[torch.float32])
