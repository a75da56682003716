"""Text from checkpoints as Markdown that shows it and does nothing else; names, notes and paths are anybody's."""

import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]|~#$!])")
_SPACE = re.compile(r"[\x00-\x20\x7f\u0085\u2028\u2029]+")


def plain(text: str) -> str:
    """Return `text` in one line, as words: no markup, no HTML."""
    line = _SPACE.sub(" ", text).strip()
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)


def code(text: str) -> str:
    """Return `text` in one line as a code span, whatever backticks are in it."""
    line = _SPACE.sub(" ", text).strip()
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{'`' * (longest + 1)}{space}{line}{space}{'`' * (longest + 1)}" if line else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return a table of cells that are Markdown already; a bar in one does not end it.

    Args:
        columns: the heads.
        rows: the cells, as many as heads.
        right: the places of columns of numbers.
    """
    lines = ["|".join("---:" if place in right else "---" for place in range(len(columns)))]
    lines += ["|".join(f" {_cell(cell)} " for cell in row) for row in rows]
    return "\n".join(f"|{line}|" for line in ["|".join(f" {column} " for column in columns), *lines])


def _cell(cell: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", cell)


def bullets(lines: Iterable[str]) -> str:
    """Return a list of lines that are Markdown already."""
    return "\n".join(f"* {line}" for line in lines)


__all__ = ["bullets", "code", "plain", "table"]
