"""Baichuan-13B, Baichuan2-13B and what was trained from them: chat, HuatuoGPT-II-13B, DISC-MedLLM, DISC-FinLLM.

* Llama's layer with one fused `W_pack` of contiguous rows `[q; k; v]`, and ALiBi; the 7B models have rotary positions
  and are refused.
* Baichuan2 normalises the rows of its output head (`NormHead`). The normalised rows are folded into the weight, in the
  dtype of the file or the one asked for, whichever is wider; fine-tuning trains the rows as they are.
* Upstream adds slope times the key's column, padding on the left included, rounded to the model's dtype:
  `alibi_rounding="baichuan"`.

Which checkpoints have the `NormHead` no field of upstream's says: the code of Baichuan2 has it, that of Baichuan does
not. A checkpoint is Baichuan2's if its vocabulary has 125696 entries (no other Baichuan's has), or if its config.json
has `z_loss_weight`, which only Baichuan2's config class knows and writes; so a fine-tune that resized the vocabulary is
recognised, too. A head that is normalised already stays as it is, up to rounding.

Source: `configuration_baichuan.py` and `modeling_baichuan.py` of baichuan-inc/Baichuan-13B-Base and Baichuan2-13B-Base.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from alibi_hf.checkpoints.rules import Normalised, Rule, Split
from alibi_hf.errors import ConfigFieldError
from alibi_hf.families._about import OLD_CODE, About
from alibi_hf.families._baichuan_plain import PlainBaichuanForCausalLM, normalise_head
from alibi_hf.families._fields import (
    BOOL,
    INT,
    NUMBER,
    TEXT,
    TOKEN_IDS,
    Field,
    build_config,
    need_multiple,
    read_fields,
)
from alibi_hf.families._layout import has_tensor, head_rules, layer_modules, named, parameter_rules
from alibi_hf.families._plain import plain_reference
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig

NAMES = ("baichuan", "BaichuanForCausalLM", "BaichuanModel", "BaiChuanForCausalLM")
ROUNDINGS = ("exact", "baichuan")
REFERENCE = "alibi_hf.families._baichuan_plain.PlainBaichuanForCausalLM"
ABOUT = About(
    checkpoints=("Baichuan-13B", "Baichuan2-13B", "HuatuoGPT-II-13B", "DISC-MedLLM", "DISC-FinLLM"),
    switches=("norm_type", "mlp_type", "tie_word_embeddings", 'alibi_rounding="baichuan"'),
    outside=("llama.cpp",),
    exports=("llm-foundry", "gguf"),
    defects=(
        "the bias, by absolute column, is rounded to the model's dtype",
        "a buffer of heads x 4096 x 4096 is held",
        "the first forward pass changes the head's weight",
        OLD_CODE,
    ),
)
PREFIX = "model."
BAICHUAN2_VOCABULARY = 125696
WIDTH_OF_7B = 4096

FIELDS = (
    Field(("vocab_size",), INT, default=64000, to="vocab_size"),
    Field(("hidden_size",), INT, default=5120, to="hidden_size"),
    Field(("intermediate_size",), INT, default=13696, to="intermediate_size"),
    Field(("num_hidden_layers",), INT, default=40, to="num_hidden_layers"),
    Field(("num_attention_heads",), INT, default=40, to="num_attention_heads"),
    Field(("hidden_act",), TEXT, default="silu", to="hidden_act"),
    Field(("model_max_length",), INT, default=4096, to="max_position_embeddings"),
    Field(("rms_norm_eps",), NUMBER, default=1e-6, to="norm_eps"),
    Field(("tie_word_embeddings",), BOOL, default=False, to="tie_word_embeddings"),
    Field(("z_loss_weight",), NUMBER, default=None),
    Field(("pad_token_id",), TOKEN_IDS, default=0, to="pad_token_id"),
    Field(("bos_token_id",), TOKEN_IDS, default=1, to="bos_token_id"),
    Field(("eos_token_id",), TOKEN_IDS, default=2, to="eos_token_id"),
)
INERT = {
    "_from_model_config": "describes the file, not the computation",
    "max_position_embeddings": "read by the code of the 7B models only",
}


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are Baichuan's."""
    return named(raw, NAMES) and (not tensor_names or has_tensor(tensor_names, "self_attn.W_pack.weight"))


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a Baichuan-13B config.json; `ConfigFieldError` for what cannot be expressed.

    `z_loss_weight`, where it is given, is carried over: it tells that the head is normalised; nothing else reads it.
    """
    _refuse_7b(raw)
    values = read_fields(raw, FIELDS, INERT, "baichuan")
    need_multiple(values["hidden_size"], values["num_attention_heads"], "baichuan")
    carried = {"z_loss_weight": values["z_loss_weight"]} if values["z_loss_weight"] is not None else {}
    found = build_config("baichuan", raw, FIELDS, values, norm_type="rms_norm", mlp_type="gated", **carried)
    if found.tie_word_embeddings and has_norm_head(found):
        raise ConfigFieldError(
            "baichuan: tie_word_embeddings=True cannot be expressed for Baichuan2, whose head is normalised and whose "
            "embedding is not. Set it to false; the published checkpoints have both tensors."
        )
    return found


def _refuse_7b(raw: dict[str, Any]) -> None:
    architectures = raw.get("architectures") or []
    if raw.get("hidden_size") == WIDTH_OF_7B or "BaiChuanForCausalLM" in architectures:
        raise ConfigFieldError(
            f"baichuan: hidden_size={raw.get('hidden_size')!r} with architectures={architectures!r} is Baichuan-7B or "
            f"Baichuan2-7B, which has rotary positions (RoPE), not this package's. Load it with the repository's own "
            f"code: AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)."
        )


def has_norm_head(config: AlibiConfig) -> bool:
    """Whether the checkpoint's code is Baichuan2's, which normalises the rows of its head; see the module."""
    return config.vocab_size == BAICHUAN2_VOCABULARY or getattr(config, "z_loss_weight", None) is not None


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a Baichuan-13B checkpoint and what becomes of it."""
    layer, ours = "layers.{i}.", "model.layers.{i}."
    kept = [f"{layer}{name}" for name in ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj")]
    kept += [f"{layer}mlp.{name}_proj" for name in ("gate", "up", "down")]
    found = []
    for module in ["embed_tokens", "norm", *kept]:
        found += parameter_rules(module, f"model.{module}", bias=False, prefix=PREFIX)
    found += parameter_rules(
        f"{layer}self_attn.W_pack",
        [f"{ours}self_attn.{name}_proj" for name in "qkv"],
        bias=False,
        operation=Split((config.hidden_size,) * 3),
        prefix=PREFIX,
    )
    head, *others = head_rules(config, "embed_tokens.weight")
    if has_norm_head(config):
        head = replace(head, operation=Normalised())
    return [*found, head, *others]


def reference(config: AlibiConfig) -> Reference:
    """The plain module: upstream's own class is remote code that no longer runs on Transformers 5."""
    return plain_reference(
        PlainBaichuanForCausalLM,
        _build,
        lambda model: layer_modules(model, "model.layers", "self_attn"),
        "Transformers has no class for Baichuan; the reference is a plain module after upstream's modeling_baichuan.py",
        prepare=normalise_head if has_norm_head(config) else None,
    )


def _build(raw: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return PlainBaichuanForCausalLM(config(raw)).to(dtype).eval()
