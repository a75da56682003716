"""The encodings that `train_short_test_long.py` compares: what each sets in the configuration of the same decoder.

A model that was trained with RoPE can also be read with rescaled frequencies, which costs no training: YaRN and
NTK-aware scaling ("dynamic"), both in Transformers' own code.

Sources: ALiBi, Press, Smith and Lewis, arXiv:2108.12409; RoPE, Su et al., arXiv:2104.09864; sinusoidal positions,
Vaswani et al., arXiv:1706.03762; no positions (NoPE), Haviv et al., arXiv:2203.16634; YaRN, Peng et al.,
arXiv:2309.00071.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

THETA = 10000.0


def plain_rope(_length: int, _trained: int) -> dict[str, Any]:
    """Return the RoPE that models are trained with."""
    return {"rope_type": "default", "rope_theta": THETA}


def yarn(length: int, trained: int) -> dict[str, Any]:
    """Return RoPE scaled by YaRN from `trained` to `length` tokens; up to `trained` there is nothing to scale."""
    if length <= trained:
        return plain_rope(length, trained)
    factor = length / trained
    return {"rope_type": "yarn", "rope_theta": THETA, "factor": factor, "original_max_position_embeddings": trained}


def dynamic_ntk(_length: int, _trained: int) -> dict[str, Any]:
    """Return RoPE whose base grows with the length of the call; by that length over `max_position_embeddings`."""
    return {"rope_type": "dynamic", "rope_theta": THETA, "factor": 1.0}


@dataclass(frozen=True)
class Encoding:
    """One way to tell a decoder where a token is.

    Attributes:
        title: what tables and pictures call it.
        fields: of `AlibiConfig`, beside those that all share.
        readings: by title, the `rope_parameters` of reading `length` tokens when `trained` at; None: as trained.
    """

    title: str
    fields: dict[str, Any]
    readings: dict[str, Callable[[int, int], dict[str, Any]] | None]


ENCODINGS = {
    "alibi": Encoding("ALiBi", {}, {"ALiBi": None}),
    "rope": Encoding(
        "RoPE",
        {"alibi": False, "rope_parameters": plain_rope(0, 0)},
        {"RoPE": None, "RoPE, read with dynamic NTK": dynamic_ntk, "RoPE, read with YaRN": yarn},
    ),
    "hybrid": Encoding("ALiBi + RoPE", {"rope_parameters": plain_rope(0, 0)}, {"ALiBi + RoPE": None}),
    "sinusoidal": Encoding("sinusoidal", {"alibi": False, "sinusoidal_positions": True}, {"sinusoidal": None}),
    "nope": Encoding("no positions", {"alibi": False}, {"no positions": None}),
}


def check_encodings(names: Sequence[str]) -> None:
    """Refuse encodings that are not in the table.

    Raises:
        ValueError: naming it, or that there is none or one twice.
    """
    for name in names:
        if name not in ENCODINGS:
            raise ValueError(f"There is no encoding {name!r}; choose from {', '.join(ENCODINGS)}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--encodings {' '.join(names)} must name each encoding once.")
