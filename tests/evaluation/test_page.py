"""The page of an evaluation: one file that needs nothing else and says what the JSON says."""

import dataclasses
import math
import re
import sys
from html import unescape

import pytest

from alibi_hf.evaluation.findings import finding, headline
from alibi_hf.evaluation.page import as_page
from alibi_hf.evaluation.page_figures import draw
from alibi_hf.evaluation.report import Evaluation
from alibi_hf.evaluation.table import COLUMNS, reading_cells
from tests.evaluation.evaluations import TOO_LONG, evaluation, model, usual
from tests.pages import HOSTILE, Page, assert_can_be_read_by_anyone, assert_needs_nothing_else


@pytest.fixture(scope="module")
def text() -> str:
    return as_page(usual())


def figures_of(report: Evaluation) -> dict[str, int]:
    return {heading: len(figures) for heading, figures in (draw(report) or {}).items()}


def test_it_needs_nothing_else_and_can_be_read_by_anyone(text) -> None:
    assert_needs_nothing_else(text)
    assert_can_be_read_by_anyone(text)
    assert as_page(usual()) == text


def test_what_was_found_stands_at_the_top(text) -> None:
    report, page = usual(), Page(text)
    assert page.texts["title"] == page.texts["h1"] == ["Holds to 1,024 tokens: alibi"]
    assert page.texts["li"][:4] == [f"{finding(each)}." for each in report.models]
    assert page.texts["h2"] == [
        "Perplexity against length",
        "Gain from context",
        "Loss by position in the window",
        "Perplexity by length",
        "What fails, and why",
        "Models",
        "Every reading",
        "What was read, and how",
        "Notes",
    ]


def test_every_number_is_in_a_table(text) -> None:
    report = usual()
    cells = Page(text.partition("<details>")[2]).texts["td"]
    rows = [cells[start : start + len(COLUMNS)] for start in range(0, len(cells), len(COLUMNS))]
    assert rows == [reading_cells(each, reading) for each in report.models for reading in each.readings]
    assert [row[4] for row in rows if row[0] == "mpt"] == ["31.00", "27.00", *["fails"] * 4]
    assert {row[-1] for row in rows if row[4] == "fails"} == {"fails"}
    short = Page(text.partition("Perplexity by length")[2].partition("</table>")[0]).texts["td"]
    assert short[:6] == ["alibi", "non-overlapping", "1,024", "31.00", "29.00", "28.00"]
    assert short[6:12] == ["alibi", "sliding", "1,024", "26.80", "26.50", "26.60"]
    whole = unescape(text)
    for words in ("held-out.txt", "0f" * 32, "123,456", "EPYC", "torch 2.13.0", report.command, *report.notes):
        assert words in whole


def test_what_fails_is_shown_with_its_reason(text) -> None:
    page = Page(text)
    assert f"mpt fails from 512 tokens on: {TOO_LONG}" in page.texts["li"]
    assert "broken fails at every length: OSError: there is no tokenizer" in page.texts["li"]
    assert not any("fails" in heading for heading in Page(as_page(evaluation(model("a", [20.0, 21.0])))).texts["h2"])


def test_its_figures(text) -> None:
    expected = {"Perplexity against length": 2, "Gain from context": 2, "Loss by position in the window": 3}
    assert figures_of(usual()) == expected
    page = Page(text)
    assert len(page.texts["figcaption"]) == 7 and len(page.named("svg")) == 7 + 4, "and a line of the key a model"
    assert figures_of(evaluation(model("a", [None, None]))) == {}
    other = [model("a", [20.0, 21.0]), model("b", [20.0, 21.0], vocabulary=50257)]
    assert figures_of(evaluation(*other))["Perplexity against length"] == 3, "bits a byte"
    assert "different tokenizers" in as_page(evaluation(*other)) and "different tokenizers" not in text
    alone = dataclasses.replace(other[0], readings=[r for r in other[0].readings if r.protocol == "sliding"])
    assert figures_of(evaluation(alone))["Gain from context"] == 1


def test_a_text_of_many_files_stays_short() -> None:
    files = [{"name": f"{number}.txt", "bytes": 1000} for number in range(20)]
    text = as_page(evaluation(model("a", [20.0]), text=files))
    assert "7.txt (bytes 1,000); 12 more files" in text and "8.txt" not in text


def test_a_figure_moves_with_its_numbers() -> None:
    def drawn(value: float) -> dict[str, list[str]]:
        figures = draw(evaluation(model("a", [20.0, value], [30.0, 31.0])))
        assert figures is not None
        return {heading: [figure.svg for figure in group] for heading, group in figures.items()}

    first, second = drawn(21.0), drawn(22.0)
    assert first["Perplexity against length"][1] != second["Perplexity against length"][1]
    assert first["Gain from context"][1] != second["Gain from context"][1]
    assert first["Loss by position in the window"] == second["Loss by position in the window"], "of the other protocol"


def test_names_of_any_kind_are_escaped() -> None:
    changes = {
        "path_or_id": HOSTILE,
        "positions": HOSTILE,
        "model_class": HOSTILE,
        "dtype": HOSTILE,
        "notes": [HOSTILE],
    }
    hostile = [model(HOSTILE, [20.0, None], revision=HOSTILE, device=HOSTILE, **changes)]
    hostile.append(model("b", [], failure=HOSTILE))
    text = as_page(
        evaluation(
            *hostile,
            notes=[HOSTILE],
            text=[{"name": HOSTILE, "sha256": HOSTILE}],
            machine={HOSTILE: HOSTILE},
            versions={HOSTILE: HOSTILE},
            command=HOSTILE,
        )
    )
    assert_needs_nothing_else(text)
    assert_can_be_read_by_anyone(text)
    assert unescape(text).count(HOSTILE) >= 20


@pytest.mark.parametrize(
    "report",
    [
        evaluation(model("a", [20.0])),
        evaluation(model("a", [math.nan, math.inf, 1e300])),
        evaluation(model("a", [None] * 3), model("b", [], failure="no folder")),
        evaluation(*(model(f"{place}-{'name-' * 30}", [20.0 + place] * 12, first=64) for place in range(4))),
        evaluation(),
    ],
    ids=["one length", "not finite", "all fail", "many", "none"],
)
def test_any_evaluation_has_a_page(report) -> None:
    text = as_page(report)
    assert_needs_nothing_else(text)
    assert_can_be_read_by_anyone(text)
    assert Page(text).texts["h1"] == [headline(report)]
    assert not re.search(r">(nan|inf)<", text)


def test_without_matplotlib_it_says_what_is_missing(text, monkeypatch) -> None:
    with_figures = Page(text)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bare = as_page(usual())
    assert 'pip install "alibi-hf[plots]"' in unescape(bare) and not Page(bare).named("svg")
    assert Page(bare).texts["td"] == with_figures.texts["td"]
