"""The picture and the panels: what is drawn is what was measured."""

import math
import sys

import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure
from matplotlib.image import imread

from alibi_hf.evaluation.axes import token_axis, tokens, value_axis
from alibi_hf.evaluation.plot import PANELS, draw_perplexity, marks_in_words, plot_perplexity
from alibi_hf.pages.figures import SERIES, VARIABLES, drawing, light, line_style
from tests.evaluation.evaluations import evaluation, model, usual
from tests.pages import HOSTILE


def panels_of(report) -> dict:
    """The panels with what is drawn to them."""
    with drawing(picture=True):
        panels = dict(zip(PANELS, Figure().subplots(1, 2), strict=True))
        for protocol, axes in panels.items():
            draw_perplexity(axes, report, protocol, picture=True)
    return panels


def lines_of(axes, marker: str | None = None) -> list:
    """The lines of models, or the marks of one kind."""
    marks = ("x", "^")
    return [line for line in axes.lines if (line.get_marker() == marker if marker else line.get_marker() not in marks)]


def test_each_line_has_the_perplexities_of_its_protocol() -> None:
    panels = panels_of(usual())
    for protocol, expected in (("sliding", [26.0, 39.0, 65.0]), ("non-overlapping", [30.0, 33.0, 48.0])):
        line = lines_of(panels[protocol])[1]
        assert list(line.get_xdata()) == [256, 512, 1024]
        assert list(line.get_ydata()) == pytest.approx(expected)
        assert line.get_color() == line_style(1, picture=True)["color"]
    apart, sliding = panels.values()
    assert (apart.get_xlim(), apart.get_ylim()) == (sliding.get_xlim(), sliding.get_ylim())
    assert sliding.get_ylim()[0] < 26 and sliding.get_ylim()[1] > 65


def test_a_failing_length_is_a_cross_at_the_top_and_breaks_the_line() -> None:
    axes = panels_of(evaluation(model("a", [20.0, None, 22.0, math.inf]), model("b", [30.0, None, 30.0, 30.0])))[
        "sliding"
    ]
    values = list(lines_of(axes)[0].get_ydata())
    assert math.isnan(values[1]) and math.isnan(values[3]) and values[2] == pytest.approx(22)
    crosses = [(*line.get_xdata(), *line.get_ydata(), line.get_color()) for line in lines_of(axes, "x")]
    first, second = (line_style(place, picture=True)["color"] for place in range(2))
    assert [(x, color) for x, _, color in crosses] == [(512, first), (2048, first), (512, second)]
    assert all(0.8 < y < 1 for _, y, _ in crosses) and crosses[0][1] != crosses[2][1], "stacked, not over each other"


def test_the_trained_length_of_each_model_is_marked() -> None:
    trained = [256, 512, 256, None, 1 << 20]
    report = evaluation(*(model(f"m{place}", [20.0, 21.0], trained_length=each) for place, each in enumerate(trained)))
    marks = lines_of(panels_of(report)["sliding"], "^")
    assert [line.get_xdata()[0] for line in marks] == [256, 512, 256], "those within the lengths"
    assert marks[0].get_ydata()[0] < marks[2].get_ydata()[0] < 0.2


def test_many_marks_leave_room_for_the_lines() -> None:
    models = [model(f"m{place}", [20.0, None]) for place in range(20)]
    axes = panels_of(evaluation(*models))["sliding"]
    low, high = axes.get_ylim()
    heights = [line.get_ydata()[0] for marker in "x^" for line in lines_of(axes, marker)]
    assert len(set(heights)) == 40 and all(0 < height < 0.31 or 0.69 < height < 1 for height in heights)
    assert 0.3 < (20.0 - low) / (high - low) < 0.7


def test_the_caption_names_the_marks_that_are_there() -> None:
    assert marks_in_words(usual(), PANELS) == (
        "A triangle below stands at the length a model was trained at; a cross above at a length where it has no "
        "perplexity."
    )
    beyond = evaluation(model("a", [20.0, 21.0], trained_length=4096))
    assert marks_in_words(beyond, PANELS) == ""
    beyond = evaluation(model("a", [20.0, None], trained_length=4096))
    assert marks_in_words(beyond, ["sliding"]).startswith("A cross above")


