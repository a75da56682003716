"""JSON that a person can scroll through: a list of numbers stays on one line. What is not finite becomes null."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_NUMBERS = re.compile(r"\[\n\s*([^\[\]{}\"]+?)\n\s*\]")  # strings hold no newline, so this cannot be inside one


def compact_json(value: Any) -> str:
    """Return `value` as JSON with a newline at the end; `ValueError` for NaN and infinities."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return _NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"


def finite(value: Any) -> Any:
    """Return `value` with None in the place of NaN and infinities, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
