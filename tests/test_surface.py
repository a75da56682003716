"""The public surface changes only on purpose, and the version is the same wherever it is said."""

import json
import re
from pathlib import Path

import pytest

import alibi_hf
from tests import surface

CHANGED = (
    "the public surface is another one. If that is meant, run `python -m tests.surface`, commit tests/surface.json and "
    "say in CHANGELOG.md what people who use it have to know."
)
CHANGELOG = Path("CHANGELOG.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
# https://semver.org, without build metadata.
SEMANTIC = r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(?:-[0-9A-Za-z.-]+)?"


def pinned(part: str):
    """What tests/surface.json says of a part."""
    return json.loads(surface.FILE.read_text(encoding="utf-8"))[part]


@pytest.mark.parametrize("part", ["python", "config", "command line", "exit status"])
def test_the_surface_is_the_one_that_is_pinned(part):
    assert json.loads(surface.written(surface.surface()))[part] == pinned(part), CHANGED


@pytest.mark.slow
def test_the_json_reports_have_the_keys_that_are_pinned(tmp_path):
    found = surface.reports(tmp_path)
    assert found.keys() == pinned("reports").keys(), CHANGED
    for name, schema in found.items():
        assert schema == pinned("reports")[name], f"{name}: {CHANGED}"


def test_every_public_name_is_there_and_documented():
    assert sorted(alibi_hf.__all__) == alibi_hf.__all__
    for name in set(alibi_hf.__all__) - {"__version__"}:
        assert getattr(alibi_hf, name).__doc__, name


def test_the_version_is_the_same_everywhere():
    declared = re.search(r'^version = "(.*)"$', Path("pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared and declared[1] == HEADINGS[0].split(" ")[0]
    assert alibi_hf.__version__ in (declared[1], "0+unknown")  # a source tree that was never installed


def test_the_changelog_has_releases_newest_first():
    """As in Keep a Changelog: a semantic version and a date each; only the newest may have none yet."""
    dated = [f"{SEMANTIC} \\(\\d{{4}}-\\d\\d-\\d\\d\\)"] * len(HEADINGS)
    dated[0] = f"{SEMANTIC} \\((unreleased|\\d{{4}}-\\d\\d-\\d\\d)\\)"
    for pattern, heading in zip(dated, HEADINGS, strict=True):
        assert re.fullmatch(pattern, heading), heading
    versions = [tuple(map(int, re.match(SEMANTIC, heading).groups())) for heading in HEADINGS]
    assert versions == sorted(set(versions), reverse=True)


def test_schemas_tell_a_changed_key_and_a_changed_type():
    report = {"a": [{"b": 1}, {"b": None, "c": "x"}], "versions": {"torch": "2"}, "d": []}
    found = surface.schema(report)
    assert found == {
        "a": [{"b": "null | number", "c": "string"}],
        "versions": "object",
        "d": [surface.EMPTY],
    }
    assert surface.schema({**report, "d": [True]}) != found and surface.schema({**report, "e": 1}) != found