@pytest.mark.parametrize(
    ("values", "scale"), [([20.0, 79.0], "linear"), ([20.0, 81.0], "log"), ([2.0, 1e100], "log"), ([5.0], "linear")]
)
def test_an_axis_is_logarithmic_where_the_range_wants_it(values, scale) -> None:
    axes = Figure().subplots()
    value_axis(axes, values, above=2, below=2)
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert low < min(values) and max(values) < high < math.inf


def test_noise_does_not_look_like_a_slope() -> None:
    axes = Figure().subplots()
    value_axis(axes, [26.40, 26.41])
    low, high = axes.get_ylim()
    assert (high - low) / 26.4 >= 0.05


def test_lengths_that_are_close_leave_out_labels_and_keep_the_last() -> None:
    axes = Figure().subplots()
    token_axis(axes, [128, 140, 256, 512, 1000, 1024, 65536])
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown == ["128", "", "256", "512", "", "1k", "64k"]
    assert [tokens(length) for length in (1000, 1024, 1536, 131072)] == ["1,000", "1k", "1,536", "128k"]


def test_the_picture_is_written_and_replaced(tmp_path) -> None:
    path = tmp_path / "perplexity.png"
    plot_perplexity(usual(), path)
    first = path.read_bytes()
    assert imread(path).shape[1] == 1650
    plot_perplexity(evaluation(model("a", [20.0, 21.0])), path)
    second = path.read_bytes()
    plot_perplexity(evaluation(model("a", [20.0, 21.5])), path)
    assert len({first, second, path.read_bytes()}) == 3, "other numbers, another picture"


def test_a_picture_can_be_svg_with_the_same_bytes_each_time(tmp_path) -> None:
    texts = []
    for name in ("a.svg", "b.svg"):
        plot_perplexity(usual(), tmp_path / name)
        texts.append((tmp_path / name).read_text(encoding="utf-8"))
    assert texts[0] == texts[1] and "fails from 512 tokens on" in texts[0] and "#0102" not in texts[0]


@pytest.mark.parametrize(
    "report",
    [
        evaluation(model("a", [20.0])),
        evaluation(model(HOSTILE * 5, [20.0, 21.0]), model("b", [None, None]), notes=[HOSTILE]),
        evaluation(model("a", [None, None])),
        evaluation(model("a", [], failure=HOSTILE * 50)),
        evaluation(model("a", [math.nan, math.inf, 1e300, 2.0])),
        evaluation(*(model(f"m{place}" * 9, [20.0 + place] * 12, first=64) for place in range(12))),
        evaluation(model("a", [20.0, 21.0], first=3)),
    ],
    ids=["one length", "hostile", "all fail", "none read", "not finite", "twelve by twelve", "odd lengths"],
)
def test_anything_can_be_drawn(report, tmp_path) -> None:
    plot_perplexity(report, tmp_path / "any.png")
    assert imread(tmp_path / "any.png").std() > 0.01


@pytest.mark.filterwarnings("error")
def test_a_sign_that_the_font_has_not_is_no_warning(tmp_path) -> None:
    plot_perplexity(evaluation(model("\U0001f389", [20.0, 21.0])), tmp_path / "a.png")


def test_without_matplotlib_it_says_what_is_missing(tmp_path, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "alibi-hf\[plots\]"'):
        plot_perplexity(usual(), tmp_path / "any.png")
    assert not any(tmp_path.iterdir())


def luminance(color: str) -> float:
    values = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_lines_differ_in_more_than_colour_and_can_be_seen() -> None:
    styles = [line_style(number) for number in range(16)]
    assert len({(style["color"], style["marker"], style["linestyle"]) for style in styles}) == 16
    assert len({style["marker"] for style in styles[:8]}) == 8
    assert set(SERIES) <= VARIABLES.keys()
    for color in SERIES:
        contrast = (luminance("#f6f7f9") + 0.05) / (luminance(light(color)) + 0.05)
        assert contrast >= 3, f"{VARIABLES[color]} on a panel"
