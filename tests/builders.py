"""Tiny random checkpoints of every family, in upstream's own layout, for the tests of the whole package."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

HEAD_DIM = 8
VOCAB = 97


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that keep activations of order one; norms near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            centre = 1.0 if name.endswith("weight") else 0.0
            parameter.data = centre + 0.1 * values
        else:
            parameter.data = values * (1.5 / parameter.shape[1] ** 0.5)
    return model.eval()


def write(
    folder: Path,
    raw: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    *,
    shards: int = 1,
    prefix: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """config.json and safetensors, in one file or several with an index, with or without `transformer.`."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {
        name if prefix else name.removeprefix("transformer."): tensor.detach().to(dtype).contiguous().clone()
        for name, tensor in tensors.items()
    }
    (folder / "config.json").write_text(json.dumps({**raw, "torch_dtype": str(dtype).removeprefix("torch.")}))
    if shards == 1:
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    mapping = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: held[name] for name in list(held)[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        mapping |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": mapping}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def untied(model: nn.Module, tie: bool = True) -> dict[str, torch.Tensor]:
    """The state dict as a file holds it: without the tied copy of the embedding."""
    return {name: tensor for name, tensor in model.state_dict().items() if not (tie and name == "lm_head.weight")}


def bloom(folder: Path, heads: int = 6, *, layers: int = 2, seed: int = 0, tie: bool = True, **kwargs: Any) -> Path:
    """A `BloomForCausalLM`."""
    from transformers import BloomConfig, BloomForCausalLM

    raw = {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HEAD_DIM * heads,
        "n_layer": layers,
        "n_head": heads,
        "tie_word_embeddings": tie,
        **kwargs.pop("raw", {}),
    }
    model = fill(BloomForCausalLM(BloomConfig(**raw)), seed)
    return write(folder, raw, untied(model, tie), **kwargs)


def mpt(folder: Path, heads: int = 6, *, layers: int = 2, seed: int = 0, length: int = 64, **kwargs: Any) -> Path:
    """An `MptForCausalLM` as Transformers writes it."""
    from transformers import MptConfig, MptForCausalLM

    attention = kwargs.pop("attn_config", {})
    raw = {
        "model_type": "mpt",
        "architectures": ["MptForCausalLM"],
        "vocab_size": VOCAB,
        "d_model": HEAD_DIM * heads,
        "n_layers": layers,
        "n_heads": heads,
        "max_seq_len": length,
        **kwargs.pop("raw", {}),
    }
    model = fill(MptForCausalLM(MptConfig(**raw, attn_config=attention)), seed)
    return write(folder, {**raw, "attn_config": {"alibi": True, **attention}}, untied(model), **kwargs)


def foundry(folder: Path, heads: int = 6, *, layers: int = 2, seed: int = 0, **kwargs: Any) -> Path:
    """An `MPTForCausalLM` as llm-foundry writes it, from the plain module; any of its config fields in `raw`."""
    from alibi_hf.families._mpt_reference import _build_plain

    attention = {"alibi": True, "attn_type": "multihead_attention", **kwargs.pop("attn_config", {})}
    raw = {
        "model_type": "mpt",
        "architectures": ["MPTForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
        "vocab_size": VOCAB,
        "d_model": HEAD_DIM * heads,
        "n_layers": layers,
        "n_heads": heads,
        "max_seq_len": 64,
        "no_bias": True,
        "attn_config": attention,
        **kwargs.pop("raw", {}),
    }
    model = fill(_build_plain(raw, torch.float32).to_empty(device="cpu"), seed)
    return write(folder, raw, untied(model, raw.get("tie_word_embeddings", True)), **kwargs)


def falcon(folder: Path, heads: int = 6, *, layers: int = 2, seed: int = 0, **kwargs: Any) -> Path:
    """A `FalconForCausalLM` with ALiBi, as Falcon-RW."""
    from transformers import FalconConfig, FalconForCausalLM

    raw = {
        "model_type": "falcon",
        "architectures": ["FalconForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HEAD_DIM * heads,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "alibi": True,
        "bias": True,
        "multi_query": False,
        "parallel_attn": False,
        "new_decoder_architecture": False,
        **kwargs.pop("raw", {}),
    }
    model = fill(FalconForCausalLM(FalconConfig(**raw)), seed)
    return write(folder, raw, untied(model), **kwargs)


def ids(batch: int = 2, length: int = 40, seed: int = 1) -> torch.Tensor:
    """Seeded token ids, [batch, length]."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def tokenizer(folder: Path) -> Path:
    """A tokenizer of one token a character, with a pad token and a chat template, into the folder."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 32 + VOCAB - 2)]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<pad>", *characters])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest value of `theirs`."""
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()
