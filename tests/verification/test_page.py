"""The page: one file that needs nothing else, says what the other two say, and draws what was measured."""

import dataclasses
import json
import sys
from html import unescape

import pytest

from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.verification import Check, verify
from alibi_hf.verification.bias import BiasProbe, sample_bias
from alibi_hf.verification.page import as_page
from alibi_hf.verification.page_figures import draw
from alibi_hf.verification.render import check_cells
from alibi_hf.verification.report import BiasSample, Control, Verification
from tests.builders import HEAD_DIM
from tests.pages import HOSTILE, Page, assert_can_be_read_by_anyone, assert_needs_nothing_else
from tests.verification.converted import LENGTHS, pair


@pytest.fixture(scope="module")
def proved() -> Verification:
    report = verify(*pair("bloom"), lengths=LENGTHS)
    assert report.proved
    return dataclasses.replace(report, checks=[check for check in report.checks if check.layer is None])


@pytest.fixture(scope="module")
def text(proved) -> str:
    return as_page(proved)


@dataclasses.dataclass(frozen=True)
class LayerCheck(Check):
    """A check of one layer."""

    layer: int | None = None


def test_it_needs_nothing_else(text):
    assert_needs_nothing_else(text)
    assert any(name == "use" for name, _ in Page(text).tags), "figures refer to their own marks"


def test_it_can_be_read_by_anyone(proved, text):
    assert_can_be_read_by_anyone(text)
    page = Page(text)
    assert page.texts["title"] == [f"Proved: {proved.output}"]
    pictures, captions = page.named("svg"), page.texts["figcaption"]
    assert len(pictures) == len(captions) == 4
    for picture, caption in zip(pictures, captions, strict=True):
        assert picture["aria-label"].endswith(caption)


def test_it_says_what_the_other_files_say(proved, tmp_path):
    proved.save(tmp_path)
    page = Page((tmp_path / "verification.html").read_text(encoding="utf-8"))
    cells = page.texts["td"]
    rows = [cells[start : start + 9] for start in range(0, len(cells), 9)]
    assert rows[: len(proved.checks)] == [check_cells(check) for check in proved.checks]
    assert [row[0] for row in rows[len(proved.checks) :]] == [f"wrong: {c.name}" for c in proved.negative_controls]
    assert {row[-1] for row in rows[len(proved.checks) :]} == {"caught"}
    whole = unescape((tmp_path / "verification.html").read_text(encoding="utf-8"))
    for words in (proved.reference["class"], proved.reference["truth"], proved.text, *proved.versions.values()):
        assert words in whole
    assert page.texts["h2"] == [
        "What was compared with what",
        "Error by length",
        "Bias of each head against upstream's",
        "Every check",
        "Notes",
    ]


def test_the_same_verification_gives_the_same_bytes(proved, text):
    assert as_page(dataclasses.replace(proved)) == text


def test_what_is_wrong_stands_at_the_top(proved):
    checks = [
        dataclasses.replace(check, ours=float("nan"), passed=False) if check.name == "logits" else check
        for check in proved.checks
    ]
    control = dataclasses.replace(proved.negative_controls[0], caught=False)
    page = Page(as_page(dataclasses.replace(proved, checks=checks, negative_controls=[control])))
    assert page.texts["h1"] == [f"Not proved: {proved.output}"]
    assert page.named("header") == [{"class": "verdict failed"}]
    assert page.texts["li"][:3] == [
        "logits, float32, 12, 40 tokens: failed",
        "logits, bfloat16, 12, 40 tokens: failed",
        f"wrong on purpose and not caught: {control.name}",
    ]
    assert "2 outside the limit. 2 of ours are not finite" in page.texts["figcaption"][0]


def test_a_part_of_the_proof_says_that_it_proves_nothing():
    page = Page(as_page(verify(*pair("bloom"), lengths=LENGTHS, only=("tensors",))))
    assert page.texts["h1"][0].startswith("Not proved")
    assert page.texts["li"][0] == "no conversion that is wrong on purpose was held against it"
    assert not page.named("svg")


def test_everything_that_comes_from_a_checkpoint_is_escaped(proved):
    check = Check(HOSTILE, HOSTILE, 3, 1.0, 1.0, 1.0, True, note=HOSTILE)
    layers = [LayerCheck("logits" + HOSTILE, HOSTILE, 3, 1.0, 1.0, 1.0, False, layer=number) for number in range(2)]
    hostile = dataclasses.replace(
        proved,
        source=HOSTILE,
        output=HOSTILE,
        family=HOSTILE,
        text=HOSTILE,
        reference={name: HOSTILE for name in ("class", "attn_implementation", "truth", "weights", "length", "reason")},
        checks=[check, *layers],
        negative_controls=[Control(HOSTILE, HOSTILE, 1.0, 1.0, False)],
        versions={HOSTILE: HOSTILE},
        notes=[HOSTILE],
    )
    text = as_page(hostile)
    page = Page(text)
    assert not page.named("script") and not page.named("img")
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    assert unescape(text).count(HOSTILE) >= 15
    assert page.texts["title"] == [f"Not proved: {HOSTILE}"]


