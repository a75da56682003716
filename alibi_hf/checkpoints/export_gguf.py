"""Exporting to GGUF, llama.cpp's file format: one file with weights, tokenizer and what the graph has to know.

Matrices are float32, float16, bfloat16 or q8_0 (blocks of 32 values with one float16 scale); vectors stay float32, as
llama.cpp expects them. The file is written tensor by tensor and, within one, rows by rows.

Format: ggml, `docs/gguf.md`; the package `gguf` of the same project writes it.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from alibi_hf.checkpoints.export_source import Converted
from alibi_hf.checkpoints.export_tensors import Item, Weights, make_items
from alibi_hf.checkpoints.gguf_architectures import Architecture, choose_architecture, gguf_rules, nearest_bias_max
from alibi_hf.checkpoints.gguf_tokenizer import add_tokenizer, has_tokenizer, read_tokenizer
from alibi_hf.checkpoints.options import Progress, cast
from alibi_hf.checkpoints.plan import meta_model
from alibi_hf.checkpoints.shards import describe_file
from alibi_hf.checkpoints.source import with_fields
from alibi_hf.errors import AlibiError, ConfigFieldError
from alibi_hf.families._layout import head_sizes
from alibi_hf.model.configuration_alibi import AlibiConfig

# Our names and the short ones, to GGML's.
_TYPES = {
    "float32": "F32",
    "f32": "F32",
    "float16": "F16",
    "f16": "F16",
    "bfloat16": "BF16",
    "bf16": "BF16",
    "q8_0": "Q8_0",
}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_HALF = {"F16": 1, "Q8_0": 127}  # types with a float16 in them, which is the value divided by this at most
_ROWS = 1 << 24  # values that are converted together


@dataclass(frozen=True)
class GgufPlan:
    """A GGUF file that will be written; see `Plan` of `alibi_hf.checkpoints.export`."""

    source: Converted
    weights: Weights
    items: list[Item]
    types: list[str]
    graph: Architecture
    file_type: str
    tokenizer: bool
    config: dict[str, Any]
    notes: list[str]

    @property
    def architecture(self) -> str:
        """GGUF's architecture."""
        return self.graph.name

    @property
    def bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(_bytes(item, kind) for item, kind in zip(self.items, self.types, strict=True))

    def tensors(self) -> list[dict[str, Any]]:
        """As `Plan.tensors`, with the type of each."""
        return [item.to_dict() | {"type": kind} for item, kind in zip(self.items, self.types, strict=True)]

    def write(self, folder: Path, progress: Progress | None) -> list[dict[str, Any]]:
        """As `Plan.write`."""
        import gguf

        path = folder / f"model-{self.file_type.lower()}.gguf"
        writer = gguf.GGUFWriter(path, self.graph.name)
        self._add_keys(writer)
        for item, kind in zip(self.items, self.types, strict=True):
            raw = gguf.GGMLQuantizationType[kind]
            writer.add_tensor_info(item.name, item.shape, numpy.dtype(numpy.float32), _bytes(item, kind), raw)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            self._write_tensors(writer, progress)
        finally:
            writer.close()
        for relative in self.source.carried_files():
            if relative.name.startswith("LICENSE"):
                shutil.copyfile(self.source.path / relative, folder / relative)
        return [describe_file(path)]

    def _add_keys(self, writer: Any) -> None:
        import gguf

        writer.add_name(self.source.path.resolve().name)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[self.file_type]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, value in self.config.items():
            key = f"{self.graph.name}.{name}"
            writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(key, value)
        if self.tokenizer:
            add_tokenizer(writer, self.source.path, self.source.config)
        else:
            writer.add_tokenizer_model("none")

    def _write_tensors(self, writer: Any, progress: Progress | None) -> None:
        done = 0
        for item, kind in zip(self.items, self.types, strict=True):
            writer.write_tensor_data(_Rows(item, self.weights.make(item, torch.float32), kind))
            done += _bytes(item, kind)
            if progress is not None:
                progress("exporting", done, self.bytes)


