"""What the card of a source says about licence, language and data: all that is carried over, and nothing is guessed."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError  # type: ignore[import-untyped]

FILE = "README.md"
_LONGEST = 1 << 20  # bytes; published cards have a tenth of it
FIELDS = ("license", "license_name", "license_link", "language", "datasets")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u2028\u2029]")


def read_source_card(folder: Path) -> dict[str, str | list[str]]:
    """The fields of `FIELDS` that the card of `folder` gives, each one line of text or a list of such lines.

    A card that is missing, unreadable or absurdly long says nothing, and so does a value of any other kind.
    """
    path = folder / FILE
    if not path.is_file() or path.stat().st_size > _LONGEST:
        return {}
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, RecursionError, YAMLError):
        return {}
    kept = {name: _text(found.get(name)) for name in FIELDS}
    return {name: value for name, value in kept.items() if value}


def _text(value: Any) -> str | list[str]:
    return [line for entry in value if (line := _line(entry))] if isinstance(value, list) else _line(value)


def _line(value: Any) -> str:
    """The text of a value, "" for what is none. `no` without quotes, which YAML reads as false, is Norwegian."""
    text = "no" if value is False else value
    return text.strip() if isinstance(text, str) and not _CONTROL.search(text.strip()) else ""


__all__ = ["FIELDS", "read_source_card"]
