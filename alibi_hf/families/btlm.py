"""BTLM-3B-8K, base and chat: GPT-2's layout with ALiBi, muP factors and SwiGLU.

* The slopes are a tensor of the checkpoint, `relative_pe.slopes`; they go to `alibi_slopes` of config.json as they are.
* Weights are those of Transformers' `Conv1D`, [in, out]; `c_attn` is contiguous `[q | k | v]`; `mlp.c_fc2` is the gate.
* muP: scores over head_dim instead of its root, factors on embeddings and logits.
* `alibi_scaling` divides the slopes by a fixed factor, or by the length of the call over the training length.
* Upstream rounds slopes and bias to the model's dtype; `alibi_rounding="jais"` does so, too.

Source: `modeling_btlm.py` of the model repository, cerebras/btlm-3b-8k-base.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from alibi_hf.checkpoints.rules import Rule
from alibi_hf.families._btlm import ABOUT_CEREBRAS, REFERENCE, ROUNDINGS, btlm_recognise, btlm_reference, btlm_rules
from alibi_hf.families._btlm_config import FIELDS, btlm_config
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig

NAMES = (
    "btlm",
    "BTLMLMHeadModel",
    "BTLMModel",
    "BTLMForSequenceClassification",
    "BTLMForTokenClassification",
    "BTLMForQuestionAnswering",
)
ABOUT = replace(ABOUT_CEREBRAS, checkpoints=("BTLM-3B-8k-base", "BTLM-3B-8k-chat"))

__all__ = ["ABOUT", "FIELDS", "NAMES", "REFERENCE", "ROUNDINGS", "config", "recognise", "reference", "rules"]


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are BTLM's."""
    return btlm_recognise(NAMES, raw, tensor_names)


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a BTLM config.json, but for the slopes; `ConfigFieldError` for the inexpressible."""
    return btlm_config("btlm", raw)


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a BTLM checkpoint and what becomes of it."""
    return btlm_rules(config)


def reference(config: AlibiConfig) -> Reference:
    """A plain module after upstream's formulas: Transformers has no class for BTLM."""
    return btlm_reference("btlm")
