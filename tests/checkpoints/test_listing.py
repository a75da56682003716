"""The list of families says what their code says, and the README says what the list says."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.export import TARGETS, export
from alibi_hf.checkpoints.inspect import inspect_checkpoint
from alibi_hf.checkpoints.listing import FamilyInfo, FamilyList, list_families
from alibi_hf.cli import app
from alibi_hf.errors import ConfigFieldError
from alibi_hf.families import all_families
from alibi_hf.model.configuration_alibi import AlibiConfig
from tests.all_families import FAMILIES

LISTED = {family.name: family for family in list_families().families}


def test_every_family_is_listed_and_says_what_it_covers():
    assert list(LISTED) == [family.NAMES[0] for family in all_families()]
    for family in LISTED.values():
        assert family.summary and family.checkpoints and family.switches and family.defects, family.name
        assert family.model_types[0] == family.name and "exact" in family.roundings
        assert family.reads == ["from_pretrained", "convert"] and len(family.proof) > 40


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_one_that_is_compared_with(family, tmp_path):
    found = inspect_checkpoint(FAMILIES[family](tmp_path))
    assert LISTED[found.family].reference == found.reference


@pytest.mark.parametrize("family", LISTED.values(), ids=LISTED)
def test_switches_are_fields_of_the_config(family):
    """Each starts with a field of `AlibiConfig`, or is two plain words that stand for several."""
    fields = set(AlibiConfig.__annotations__) | {"biases", "soft"}
    for switch in family.switches:
        assert re.split(r"\W", switch)[0] in fields, switch


def test_outside_programs_are_those_of_the_tests():
    tests = {"CTranslate2": "tests/test_ctranslate2.py", "llama.cpp": "tests/test_llamacpp.py"}
    assert {program for family in LISTED.values() for program in family.outside} <= set(tests)
    text = Path(tests["CTranslate2"]).read_text()
    for family in LISTED.values():
        assert ("CTranslate2" in family.outside) == (f'"{family.name}-' in text), family.name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_family_is_exported_where_the_list_says_so(family, target, tmp_path):
    convert(FAMILIES[family](tmp_path / "source", heads=8), tmp_path / "ours", verify=False)  # slopes of every family
    listed = target in LISTED[family].exports
    with nullcontext() if listed else pytest.raises(ConfigFieldError):
        export(tmp_path / "ours", tmp_path / "out", to=target)


def test_the_command_line_prints_it_for_people_programs_and_the_readme():
    printed = [CliRunner().invoke(app, ["families", *flags]) for flags in ([], ["--json"], ["--markdown"])]
    assert [result.exit_code for result in printed] == [0, 0, 0]
    people, programs, readme = [result.stdout for result in printed]
    assert json.loads(programs) == list_families().to_dict() and readme == list_families().markdown()
    joined = re.sub(r"[\s│]", "", people)  # cells are wrapped
    for family in LISTED.values():
        shown = (family.name, family.reference, family.checkpoints[0])
        assert all(re.sub(r"\s", "", words) in joined for words in shown)


def test_it_is_saved(tmp_path):
    saved = json.loads(list_families().save(tmp_path).read_text())
    assert saved["schema_version"] == 1 and {"bloom", "mpt", "falcon"} <= {row["name"] for row in saved["families"]}
    assert FamilyList([FamilyInfo(**row) for row in saved["families"]]) == list_families()


def test_the_table_of_the_readme_is_up_to_date():
    text = Path("README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- families -->\n(.*?)<!-- /families -->", text, re.DOTALL)
    assert found and found[1] == list_families().markdown(), "put in what `alibi-hf families --markdown` prints"


def test_a_bar_in_a_cell_does_not_end_it():
    family = list_families().families[0]
    row = FamilyList([FamilyInfo(**{**vars(family), "defects": ["a | b"]})]).markdown().splitlines()[-1]
    assert "a \\| b" in row and len(re.findall(r"(?<!\\)\|", row)) == 8
