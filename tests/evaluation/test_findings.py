"""What is said about an evaluation follows from its numbers, and changes with them."""

import dataclasses
import math

import pytest

from alibi_hf.evaluation.findings import (
    against_shortest,
    all_notes,
    failures,
    finding,
    headline,
    holds_to,
    number,
    shortened,
    telling,
)
from tests.evaluation.evaluations import TOO_LONG, evaluation, model, usual


@pytest.mark.parametrize(
    ("perplexities", "expected"),
    [
        ([20.0, 19.0, 18.0], 1024),
        ([20.0, 20.19, 20.1], 1024),  # within 1 % of the best before
        ([20.0, 20.21, 19.0], 256),  # a better one later does not undo it
        ([20.0, 18.0, 18.19], 512),  # the best before is 18
        ([20.0, 20.1, 20.21], 512),  # a slow rise adds up
        ([None, 20.0, 20.0], 0),
        ([20.0, None, 20.0], 256),
        ([20.0, math.inf, 20.0], 256),
        ([math.nan, 20.0, 20.0], 0),
        ([], 0),
    ],
)
def test_a_model_holds_as_long_as_nothing_is_worse_than_the_best_before(perplexities, expected) -> None:
    assert holds_to(telling(model("any", perplexities))) == expected


def test_what_is_told_is_the_sliding_window_and_the_order_of_readings_is_nothing() -> None:
    read = model("any", [20.0, 30.0], [20.0, 10.0])
    mixed = dataclasses.replace(read, readings=read.readings[::-1])
    assert [(r.protocol, r.length) for r in telling(mixed)] == [("sliding", 256), ("sliding", 512)]
    alone = dataclasses.replace(read, readings=[r for r in read.readings if r.protocol == "non-overlapping"])
    assert holds_to(telling(alone)) == 512 and holds_to(telling(mixed)) == 256


def test_each_model_has_its_sentence() -> None:
    assert [finding(each) for each in usual().models] == [
        "alibi holds to 1,024 tokens, 4 times its training length: perplexity 26.60 there, 26.50 at best (512 tokens)",
        "rope holds to 256 tokens, its training length: perplexity 65.00 at 1,024 tokens, 2.5 times its best "
        "(26.00 at 256)",
        f"mpt holds to 256 tokens, its training length: fails from 512 tokens on: {TOO_LONG}",
        "broken could not be read: OSError: there is no tokenizer",
    ]
    assert finding(model("a;b", [20.0, 20.0])) == (
        "a;b holds to 512 tokens, 2 times its training length: perplexity 20.00 there, its best"
    )
    assert finding(model("a", [20.0])) == "a has a perplexity of 20.00 at 256 tokens, the only length"
    assert finding(model("a", [None, None])) == f"a fails at every length: {TOO_LONG}"
    assert finding(model("a", [20.0, 19.0], trained_length=None)).startswith("a holds to 512 tokens: ")
    assert "within its training length of 2,048" in finding(model("a", [20.0, 19.0], trained_length=2048))
    assert finding(model("a", [None, 20.0, 21.0])) == (
        f"a: perplexity 21.00 at 1,024 tokens, 1.05 times its best (20.00 at 512); fails at 256 tokens: {TOO_LONG}"
    )


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ([model("a", [20.0, 19.0]), model("b", [20.0, 30.0])], "Holds to 512 tokens: a"),
        ([model("a", [20.0, 19.0]), model("b", [20.0, 20.0])], "Holds to 512 tokens: a, b"),
        ([model("a" * 90, [20.0, 19.0]), model("b" * 90, [20.0, 20.0])], "Holds to 512 tokens: 2 of 2 models"),
        ([model("a", [20.0, 30.0])], "No model holds to 512 tokens"),
        ([model("a", [20.0])], "Perplexity at 256 tokens"),
        ([model("a", [None, None])], "No model could be read"),
        ([model("a", [], failure="no folder")], "No model could be read"),
        ([], "No model could be read"),
    ],
)
def test_the_headline(models, expected) -> None:
    assert headline(evaluation(*models)) == expected


def test_failures_are_grouped_by_reason_with_their_lengths() -> None:
    read = model("a", [20.0, None, math.inf, math.nan, 20.0, None, 1e101])
    assert failures(read) == [
        f"fails at 512, 8,192 tokens: {TOO_LONG}",
        "fails at 1,024 tokens: the perplexity is infinite, of a loss of inf",
        "fails at 2,048 tokens: the loss is not a number",
        "fails at 16,384 tokens: the perplexity is past 1e+100",
    ]
    assert failures(model("a", [20.0])) == []
    numbered = [
        dataclasses.replace(r, loss=None, failure=f"{r.length} of 256") for r in model("b", [20.0, 21.0]).readings
    ]
    assert failures(model("b", [20.0], readings=numbered[::-1])) == ["fails at every length: 256 of 256"]


def test_notes_name_the_models_that_they_are_about() -> None:
    models = [model("a", [20.0], notes=["both", "one"]), model("b", [20.0], notes=["both"])]
    assert all_notes(evaluation(*models)) == ["The same tokens at every length.", "both", "a: one"]


def test_each_protocol_is_compared_with_its_own_shortest_length() -> None:
    read = model("a", [20.0, 15.0, None, 30.0], [40.0, 30.0, 20.0, 20.0])
    assert against_shortest(read, "sliding") == {256: 1.0, 512: pytest.approx(0.75), 2048: pytest.approx(1.5)}
    assert against_shortest(read, "non-overlapping")[1024] == pytest.approx(0.5)
    assert against_shortest(model("a", [20.0, None]), "sliding") == {}
    assert against_shortest(model("a", [], failure="no folder"), "sliding") == {}


def test_numbers_are_shown_in_few_digits() -> None:
    shown = [number(value) for value in (9.999, 26.404, 1234.5, 2.5e6, 1e300, math.inf, math.nan, None)]
    assert shown == ["10.00", "26.40", "1,234", "2.50e+06", "1.00e+300", "infinite", "", ""]


def test_long_names_keep_both_ends() -> None:
    assert shortened("a" * 48) == "a" * 48 and len(shortened("b" * 200)) <= 48
    assert shortened("organisation/" + "x" * 80 + "-7b").startswith("organisation/")
    assert shortened("organisation/" + "x" * 80 + "-7b").endswith("-7b")
    assert shortened("two\nlines") == "two lines"
