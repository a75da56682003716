"""What the tests of exporting share: small models in this package's layout, and their logits."""

import weakref
from pathlib import Path
from typing import Any

import torch

from alibi_hf import AlibiConfig, AlibiForCausalLM
from alibi_hf.checkpoints.export_source import Converted
from alibi_hf.model.bias_alibi import Distances
from tests.builders import HEAD_DIM, VOCAB, fill, ids

BLOOM = {
    "embedding_norm": True,
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu_pytorch_tanh",
}
MPT = {"norm_bias": False}
GATED = {"mlp_type": "gated", "hidden_act": "silu"}
REFACT = {"norm_type": "rms_norm", **GATED}


def ours(folder: Path, heads: int = 6, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A random `AlibiForCausalLM`, saved as training would save it; `fields` of its config."""
    sizes = {"vocab_size": VOCAB, "hidden_size": HEAD_DIM * heads, "num_attention_heads": heads}
    config = AlibiConfig(**{**sizes, "num_hidden_layers": 2, "max_position_embeddings": 64, **fields})
    fill(AlibiForCausalLM(config)).to(dtype).save_pretrained(folder)
    return folder


def our_logits(folder: Path, tokens: torch.Tensor | None = None, **fields: Any) -> torch.Tensor:
    """Logits of the folder, ours or upstream's, through this package in float32, `[batch, tokens, vocab]`."""
    model = AlibiForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **fields).eval()
    with torch.no_grad():
        return model(ids() if tokens is None else tokens).logits


def count_held(monkeypatch: Any) -> list[int]:
    """How many tensors of the folder are in memory each time one is read; filled by what is run afterwards."""
    right, alive, counts = Converted.get, weakref.WeakSet(), []

    def get(self: Converted, name: str) -> torch.Tensor:
        tensor = right(self, name)
        alive.add(tensor)
        counts.append(len(alive))
        return tensor

    monkeypatch.setattr(Converted, "get", get)
    return counts


def bend_bias(monkeypatch: Any, factor: float) -> None:
    """Multiply every bias of ours by `factor`, whichever rounding it has."""
    right = Distances._block_bias
    monkeypatch.setattr(Distances, "_block_bias", lambda self, *args: right(self, *args) * factor)