def test_without_matplotlib_it_says_what_is_missing(proved, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = as_page(proved)
    assert 'pip install "alibi-hf[plots]"' in unescape(text) and not Page(text).named("svg")
    assert len(Page(text).texts["td"]) == 9 * (len(proved.checks) + len(proved.negative_controls))


def test_errors_are_drawn_layer_by_layer(proved):
    """One point a layer: of the lengths the one nearest to its limit. Their rows fold away below the others."""
    checks = [
        LayerCheck("layer", dtype, length, 1e-6 * (number + 1) * length / 16, 1e-6, 3e-6, number < 3, layer=number)
        for dtype in ("float32", "bfloat16")
        for number in range(5)
        for length in (16, 8)
    ]
    report = dataclasses.replace(proved, checks=[*proved.checks, *checks], bias=None)
    figures = draw(report)["Error by layer"]
    assert ["5 points, 2 outside the limit." in figure.caption for figure in figures] == [True, True]
    assert "layer, float32" in figures[0].svg and "layer, bfloat16" in figures[1].svg
    assert figures == draw(dataclasses.replace(report, checks=[c for c in checks if c.length == 16]))["Error by layer"]
    assert draw(proved)["Error by layer"] == []
    folded = as_page(report).partition("<details>")[2].partition("</details>")[0]
    assert "20 checks of single layers" in folded and folded.count("<tr>") == 21


def test_an_error_beyond_the_limit_moves_its_point(proved):
    def drawn(factor: float) -> str:
        checks = [dataclasses.replace(check, ours=(check.ours or 0) * factor) for check in proved.checks]
        return draw(dataclasses.replace(proved, checks=checks, bias=None))["Error by length"][0].svg

    assert drawn(1) == drawn(1) != drawn(1.3)


@pytest.mark.parametrize(
    "values",
    [[[float("nan")] * 3], [[0.0] * 3], [[-1.0, -2.0, float("-inf")]], [[-1e-30, -2e-30, -3e-30]]],
    ids=["nan", "zero", "infinite", "tiny"],
)
def test_broken_numbers_do_not_stop_the_page(proved, values):
    sample = BiasSample(9, [1, 2, 8], values, [[-1.0, -2.0, -8.0]])
    check = Check("logits", "float32", 9, values[0][0], float("nan"), None, False)
    report = dataclasses.replace(proved, bias=sample, checks=[check])
    assert len(Page(as_page(report)).named("svg")) == 3


def formula(heads: int, head: int) -> float:
    """The slope of the paper: those of the power of two below, then every second one of the power above."""
    below = 2 ** (heads.bit_length() - 1)
    return 2 ** (-8 * (head + 1) / below) if head < below else 2 ** (-4 * (2 * (head - below) + 1) / below)


@pytest.mark.parametrize(("family", "heads"), [("bloom", 1), ("mpt", 12), ("falcon", 6)])
def test_the_sample_is_the_bias_of_both_sides(family, heads):
    source, output = pair(family, heads)
    checkpoint = Checkpoint.open(source)
    reference = checkpoint.family.reference(checkpoint.config)
    sample = sample_bias(BiasProbe(checkpoint, read_own_config(output), reference, 600), 600)
    assert len(sample.distances) <= 24 and sample.distances[0] == 1 and sample.distances[-1] == 599
    assert len(sample.ours) == len(sample.upstream) == heads
    scale = HEAD_DIM**-0.5 if family == "falcon" else 1.0
    for head in range(heads):
        expected = [-formula(heads, head) * scale * distance for distance in sample.distances]
        assert sample.ours[head] == pytest.approx(expected, rel=1e-6)
        if family != "falcon":
            assert sample.upstream[head] == pytest.approx(expected, rel=1e-5)
    if family == "falcon":  # upstream rounds positions to bfloat16: neighbours far from the start are one
        assert sample.upstream[0][0] == 0 != sample.ours[0][0]
        assert sample.upstream[0][-1] == pytest.approx(sample.ours[0][-1], rel=1e-2)


def test_the_sample_is_kept_in_few_lines(tmp_path):
    report = verify(*pair("mpt", 40, layers=1), lengths=LENGTHS, only=("bias",))
    report.save(tmp_path)
    text = (tmp_path / "verification.json").read_text()
    assert BiasSample(**json.loads(text)["bias"]) == report.bias
    assert max(len(line) for line in text.splitlines()) < 600 and text.count("\n") < 200 + 2 * 40
