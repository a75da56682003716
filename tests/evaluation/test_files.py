"""The files of an evaluation: what they hold, that they say the same, and that the same numbers give the same bytes."""

import csv
import json
import math
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from alibi_hf.display import render
from alibi_hf.evaluation.files import COLUMNS, POSITIONS
from alibi_hf.evaluation.report import Evaluation
from tests.evaluation.evaluations import TOO_LONG, evaluation, model, usual
from tests.pages import HOSTILE

FILES = ["evaluation.csv", "evaluation.html", "evaluation.json", "evaluation.png", "positions.csv"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "new" / "folder"
    assert usual().save(folder) == folder / "evaluation.json"
    return folder


def rows_of(path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def printed(report: Evaluation, width: int = 80) -> str:
    text = StringIO()
    Console(file=text, width=width).print(render(report))
    return text.getvalue()


def test_the_json_holds_everything(saved) -> None:
    assert sorted(path.name for path in saved.iterdir()) == FILES
    raw = json.loads((saved / "evaluation.json").read_text(encoding="utf-8"))
    assert Evaluation.from_dict(raw) == usual()
    assert [entry["perplexity"] for entry in raw["models"][1]["readings"]] == pytest.approx([30, 26, 33, 39, 48, 65])
    assert [entry["perplexity"] for entry in raw["models"][2]["readings"]][2:] == [None] * 4


def test_numbers_that_are_not_finite_are_null(tmp_path) -> None:
    text = evaluation(model("a", [math.nan, math.inf, 1e300])).save(tmp_path).read_text(encoding="utf-8")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    raw = json.loads(text, parse_constant=refuse)
    values = [(entry["loss"], entry["perplexity"]) for entry in raw["models"][0]["readings"][::2]]
    assert values[:2] == [(None, None), (None, None)] and values[2][1] == pytest.approx(1e300)
    assert [row["perplexity"] for row in rows_of(tmp_path / "evaluation.csv")][:4] == [""] * 4


def test_the_csv_has_a_row_for_each_reading(saved) -> None:
    report = usual()
    rows = rows_of(saved / "evaluation.csv")
    assert list(rows[0]) == list(COLUMNS)
    found = [(row["model"], row["protocol"], row["length"]) for row in rows]
    readings = [(each, reading) for each in report.models for reading in each.readings]
    expected = [(each.name, reading.protocol, str(reading.length)) for each, reading in readings]
    assert found == [*expected, ("broken", "", "")]
    assert rows[-1]["failure"] == "OSError: there is no tokenizer"
    for row, (_, reading) in zip(rows, readings, strict=False):
        assert row["failure"] == reading.failure and float(row["seconds"]) == reading.seconds
        for name in ("perplexity", "loss", "bits_per_byte", "standard_error"):
            value = getattr(reading, name)
            assert row[name] == ("" if value is None else repr(value)), "every digit, and nothing where it failed"
    assert rows[7]["positions"] == "RoPE (theta 10000)" and rows[7]["trained_length"] == "256"


def test_the_loss_by_position_is_a_csv(saved) -> None:
    rows = rows_of(saved / "positions.csv")
    assert list(rows[0]) == list(POSITIONS)
    spans = [span for each in usual().models for reading in each.readings for span in reading.spans]
    found = [(int(row["start"]), int(row["stop"]), float(row["loss"]), int(row["tokens"])) for row in rows]
    assert found == [(span.start, span.stop, span.loss, span.tokens) for span in spans] and len(found) == 14
    assert {row["protocol"] for row in rows} == {"non-overlapping"}


def test_names_and_reasons_come_back_as_they_were(tmp_path) -> None:
    name = HOSTILE + '\nsecond line, "quoted"'
    evaluation(model(name, [20.0, 21.0]), model("b", [], failure=name)).save(tmp_path)
    rows = rows_of(tmp_path / "evaluation.csv")
    assert [row["model"] for row in rows] == [name] * 4 + ["b"] and rows[-1]["failure"] == name


def test_the_same_numbers_give_the_same_bytes(saved, tmp_path) -> None:
    evaluation().save(tmp_path)
    usual().save(tmp_path)  # over what is there
    for name in FILES:
        assert (saved / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_without_matplotlib_there_is_no_picture_and_it_is_said(tmp_path, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    usual().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name for name in FILES if not name.endswith("png")]
    assert "there is no evaluation.png: pip install" in printed(usual())
    assert "there is no evaluation.png: pip install" in (tmp_path / "evaluation.html").read_text(encoding="utf-8")


def test_the_terminal_shows_both_protocols_and_what_was_found() -> None:
    text = printed(usual())
    lines = [line.split() for line in text.splitlines()]
    assert text.startswith("Holds to 1,024 tokens: alibi\n")
    apart, sliding = (
        lines.index(["1,024", "28.00", "48.00", "fails"]),
        lines.index(["1,024", "26.60", "65.00", "fails"]),
    )
    assert apart < sliding, "windows that do not overlap come first"
    words = " ".join(text.split())
    for said in (
        TOO_LONG,
        "broken could not be read",
        "The same tokens at every length.",
        "mpt: ran in eager attention",
    ):
        assert said in words
    assert max(map(len, text.splitlines())) <= 80 and "bits a byte" not in text


def test_many_models_with_long_names_fit_a_terminal() -> None:
    many = [model(f"organisation/{'long-' * 12}{place}", [20.0 + place] * 12, first=64) for place in range(8)]
    many[3] = model("other", [20.0] * 12, first=64, vocabulary=50257)
    text = printed(evaluation(*many))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("\n 131,072 ") == 2 * 3, "two tables a figure, three figures"
    assert " ".join(text.split()).count("holds to 131,072 tokens") == 8
    assert "bits a byte" in text and "different tokenizers" in text


def test_markup_in_a_name_is_text() -> None:
    text = printed(evaluation(model("[red]a[/red]", [20.0, 21.0]), model("b", [], failure="[bold]no[/nothing]")))
    assert "[red]a[/red]" in text and "[bold]no[/nothing]" in text
