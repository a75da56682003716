"""Upstream families: one module each, found by listing this folder, so that adding one touches nothing else.

A family module has five names: `NAMES` (its name, then the model types and classes it answers to), `recognise(raw,
tensor_names)`, `config(raw)`, `rules(config)` and `reference(config)`. Three constants describe it: `FIELDS`, what it
reads; `ROUNDINGS`, the values of `alibi_rounding` that mean something for it; `REFERENCE`, the upstream class.

A family whose config.json chooses between layouts of the files has a ninth, `variant(raw)`: the same family with the
rules and the reference of that layout, or None for the usual one.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, cast

from alibi_hf.checkpoints.rules import Rule
from alibi_hf.errors import UnknownFamilyError
from alibi_hf.families._fields import Field
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig


class Family(Protocol):
    """What a family module offers; see the package's docstring."""

    NAMES: tuple[str, ...]
    FIELDS: tuple[Field, ...]
    ROUNDINGS: tuple[str, ...]
    REFERENCE: str
    __doc__: str | None

    def recognise(self, raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
        """Whether config and tensor names are this family's."""
        ...

    def config(self, raw: dict[str, Any]) -> AlibiConfig:
        """The `AlibiConfig` of an upstream config; `ConfigFieldError` for what cannot be expressed."""
        ...

    def rules(self, config: AlibiConfig) -> list[Rule]:
        """Every tensor of a checkpoint with this config and what becomes of it."""
        ...

    def reference(self, config: AlibiConfig) -> Reference:
        """The upstream class to compare with."""
        ...


@cache
def all_families() -> tuple[Family, ...]:
    """The family modules, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return tuple(cast(Family, importlib.import_module(f"{__name__}.{name}")) for name in names)


def find_family(raw: dict[str, Any], tensor_names: Sequence[str] = ()) -> Family:
    """The family of a checkpoint, by its parsed config.json and its tensor names.

    Raises:
        UnknownFamilyError: with the model_type and architectures found and the families there are.
    """
    for family in all_families():
        if family.recognise(raw, tensor_names):
            variant: Family | None = getattr(family, "variant", lambda _: None)(raw)
            return variant or family
    known = ", ".join(family.NAMES[0] for family in all_families())
    raise UnknownFamilyError(
        f"model_type={raw.get('model_type')!r} with architectures={raw.get('architectures')!r} and tensors such as "
        f"{list(tensor_names)[:3]} belongs to no known family. Known families: {known}."
    )


__all__ = ["Family", "all_families", "find_family"]
