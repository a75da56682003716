"""Tiny checkpoints and their conversions, made once a test run."""

from functools import cache
from pathlib import Path

from alibi_hf.checkpoints.convert import convert
from tests import builders
from tests.scratch import scratch_folder

LENGTHS = (12, 40)


def pair(family: str, heads: int = 6, **kwargs: object) -> tuple[Path, Path]:
    """(source, output) of a tiny checkpoint; the tests that change the output copy it first."""
    return _pair(family, heads, tuple(sorted(kwargs.items())))


@cache
def _pair(family: str, heads: int, kwargs: tuple[tuple[str, object], ...]) -> tuple[Path, Path]:
    folder = scratch_folder(f"{family}-{heads}-")
    source = getattr(builders, family)(folder / "source", heads, **dict(kwargs))
    convert(source, folder / "output", verify=False)
    return source, folder / "output"
