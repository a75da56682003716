"""Replit-code-v1-3b as it was first published; `replit_lm` is MosaicGPT under another name.

* Layout, slopes and reference: see `_mosaic`. The later upload, and Replit-code-v1.5, are MPT.

Source: github.com/replit/ReplitLM, which names MosaicML `examples` v0.0.4 as the code it was trained with.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from alibi_hf.checkpoints.rules import Rule
from alibi_hf.families._layout import named
from alibi_hf.families._mosaic import (
    ABOUT_MOSAIC,
    FIELDS,
    REFERENCE,
    has_old_names,
    mosaic_config,
    mosaic_reference,
    mosaic_rules,
)
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig

NAMES = ("replit_lm", "ReplitLM")
ABOUT = replace(ABOUT_MOSAIC, checkpoints=("replit-code-v1-3b (first upload)",))
ROUNDINGS = ("exact",)

__all__ = ["ABOUT", "FIELDS", "NAMES", "REFERENCE", "ROUNDINGS", "config", "recognise", "reference", "rules"]


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are ReplitLM's."""
    return named(raw, NAMES) and has_old_names(tensor_names)


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a ReplitLM config.json; `ConfigFieldError` for what cannot be expressed."""
    return mosaic_config(raw, NAMES[0])


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a ReplitLM checkpoint and what becomes of it."""
    return mosaic_rules(config)


def reference(config: AlibiConfig) -> Reference:
    """The plain module after upstream's formulas; there is no class to be had."""
    return mosaic_reference(NAMES[0])
