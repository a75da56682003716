"""MosaicGPT, the MPT before MPT: mpt-1b-redpajama-200b and its dolly variant.

* Layout, slopes and reference: see `_mosaic`.

Source: MosaicML `examples` v0.0.4, `llm/src/models/mosaic_gpt`.
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

NAMES = ("mosaic_gpt", "MosaicGPT")
ABOUT = replace(ABOUT_MOSAIC, checkpoints=("mpt-1b-redpajama-200b", "mpt-1b-redpajama-200b-dolly"))
ROUNDINGS = ("exact",)

__all__ = ["ABOUT", "FIELDS", "NAMES", "REFERENCE", "ROUNDINGS", "config", "recognise", "reference", "rules"]


def recognise(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    """Whether config and, if there are any, tensor names are MosaicGPT's."""
    return named(raw, NAMES) and has_old_names(tensor_names)


def config(raw: dict[str, Any]) -> AlibiConfig:
    """The `AlibiConfig` of a MosaicGPT config.json; `ConfigFieldError` for what cannot be expressed."""
    return mosaic_config(raw, NAMES[0])


def rules(config: AlibiConfig) -> list[Rule]:
    """Every tensor of a MosaicGPT checkpoint and what becomes of it."""
    return mosaic_rules(config)


def reference(config: AlibiConfig) -> Reference:
    """The plain module after upstream's formulas; there is no class to be had."""
    return mosaic_reference(NAMES[0])