class _Rows:
    """A tensor as `GGUFWriter.write_tensor_data` takes an array: it asks for the size, then has it written.

    So that a large matrix is never held whole in its new type, rows are converted and written in groups.
    """

    def __init__(self, item: Item, tensor: Tensor, kind: str) -> None:
        self.name, self.tensor, self.kind, self.nbytes = item.name, tensor, kind, _bytes(item, kind)

    def tofile(self, file: Any) -> None:
        """Write the values to an open file; `TensorError` where float16 cannot hold them."""
        import gguf

        kind = gguf.GGMLQuantizationType[self.kind]
        rows = self.tensor.reshape(-1, self.tensor.shape[-1])
        for block in rows.split(max(1, _ROWS // rows.shape[1])):
            values = block.float().contiguous()
            if self.kind in _HALF:
                cast(self.name, values / _HALF[self.kind], torch.float16)
            gguf.quants.quantize(values.numpy(), kind).tofile(file)


def plan_gguf(source: Converted, dtype: str | torch.dtype | None, tokenizer: bool, allow_nonfinite: bool) -> GgufPlan:
    """Choose llama.cpp's architecture for `source` and list what will be written.

    Raises:
        ConfigFieldError: naming what no architecture holds, or an unknown dtype.
        CheckpointFileError: about the tokenizer.
        AlibiError: where the package gguf is missing.
    """
    _need_gguf()
    config = source.config
    if source.class_name != "AlibiForCausalLM":
        raise ConfigFieldError(f"gguf cannot hold the head of {source.class_name}: it takes language models.")
    graph, file_type = choose_architecture(config), _file_type(dtype, source)
    with_tokenizer = tokenizer and has_tokenizer(source.path)
    spec = read_tokenizer(source.path, config.vocab_size) if with_tokenizer else {}
    whole = with_fields(config, dict.fromkeys(graph.padded(config), True))
    expected = meta_model(whole).state_dict()
    items = make_items(gguf_rules(whole, graph), source, expected, config.num_hidden_layers)
    types = [_type(item, file_type) for item in items]
    return GgufPlan(
        source=source,
        weights=Weights(source, graph.factors(config), allow_nonfinite),
        items=items,
        types=types,
        graph=graph,
        file_type=file_type,
        tokenizer=with_tokenizer,
        config=gguf_keys(config, graph),
        notes=_notes(config, graph, types, file_type) + _tokenizer_notes(spec),
    )


def gguf_keys(config: AlibiConfig, graph: Architecture) -> dict[str, Any]:
    """The keys under the architecture's name: sizes, norm, clamp and the largest bias."""
    heads, kv_heads, head_dim = head_sizes(config)
    norm = "layer_norm_epsilon" if config.norm_type == "layer_norm" else "layer_norm_rms_epsilon"
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        f"attention.{norm}": float(config.norm_eps),
    }
    if heads * head_dim != config.hidden_size:
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if graph.bias_max is None:
        keys["attention.max_alibi_bias"] = float(nearest_bias_max(config)[0])
    if config.clip_qkv is not None:
        keys["attention.clamp_kqv"] = float(config.clip_qkv)
    return keys


def _notes(config: AlibiConfig, graph: Architecture, types: list[str], file_type: str) -> list[str]:
    padded = graph.padded(config)
    notes = [f"{name}: the graph has these biases, the source has none; they are zeros" for name in padded]
    for field, where in (("embedding_scale", "token_embd"), ("logit_scale", "output")):
        if getattr(config, field) is not None:
            notes.append(f"{field}={getattr(config, field)} is multiplied into {where}.weight")
    if (factor := graph.score_factor(config)) != 1.0:
        notes.append(f"the queries are multiplied by {factor:g}, for the graph's own factor on the scores is another")
    if config.hidden_act == "gelu":
        notes.append("llama.cpp computes hidden_act='gelu' by its tanh form, which differs by up to 5e-4")
    if file_type == "Q8_0" and "F16" in types:
        notes.append(f"{types.count('F16')} matrices have rows that are no multiple of 32 values, and are float16")
    return notes


def _tokenizer_notes(spec: dict[str, Any]) -> list[str]:
    if not spec:
        return ["the file has no tokenizer and takes token ids only"]
    if spec.get("normalizer") is not None:
        return ["llama.cpp does not apply the tokenizer's NFC: text has to be in that form already"]
    return []


def _type(item: Item, file_type: str) -> str:
    if len(item.shape) == 1:
        return "F32"
    return "F16" if file_type == "Q8_0" and item.shape[-1] % 32 else file_type


def _bytes(item: Item, kind: str) -> int:
    values_and_bytes = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34)}  # of one block
    values, size = values_and_bytes[kind]
    return item.values // values * size


def _file_type(dtype: str | torch.dtype | None, source: Converted) -> str:
    wanted = source.dtype if dtype in (None, "auto") else dtype
    name = str(wanted).removeprefix("torch.").lower()
    if dtype is None and name not in _TYPES:  # float64
        return "F32"
    if name not in _TYPES:
        raise ConfigFieldError(f"gguf cannot hold dtype={dtype!r}; choose one of {', '.join(_TYPES)}.")
    return _TYPES[name]


def _need_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise AlibiError("writing GGUF needs the package gguf: pip install 'alibi-hf[gguf]'.") from error


__all__ = ["GgufPlan", "gguf_keys", "plan_gguf"]
