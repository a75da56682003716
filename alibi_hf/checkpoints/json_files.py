"""JSON that a stranger wrote: of bounded size and depth, and refused where two readers could differ about it.

Everything that this package reads as JSON, headers of safetensors files included, comes through here. The limits are
far above what checkpoints hold: an index of 100,000 tensors has 10 MB. A file takes at most some 30 times its size.
"""

import json
import os
from pathlib import Path
from typing import Any

from alibi_hf.errors import CheckpointFileError

MAX_JSON = 16 << 20  # bytes
MAX_DEPTH = 32  # lists and objects inside one another
_DIGITS = 40  # of a whole number; tokenizers write their endless length with 31


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes.

    Raises:
        CheckpointFileError: if it is missing, no regular file (which could be read for ever), too large, or no object;
            if a name is there twice, or it holds NaN, infinite numbers or halves of characters.
    """
    if not os.path.exists(path):
        raise CheckpointFileError(f"{path} does not exist; give a folder with {path.name} in it.")
    if not os.path.isfile(path):
        raise CheckpointFileError(f"{path} cannot be read as JSON: it is a folder, a pipe or a device, not a file.")
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ValueError(f"it has {path.stat().st_size} bytes, and at most {limit} are read")
        value = parse_json(data)
    except (OSError, ValueError) as error:
        raise CheckpointFileError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointFileError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8; `ValueError` with what is wrong with it."""
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_once,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_depth(value)
    if b"\\ud" in data.lower():  # only an escape can give half a character
        json.dumps(value, ensure_ascii=False).encode()
    return value


_TOO_DEEP = f"lists and objects are nested more than {MAX_DEPTH} deep"


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object; `ValueError` for a name that is there twice, of which json would keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name:.200} is there twice")
            seen.add(name)
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text:.40} is larger than any number of 64 bits")
    return number


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits, {text[:10]}..., is larger than any field can hold")
    return int(text)


__all__ = ["MAX_DEPTH", "MAX_JSON", "parse_json", "read_json"]
