"""`About`: what the list of families says about one besides what its code says itself."""

from dataclasses import dataclass

OLD_CODE = "remote code that Transformers 5 no longer loads"
PACKED = "packed documents see each other"


@dataclass(frozen=True)
class About:
    """What a family covers; each entry is a few words.

    Attributes:
        checkpoints: published checkpoints with this layout.
        switches: what its decoder needs that not every family does.
        outside: programs that share no code with this package or its reference and that tests compare with.
        exports: what `alibi-hf export` can write its checkpoints as.
        defects: what upstream's own code is known to get wrong, and this package does not.
        proof: how it is proved where that is not as usual; see `alibi_hf.checkpoints.listing`.
    """

    checkpoints: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    exports: tuple[str, ...] = ()
    defects: tuple[str, ...] = ()
    proof: str = ""


__all__ = ["OLD_CODE", "PACKED", "About"]
