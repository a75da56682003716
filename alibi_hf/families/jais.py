"""Jais 13B and 30B, their chat versions, and the Jais family from 590M to 30B: BTLM's layout under other names.

* What `btlm.py` says of slopes, weights, factors and rounding holds here.
* The first repositories have older names for the muP fields: `scale_qk_dot_by_d`, `embeddings_scale` and `width_scale`,
  which is already the product of `mup_output_alpha` and `mup_width_scale`.
* Jais-2 and jais-adapted are Llamas with RoPE, and not this package's.

Source: `modeling_jais.py` of the model repositories, such as inceptionai/jais-13b.
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
    "jais",
    "JAISLMHeadModel",
    "JAISModel",
    "JAISForSequenceClassification",
    "JAISForTokenClassification",
    "JAISForQuestionAnswering",
)
ABOUT = replace(
    ABOUT_CEREBRAS,
    checkpoints=("Jais-13B", "Jais-30B-v1", "Jais-30B-v3", "their chat versions", "Jais family 590M to 30B"),
    outside=("llama.cpp",),
    defects=("vLLM ignores alibi_scaling and assumes tied embeddings", *ABOUT_CEREBRAS.defects),
)

__all__ = ["ABOUT", "FIELDS", "NAMES", "REFERENCE", "ROUNDINGS", "config", "recognise", "reference", "rules"]


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are Jais'."""
    return btlm_recognise(NAMES, raw, tensor_names)


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a Jais config.json, but for the slopes; `ConfigFieldError` for the inexpressible."""
    return btlm_config("jais", raw)


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a Jais checkpoint and what becomes of it."""
    return btlm_rules(config)


def reference(config: AlibiConfig) -> Reference:
    """A plain module after upstream's formulas: Transformers has no class for Jais."""
    return btlm_reference("jais")
