"""What is done to good files: hypothesis strategies that give the bytes of a bad one."""

import json
import struct
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, 1, -1, 2, 3, 7, 48, 97, 2**31, 2**63, 2**64, 10**12, 10**30, -(10**30), 10**400)
FRACTIONS = (0.5, -0.0, 3.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "6", "gelu", "linear", "auto", "\x00", "\ud800", "../config.json", "/etc/passwd", "x" * 300, "{0}", "[b]")
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(FRACTIONS),
    st.sampled_from(TEXTS),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
)
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


def _deep(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = st.one_of(SCALARS, NESTED, st.sampled_from([_deep(20), _deep(200), [0.5] * 20_000, ["a"] * 6, [0.1] * 6]))


@st.composite
def changed_json(draw: st.DrawFn, good: dict[str, Any], names: tuple[str, ...]) -> bytes:
    """`good` with some fields set, taken out or renamed, at any depth; sometimes damaged as text."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 4))):
        _change(draw, value, names)
    return draw(damaged(json.dumps(value).encode()))


def _change(draw: st.DrawFn, value: dict[str, Any], names: tuple[str, ...]) -> None:
    name = draw(st.one_of(st.sampled_from(sorted({*value, *names}) or [""]), st.text(max_size=12)))
    held = value.get(name)
    if isinstance(held, dict) and held and draw(st.booleans()):
        _change(draw, held, ())
    elif name in value and draw(st.integers(0, 5)) == 0:
        del value[name]
    elif isinstance(held, int) and draw(st.booleans()):
        value[name] = held + draw(st.sampled_from((-1, 1, held, 6)))  # wrong by so little that much else still fits
    else:
        value[name] = draw(VALUES)


@st.composite
def damaged(draw: st.DrawFn, data: bytes, window: int = 1 << 12) -> bytes:
    """`data`, in one of six cases with bytes of its first `window` changed, or cut short, or put in."""
    if draw(st.integers(0, 5)):
        return data
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, min(window, len(data))))
        kind = draw(st.sampled_from(("set", "cut", "insert")))
        new = draw(
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from((b"[" * 5000, b"\xff\xfe", b"9" * 500)))
        )
        end = {"set": place + len(new), "cut": len(data), "insert": place}[kind]
        data = data[:place] + (b"" if kind == "cut" else new) + data[end:]
    return data


@st.composite
def changed_safetensors(draw: st.DrawFn, good: bytes) -> bytes:
    """A safetensors file whose header, its length or its data are not what they were."""
    start = 8 + struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8:start])
    for _ in range(draw(st.integers(0, 3))):
        _change_entry(draw, header)
    text = draw(damaged(json.dumps(header).encode()))
    lengths, data = (0, 1, 2**24, 2**63, 2**64 - 1, len(good)), good[start:]
    length = draw(st.sampled_from((*[len(text)] * 4 * len(lengths), *lengths)))
    rest = draw(st.sampled_from((*[data] * 12, data[:-1], data + b"\x00", b"")))
    return struct.pack("<Q", length) + text + rest


def _change_entry(draw: st.DrawFn, header: dict[str, Any]) -> None:
    name = draw(st.sampled_from(sorted(header)))
    entry = header[name]
    kind = draw(st.sampled_from(("rename", "copy", "drop", "whole", "dtype", "shape", "data_offsets", "one")))
    if kind in ("rename", "copy"):
        other = st.sampled_from((f"{name}\n", f"transformer.{name}", name.replace("0", "00"), name.replace("1", "٣")))
        header[draw(st.one_of(other, st.text(max_size=12)))] = entry
    if kind in ("rename", "drop") and len(header) > 1:
        header.pop(name, None)
    elif kind == "whole":
        header[name] = draw(NESTED)
    elif kind == "dtype" and isinstance(entry, dict):
        entry["dtype"] = draw(st.one_of(st.sampled_from(("F64", "BF16", "I8", "BOOL", "F8_E4M3", "F4")), NESTED))
    elif kind in ("shape", "data_offsets") and isinstance(entry, dict):
        entry[kind] = draw(st.one_of(NESTED, st.lists(st.sampled_from(NUMBERS), max_size=4), st.just([1] * 3000)))
    elif kind == "one" and isinstance(entry, dict):
        numbers = entry.get(draw(st.sampled_from(("shape", "data_offsets"))))
        if isinstance(numbers, list) and numbers:
            numbers[draw(st.integers(0, len(numbers) - 1))] = draw(SCALARS)


@st.composite
def changed_index(draw: st.DrawFn, good: dict[str, Any]) -> bytes:
    """An index with tensors that are put elsewhere, left out or added."""
    value = json.loads(json.dumps(good))
    mapping = value["weight_map"]
    files = st.one_of(st.sampled_from(sorted(set(mapping.values()))), st.sampled_from(TEXTS), NESTED)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.one_of(st.sampled_from(sorted(mapping)), st.text(max_size=12)))
        if name in mapping and draw(st.booleans()):
            del mapping[name]
        else:
            mapping[name] = draw(files)
    if draw(st.integers(0, 4)) == 0:
        _change(draw, value, ("weight_map", "metadata"))
    return draw(damaged(json.dumps(value).encode()))
