"""GPT-2's layout: learned positions are dropped, everything else stays.

* Weights of layers are transposed (`Conv1D`), query, key and value are one tensor; the head is tied.
* `scale_attn_by_inverse_layer_idx` (Stanford's GPT-2s) scales the scores of each layer differently: refused.

Source: `transformers.models.gpt2`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from alibi_hf.checkpoints.rules import Copy, Rule, Split, Transposed
from alibi_hf.families._fields import (
    BOOL,
    INT,
    NUMBER,
    TEXT,
    TIE_FIELD,
    TOKEN_IDS,
    Field,
    build_config,
    need_multiple,
    read_fields,
)
from alibi_hf.families._layout import dropped_rules, head_rules, layer_modules, parameter_rules
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.retrofitting.layout import DROPPED, recognised, without_positions

NAMES = ("gpt2",)
ROUNDINGS = ("exact",)
REFERENCE = "transformers.GPT2LMHeadModel"
POSITIONS = "learned"
TOKENIZER = "GPT2Tokenizer"  # whose special tokens the published tokenizer_config.json leaves to the class
PREFIX = "transformer."

FIELDS = (
    Field(("vocab_size",), INT, default=50257, to="vocab_size"),
    Field(("n_positions", "max_position_embeddings"), INT, default=1024, to="max_position_embeddings"),
    Field(("n_embd", "hidden_size"), INT, default=768, to="hidden_size"),
    Field(("n_layer", "num_hidden_layers"), INT, default=12, to="num_hidden_layers"),
    Field(("n_head", "num_attention_heads"), INT, default=12, to="num_attention_heads"),
    Field(("n_inner",), INT, default=None, to="intermediate_size"),
    Field(("activation_function",), TEXT, default="gelu_new", to="hidden_act"),
    Field(("resid_pdrop",), NUMBER, default=0.1, to="hidden_dropout"),
    Field(("embd_pdrop",), NUMBER, default=0.1, to="embedding_dropout"),
    Field(("attn_pdrop",), NUMBER, default=0.1, to="attention_dropout"),
    Field(("layer_norm_epsilon",), NUMBER, default=1e-5, to="norm_eps"),
    Field(("scale_attn_weights",), BOOL, default=True),
    Field(
        ("scale_attn_by_inverse_layer_idx",),
        BOOL,
        default=False,
        accept=(False,),
        refusal="Here all layers scale their scores alike; train on a checkpoint without it.",
    ),
    Field(("pad_token_id",), TOKEN_IDS, default=None, to="pad_token_id"),
    Field(("bos_token_id",), TOKEN_IDS, default=50256, to="bos_token_id"),
    Field(("eos_token_id",), TOKEN_IDS, default=50256, to="eos_token_id"),
    TIE_FIELD,
)
INERT = {
    "_num_labels": "the older name of num_labels, which id2label says too",
    "output_past": "the older name of use_cache",
    "reorder_and_upcast_attn": "the same scores, in float32; here the softmax is in float32 anyway",
    **dict.fromkeys(
        ["n_ctx", "n_special", "predict_special_tokens"], "a setting of the first code that Transformers does not read"
    ),
    **dict.fromkeys(
        ["summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"],
        "read by GPT2DoubleHeadsModel only",
    ),
}


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are GPT-2's."""
    return recognised(NAMES, raw, tensor_names, "wpe.weight", "attn.c_attn.weight")


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a GPT-2 config.json with ALiBi in it; `ConfigFieldError` for what cannot be expressed."""
    values = read_fields(raw, FIELDS, INERT, "gpt2")
    need_multiple(values["n_embd"], values["n_head"], "gpt2")
    return build_config(
        "gpt2",
        raw,
        FIELDS,
        values,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        attention_scale=None if values["scale_attn_weights"] else 1.0,
        retrofitted_from="gpt2",
    )


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a GPT-2 checkpoint and what becomes of it."""
    layer, ours = "h.{i}.", "model.layers.{i}."
    modules: list[tuple[str, Any, Any]] = [
        ("ln_f", "model.norm", Copy()),
        (f"{layer}ln_1", f"{ours}input_layernorm", Copy()),
        (f"{layer}ln_2", f"{ours}post_attention_layernorm", Copy()),
        (
            f"{layer}attn.c_attn",
            [f"{ours}self_attn.{name}_proj" for name in "qkv"],
            Transposed(Split((config.hidden_size,) * 3)),
        ),
        (f"{layer}attn.c_proj", f"{ours}self_attn.o_proj", Transposed()),
        (f"{layer}mlp.c_fc", f"{ours}mlp.up_proj", Transposed()),
        (f"{layer}mlp.c_proj", f"{ours}mlp.down_proj", Transposed()),
    ]
    found = parameter_rules("wte", "model.embed_tokens", bias=False, prefix=PREFIX)
    for source, targets, operation in modules:
        found += parameter_rules(source, targets, bias=True, operation=operation, prefix=PREFIX)
    found.append(Rule("wpe.weight", fate="dropped", reason=DROPPED, prefix=PREFIX))
    buffers = [f"{layer}attn.bias", f"{layer}attn.masked_bias"]
    found += dropped_rules(buffers, "a buffer that holds the causal mask, not a bias", PREFIX)
    return found + head_rules(config, "wte.weight")


def notes(raw: dict[str, Any]) -> list[str]:
    """What became of the positions, one sentence each."""
    length = read_fields(raw, FIELDS, INERT, "gpt2")["n_positions"]
    return [f"the learned positions (wpe.weight, {length} of them) are dropped, and with them the ceiling on length"]


def reference(config: AlibiConfig) -> Reference:
    """`GPT2LMHeadModel` whose positions are all zero."""
    return without_positions(REFERENCE, _build, lambda model: layer_modules(model, "transformer.h", "attn"))


def _build(raw: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    source = GPT2Config.from_dict({**raw, "reorder_and_upcast_attn": False}, attn_implementation="eager")
    with torch.device("meta"):
        model = GPT2LMHeadModel(source).to(dtype).eval()
    table = model.transformer.wpe
    table.weight = nn.Parameter(torch.zeros(table.weight.shape, dtype=dtype), requires_grad=False)
    return model
