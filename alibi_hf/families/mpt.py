"""MPT as llm-foundry and as Transformers write it: MPT-7B/30B and their chat and long variants, PhoGPT, Krutrim.

* One model_type, two dialects whose defaults differ: llm-foundry's remote code (`MPTForCausalLM`; no ALiBi and biases
  unless told otherwise) and Transformers' class (`MptForCausalLM`; ALiBi and no biases).
* Fused rows are contiguous `[q; k; v]`, with fewer key/value rows for grouped or single key/value heads; llm-foundry
  can keep them apart (`fused_qkv: false`) and put norms and attention into a module of their own
  (`fuse_norm_attn_norm`). Queries, keys and values are clamped before the query/key norm.
* Transformers' class ignores many of these fields; a checkpoint that uses one is compared with a plain module written
  after llm-foundry's formulas instead.

Sources: `transformers.models.mpt`; llm-foundry, `llmfoundry/models/mpt` and `llmfoundry/models/layers`.
"""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from alibi_hf.checkpoints.rules import Rule
from alibi_hf.families._about import PACKED, About
from alibi_hf.families._layout import has_tensor, named
from alibi_hf.families._mpt_config import FIELDS, mpt_config
from alibi_hf.families._mpt_layout import USUAL, mpt_layout, mpt_rules
from alibi_hf.families._mpt_reference import mpt_reference
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig

NAMES = (
    "mpt",
    "MPTForCausalLM",
    "MptForCausalLM",
    "MptModel",
    "MptForSequenceClassification",
    "MptForTokenClassification",
    "MptForQuestionAnswering",
)
ROUNDINGS = ("exact",)
REFERENCE = "transformers.MptForCausalLM"
ABOUT = About(
    checkpoints=("MPT-7B", "MPT-30B", "MPT-7B-8k", "MPT-7B-StoryWriter", "PhoGPT", "Krutrim-1", "replit-code-v1_5-3b"),
    switches=(
        "alibi_bias_max",
        "clip_qkv",
        "qk_norm",
        "num_key_value_heads",
        "mlp_type",
        "norm_type",
        "biases",
        "attention_scale",
        "logit_scale",
        "soft caps",
    ),
    outside=("CTranslate2", "llama.cpp"),
    exports=("mpt", "llm-foundry", "gguf"),
    defects=(
        "alibi, alibi_bias_max, learned_pos_emb, no_bias, expansion_ratio, logit_scale, qk_ln, attn_type are ignored",
        "rows longer than max_seq_len fail",
        "an integer clip_qkv stops the load",
        "boolean 4-D masks are taken the wrong way round",
        "masked tokens inside a row count as distance",
        "eager attention only",
        PACKED,
    ),
    proof="bias, tensors, logits, padding, decoding, generation, loss and gradients against float64; what "
    "MptForCausalLM ignores is compared with a plain module after llm-foundry's formulas, whole rows only",
)

__all__ = ["ABOUT", "FIELDS", "NAMES", "REFERENCE", "ROUNDINGS", "config", "recognise", "reference", "rules", "variant"]


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are MPT's."""
    if not named(raw, NAMES):
        return False
    return not tensor_names or has_tensor(tensor_names, "wte.weight", "norm_f.weight")


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of an MPT config.json, whichever its dialect; `ConfigFieldError` for the inexpressible."""
    return mpt_config(raw)


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of an MPT checkpoint in the usual layout and what becomes of it."""
    return mpt_rules(config)


def reference(config: AlibiConfig) -> Reference:
    """`MptForCausalLM` where it computes this config, else the plain llm-foundry module."""
    return mpt_reference(config)


def variant(raw: dict[str, Any]) -> Any:
    """The family with the rules and the reference of the layout that config.json asks for; None for the usual one."""
    layout = mpt_layout(raw)
    if layout == USUAL:
        return None
    return SimpleNamespace(
        NAMES=NAMES,
        FIELDS=FIELDS,
        ROUNDINGS=ROUNDINGS,
        REFERENCE=REFERENCE,
        recognise=recognise,
        config=config,
        rules=partial(mpt_rules, layout=layout),
        reference=partial(mpt_reference, layout=layout),
    )
