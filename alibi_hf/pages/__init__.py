"""One page of HTML that needs nothing else, no network, no script, no file beside it: what all reports share."""

from .figures import Figure
from .heat_map import heat_map
from .page import as_html, definitions, figure_grid, key, listed, section, table, unordered

__all__ = [
    "Figure",
    "as_html",
    "definitions",
    "figure_grid",
    "heat_map",
    "key",
    "listed",
    "section",
    "table",
    "unordered",
]
