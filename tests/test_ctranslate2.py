"""CTranslate2, an inference engine of its own in C++, reads the same upstream folders: our logits must be its logits.

Its MPT loader is registered for llm-foundry's remote class only; the one here says the same of Transformers' class.
"""

import ctranslate2
import numpy
import pytest
import torch
from ctranslate2.converters import transformers as converters
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
)

from alibi_hf import AlibiForCausalLM
from alibi_hf.model.bias_alibi import Distances

CHECKPOINTS = "examples/checkpoints/sotu-{}"
TOKENIZER = CHECKPOINTS.format("bloom")
LIMIT = 1e-4  # of the largest logit: float32 on both sides, sums in another order


class NativeMptLoader(converters.MPTLoader):
    """CTranslate2's MPT loader, for Transformers' own class."""

    @property
    def architecture_name(self) -> str:
        return "MptForCausalLM"


converters._MODEL_LOADERS.setdefault("MptConfig", NativeMptLoader())


def random_model(family: str, heads: int) -> PreTrainedModel:
    """A tiny upstream model whose weights are large enough that positions matter."""
    torch.manual_seed(heads)
    sizes = {"vocab_size": 4096, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    if family == "falcon":
        flags = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
        shape = {"hidden_size": heads * 8, "num_hidden_layers": 2, "num_attention_heads": heads}
        model = FalconForCausalLM(FalconConfig(**shape, **flags, **sizes))
    elif family == "bloom":
        model = BloomForCausalLM(BloomConfig(hidden_size=heads * 8, n_layer=2, n_head=heads, **sizes))
    else:
        model = MptForCausalLM(MptConfig(d_model=heads * 8, n_layers=2, n_heads=heads, max_seq_len=512, **sizes))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
    return model


def outside_logits(folder: str, tokens: list[int], work: str) -> torch.Tensor:
    """CTranslate2's logits `[tokens, vocab]` for one row."""
    converters.TransformersConverter(folder).convert(work, force=True)
    generator = ctranslate2.Generator(work, device="cpu", compute_type="float32", intra_threads=1)
    words = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(tokens)
    return torch.from_numpy(numpy.array(generator.forward_batch([words])))[0]


SHIPPED, HEADS = ("bloom-shipped", "mpt-shipped"), ("bloom-6", "bloom-12", "bloom-40", "mpt-1", "mpt-12", "mpt-40")


@pytest.fixture(params=[*SHIPPED, *HEADS, "falcon-6", "falcon-12", "falcon-40"])
def compared(request, tmp_path):
    """An upstream folder in float32, 300 tokens, and what CTranslate2 makes of them."""
    family, kind = request.param.split("-")
    if kind == "shipped":
        reference = {"bloom": BloomForCausalLM, "mpt": MptForCausalLM}[family]
        model = reference.from_pretrained(CHECKPOINTS.format(family), dtype=torch.float32)
        if family == "mpt":
            model.config.max_seq_len = 512  # upstream refuses longer rows; nothing else changes
    else:
        model = random_model(family, int(kind))
    folder = str(tmp_path / "upstream")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    tokens = torch.randint(4, 4096, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    return folder, tokens, outside_logits(folder, tokens, str(tmp_path / "ct2"))


def our_error(folder: str, tokens: list[int], outside: torch.Tensor) -> float:
    """The largest difference of the logits, as a share of the largest logit."""
    model = AlibiForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        ours = model(torch.tensor([tokens])).logits[0]
    return float((ours - outside).abs().max() / outside.abs().max())


def test_logits_are_ctranslate2s(compared):
    assert our_error(*compared) < LIMIT


def test_a_wrong_bias_is_not(compared, monkeypatch):
    right = Distances.bias
    monkeypatch.setattr(Distances, "bias", lambda self, delta: right(self, delta) * 1.01)
    assert our_error(*compared) > LIMIT
