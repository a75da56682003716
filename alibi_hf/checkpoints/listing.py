"""`list_families`: what is supported, what each family is compared with, and where its checkpoints can go.

Everything comes from the family modules; the table of the README is `FamilyList.markdown()`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alibi_hf.checkpoints.writer import write_json
from alibi_hf.families import Family, all_families
from alibi_hf.families._about import About

SCHEMA_VERSION = 1
READS = ("from_pretrained", "convert")
_CLASS = "bias, tensors, logits, padding, decoding, generation, loss and gradients against float64"
_PLAIN = (
    "bias, tensors, logits, padding, loss and gradients against float64; the tests hold module and model against "
    "formulas that share no code with either"
)
_COLUMNS = ("family", "checkpoints", "switches", "proved against", "outside check", "out", "upstream's known defects")


@dataclass(frozen=True)
class FamilyInfo:
    """One family.

    Attributes:
        name: the family's name, as reports give it.
        summary: one sentence on what it is.
        model_types: the model types and classes in config.json that it answers to.
        checkpoints: published checkpoints with this layout.
        switches: what its decoder needs that not every family does.
        roundings: the values of `alibi_rounding` that mean something for it.
        reference: the class of Transformers, or the plain module of this package, that `verify` compares with.
        proof: what is compared there.
        outside: programs of others that tests compare with as well.
        reads: the ways in.
        exports: the ways out: what `alibi-hf export` can write its checkpoints as.
        defects: what upstream's own code is known to get wrong.
    """

    name: str
    summary: str
    model_types: list[str]
    checkpoints: list[str]
    switches: list[str]
    roundings: list[str]
    reference: str
    proof: str
    outside: list[str]
    reads: list[str]
    exports: list[str]
    defects: list[str]


@dataclass(frozen=True)
class FamilyList:
    """Every family that this package knows."""

    families: list[FamilyInfo]

    def to_dict(self) -> dict[str, Any]:
        """The content of `families.json`."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def save(self, directory: str | Path) -> Path:
        """Write `families.json` into `directory` and return its path."""
        return write_json(Path(directory) / "families.json", self.to_dict())

    def markdown(self) -> str:
        """A table with one row a family, for the README."""
        lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
        return "\n".join([*lines, *(_row(family) for family in self.families)]) + "\n"


def list_families() -> FamilyList:
    """Every family: what it covers, what it is proved against, and where its checkpoints can go."""
    return FamilyList([_describe(family) for family in all_families()])


def _describe(family: Family) -> FamilyInfo:
    about: About = getattr(family, "ABOUT", About())
    return FamilyInfo(
        name=family.NAMES[0],
        summary=(family.__doc__ or "").split("\n")[0],
        model_types=list(family.NAMES),
        checkpoints=list(about.checkpoints),
        switches=list(about.switches),
        roundings=list(family.ROUNDINGS),
        reference=family.REFERENCE,
        proof=about.proof or (_CLASS if family.REFERENCE.startswith("transformers.") else _PLAIN),
        outside=list(about.outside),
        reads=list(READS),
        exports=list(about.exports),
        defects=list(about.defects),
    )


def _row(family: FamilyInfo) -> str:
    reference = family.reference
    if not reference.startswith("transformers."):
        reference = "plain module after upstream's formulas"
    cells = [
        f"`{family.name}`",
        _words(family.checkpoints),
        _words(family.switches),
        reference,
        _words(family.outside),
        _words(family.exports),
        "; ".join(family.defects) or "none",
    ]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _words(items: Sequence[str]) -> str:
    return ", ".join(items) or "none"


__all__ = ["FamilyInfo", "FamilyList", "list_families"]
