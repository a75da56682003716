"""The frame of a page and its parts as HTML. Plain strings that come in are escaped; the same input, the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from .figures import Figure

# Nothing may be fetched and nothing may run, whatever names a checkpoint or a text holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
NO_FIGURES = 'The figures need matplotlib: <code>pip install "alibi-hf[plots]"</code>, then run the same again.'


def as_html(title: str, body: str) -> str:
    """Return the whole page. `body` is HTML already, `title` is not."""
    style = (files("alibi_hf.pages") / "page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def section(heading: str, body: str) -> str:
    """Return a section; `body` is HTML already."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}</section>\n"


def definitions(rows: Mapping[str, str]) -> str:
    """Return names and what they mean, as a list of definitions; what is empty is left out."""
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in rows.items() if value)
    return f"<dl>\n{pairs}</dl>\n"


def listed(values: Mapping[str, object]) -> str:
    """Return names and values in one line of plain text: "torch 2.13.0, python 3.11.7"."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def unordered(lines: Iterable[str]) -> str:
    """Return an unordered list."""
    return "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n"


def key(entries: Iterable[tuple[str, str]]) -> str:
    """Return what the lines of figures stand for: pairs of a `swatch`, which is SVG already, and a name."""
    items = "".join(f"<li>{swatch}<span>{escape(name)}</span></li>\n" for swatch, name in entries)
    return f'<ul class="key">\n{items}</ul>\n'


def figure_grid(figures: Sequence[Figure] | None) -> str:
    """Return figures side by side where there is room; None stands for matplotlib that is not installed."""
    if figures is None:
        return f'<p class="dim">{NO_FIGURES}</p>\n'
    return f'<div class="figures">\n{"".join(map(_figure, figures))}</div>\n'


def _figure(figure: Figure) -> str:
    return f"<figure>\n{figure.svg}<figcaption>{escape(figure.caption)}</figcaption>\n</figure>\n"


def table(label: str, columns: Sequence[str], rows: Iterable[Sequence[str]], marks: Mapping[str, str]) -> str:
    """Return a table that scrolls sideways by itself where it is too wide.

    Args:
        label: what a screen reader calls it.
        marks: the class ("ok" or "failed") of a last cell with that text; any other text has none.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    return f"""<div class="table" tabindex="0" role="region" aria-label="{escape(label)}">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{"".join(_row(cells, marks) for cells in rows)}</tbody>
</table>
</div>
"""


def _row(cells: Sequence[str], marks: Mapping[str, str]) -> str:
    *values, last = cells
    body = "".join(f"<td>{escape(value)}</td>" for value in values)
    kind = f' class="{marks[last]}"' if last in marks else ""
    return f"<tr>{body}<td{kind}>{escape(last)}</td></tr>\n"
