"""Upstream families: one module each, found by listing this folder, so that adding one touches nothing else.

A family module has five names: `NAMES` (its name, then the model types and classes it answers to), `recognise(raw,
tensor_names)`, `config(raw)`, `rules(config)` and `reference(config)`. Four constants describe it: `FIELDS`, what it
reads; `ROUNDINGS`, the values of `alibi_rounding` that mean something for it; `REFERENCE`, the upstream class; `ABOUT`,
what the list of families says about it.

A family whose config.json chooses between layouts of the files has one more, `variant(raw)`: the same family with the
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

OTHER_POSITIONS = ("gpt2", "llama", "mistral")  # model types without ALiBi that `retrofit` reads


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
        UnknownFamilyError: with the model_type and architectures found, and the families there are or those that
            config.json and the tensors belong to where they disagree.
    """
    _refuse_two_families(raw)
    for family in all_families():
        if family.recognise(raw, tensor_names):
            variant: Family | None = getattr(family, "variant", lambda _: None)(raw)
            return variant or family
    raise UnknownFamilyError(_unknown(raw, tensor_names))


def _refuse_two_families(raw: dict[str, Any]) -> None:
    """`UnknownFamilyError` where model_type and class names belong to different families."""
    names = [name for name in (raw.get("model_type"), *(raw.get("architectures") or [])) if name]
    owners = {name: {f.NAMES[0] for f in all_families() if name in f.NAMES} for name in names}
    known = {name: owner for name, owner in owners.items() if owner}
    if known and not set.intersection(*known.values()):
        said = ", ".join(f"{name} is {' or '.join(sorted(owner))}" for name, owner in known.items())
        raise UnknownFamilyError(
            f"config.json names two families in model_type={raw.get('model_type')!r} and architectures="
            f"{raw.get('architectures')!r}: {said}. Correct the one that does not describe the tensors."
        )


def _unknown(raw: dict[str, Any], tensor_names: Sequence[str]) -> str:
    """Why no family takes this config with these tensors."""
    found = f"model_type={raw.get('model_type')!r} with architectures={raw.get('architectures')!r}"
    tensors = f"tensors such as {list(tensor_names)[:3]}"
    named = [family.NAMES[0] for family in all_families() if family.recognise(raw, ())]
    if named:
        fitting = [f.NAMES[0] for f in all_families() if f.recognise({"model_type": f.NAMES[0]}, tensor_names)]
        theirs = " or ".join(fitting) if fitting else "no known family, or incomplete"
        return (
            f"{found} is the family {named[0]}, but {tensors} are of {theirs}. Config and weights belong to different "
            f"checkpoints, or files are missing."
        )
    if raw.get("model_type") == AlibiConfig.model_type:
        return f"{found} is this package's own layout: it is converted already; load it with from_pretrained."
    if raw.get("model_type") in OTHER_POSITIONS:
        return (
            f"{found} has no ALiBi: its positions are learned or rotary. Load it with Transformers' own class; "
            f"`alibi-hf retrofit` makes an ALiBi model of it, which must be trained on."
        )
    known = ", ".join(family.NAMES[0] for family in all_families())
    return f"{found} and {tensors} belongs to no known family. Known families: {known}."


__all__ = ["OTHER_POSITIONS", "Family", "all_families", "find_family"]
