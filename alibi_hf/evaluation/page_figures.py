"""The figures of an evaluation's page; they need matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alibi_hf.evaluation.axes import token_axis, value_axis
from alibi_hf.evaluation.findings import (
    against_shortest,
    finite_perplexity,
    of_protocol,
    shortened,
    telling,
    tokenizers_differ,
)
from alibi_hf.evaluation.plot import PANELS, draw_line, draw_perplexity, marks_in_words
from alibi_hf.pages.figures import DIM, Figure, as_svg, drawing, line_style, panel, swatch

if TYPE_CHECKING:
    from alibi_hf.evaluation.report import Evaluation, ModelEvaluation, Protocol, Reading

PERPLEXITY, GAIN, POSITION = "Perplexity against length", "Gain from context", "Loss by position in the window"
EXPLAINED = {
    "non-overlapping": "Each window is read by itself: the tokens at its start have little context, and that is a "
    "smaller share of a longer window.",
    "sliding": "Windows overlap and only the last tokens of each are counted, so that every one has a long context: "
    "what falls here is use of context.",
}

GAINED = {
    "non-overlapping": "What falls here is mostly the early-token curse: fewer tokens stand at the start of a window, "
    "with little context. It falls for a model that uses no more context, too.",
    "sliding": "The same tokens of the text at every length, each with a long context. What falls here is gained from "
    "the context that a longer window adds; above 1, more context makes the model read worse.",
}


def draw(report: Evaluation) -> dict[str, list[Figure]] | None:
    """Return the figures under their headings; None where matplotlib is not installed."""
    with drawing() as able:
        if not able:
            return None
        if not any(finite_perplexity(reading) for model in report.models for reading in model.readings):
            return {}
        return {
            PERPLEXITY: [_perplexity(report, protocol) for protocol in PANELS]
            + [_bits(report)] * tokenizers_differ(report),
            GAIN: _gains(report),
            POSITION: _by_position(report),
        }


def swatches(report: Evaluation) -> list[str]:
    """Return the line of each model for a key; empty strings where matplotlib is not installed."""
    with drawing() as able:
        return [swatch(number) if able else "" for number in range(len(report.models))]


def _wide_panel(title: str) -> tuple[Any, Any]:
    """A panel with no room for words at its right."""
    figure, axes = panel(title)
    figure.subplots_adjust(right=0.97)
    return figure, axes


def _perplexity(report: Evaluation, protocol: Protocol) -> Figure:
    title = PANELS[protocol]
    figure, axes = _wide_panel(title)
    draw_perplexity(axes, report, protocol)
    axes.set_ylabel("perplexity")
    caption = f"{EXPLAINED[protocol]} {marks_in_words(report, [protocol])}".rstrip()
    return Figure(as_svg(figure, title, caption), caption)


def _bits(report: Evaluation) -> Figure:
    """Bits a byte by length: what models with different tokenizers are compared by."""
    title = "bits a byte of text"
    figure, axes = _wide_panel(title)
    lines = [[(r.length, r.bits_per_byte if finite_perplexity(r) else None) for r in telling(m)] for m in report.models]
    for place, line in enumerate(lines):
        draw_line(axes, line, line_style(place))
    token_axis(axes, [length for line in lines for length, _ in line])
    value_axis(axes, [value for line in lines for _, value in line if value])
    axes.set_xlabel("tokens in a window (1k is 1,024)")
    axes.set_ylabel("bits a byte")
    caption = "The loss over the bytes of the text, which do not depend on a tokenizer, with a sliding window."
    return Figure(as_svg(figure, title, caption), caption)


def _gains(report: Evaluation) -> list[Figure]:
    """How perplexity moves from the shortest length on, a figure a protocol, on the same axes."""
    found = {p: {m.name: against_shortest(m, p) for m in report.models} for p in PANELS}
    values = [value for models in found.values() for gains in models.values() for value in gains.values()]
    return [_gain(report, protocol, found[protocol], values) for protocol in PANELS if any(found[protocol].values())]


def _gain(report: Evaluation, protocol: Protocol, found: dict[str, dict[int, float]], values: list[float]) -> Figure:
    title = f"{PANELS[protocol]}, over the shortest length"
    figure, axes = _wide_panel(title)
    for place, model in enumerate(report.models):
        lengths = [reading.length for reading in of_protocol(model, protocol)]
        draw_line(axes, [(length, found[model.name].get(length)) for length in lengths], line_style(place))
    token_axis(axes, [length for gains in found.values() for length in gains])
    value_axis(axes, values)
    axes.axhline(1, color=DIM, linewidth=1)
    axes.set_xlabel("tokens in a window (1k is 1,024)")
    axes.set_ylabel("perplexity, times")
    return Figure(as_svg(figure, title, GAINED[protocol]), GAINED[protocol])


def _by_position(report: Evaluation) -> list[Figure]:
    """One figure a model: a line for each length, that ends where its windows do."""
    found = {place: [r for r in model.readings if _points(r)] for place, model in enumerate(report.models)}
    losses = [loss for readings in found.values() for r in readings for _, loss in _points(r)]
    return [_positions(report.models[place], place, readings, losses) for place, readings in found.items() if readings]


def _positions(model: ModelEvaluation, place: int, readings: list[Reading], losses: list[float]) -> Figure:
    figure, axes = _wide_panel(shortened(model.name))
    style = line_style(place) | {"linewidth": 1.2, "markersize": 3.5, "linestyle": "-"}
    longest = max(reading.length for reading in readings)
    for reading in readings:
        strength = {"alpha": 1.0, "linewidth": 2.2, "markersize": 5} if reading.length == longest else {"alpha": 0.55}
        draw_line(axes, _points(reading), style | strength)
    if model.trained_length and model.trained_length <= longest:
        axes.axvline(model.trained_length, color=DIM, linestyle=":", linewidth=1.5)
    token_axis(axes, [2**power for power in range((longest - 1).bit_length() + 1)])
    value_axis(axes, losses)
    axes.set_xlabel("position in the window, tokens (1k is 1,024)")
    axes.set_ylabel("loss, nats")
    lengths = ", ".join(f"{reading.length:,}" for reading in sorted(readings, key=lambda reading: reading.length))
    caption = f"{model.name}, a line for each length ({lengths}), the longest bold: non-overlapping windows. The "
    caption += "first points are over few tokens, one or two a window."
    if model.trained_length and model.trained_length <= longest:
        caption += f" Dotted: {model.trained_length:,} tokens, its training length."
    return Figure(as_svg(figure, f"loss by position, {model.name}", caption), caption)


def _points(reading: Reading) -> list[tuple[float, float]]:
    """The middle of each span, from position 1 on, and its loss, which has to be a number above zero to be drawn."""
    return [((s.start + s.stop - 1) / 2, s.loss) for s in reading.spans if 0 < s.loss < float("inf")]


__all__ = ["draw", "swatches"]
