"""Evaluations that were never run, to see how they are shown: perplexities go in, readings come out."""

import math
from collections.abc import Sequence

from alibi_hf.evaluation.report import PROTOCOLS, Evaluation, ModelEvaluation, Protocol, Reading, Span

TOO_LONG = "ValueError: 512 tokens are more than the 256 of this model"


def reading(length: int, protocol: Protocol, perplexity: float | None, failure: str = "") -> Reading:
    """Return a reading with that perplexity, or one that failed."""
    loss = None if perplexity is None else perplexity if math.isnan(perplexity) else math.log(perplexity)
    apart = protocol == "non-overlapping"
    half = length // 2
    spans = [Span(1, half, loss + 0.25, 8 * half), Span(half, length, loss, 8 * half)] if apart and loss else []
    return Reading(
        length=length,
        protocol=protocol,
        stride=length if apart else half,
        loss=loss,
        bits_per_byte=None if loss is None else loss / 4,
        standard_error=None if loss is None else 0.01,
        tokens=0 if loss is None else 1000 + length,
        windows=0 if loss is None else 8,
        spans=spans,
        seconds=length / 8,
        peak_bytes=300_000_000 + length,
        failure=failure,
    )


def model(
    name: str, sliding: Sequence[float | None], apart: Sequence[float | None] | None = None, first: int = 256, **changes
) -> ModelEvaluation:
    """Return a model read at lengths that double from `first` on; None stands for a length that it fails at."""
    values: dict[Protocol, Sequence[float | None]] = {"non-overlapping": apart or sliding, "sliding": sliding}
    readings = [
        reading(first * 2**place, protocol, value, "" if value is not None else TOO_LONG)
        for place in range(len(sliding))
        for protocol in PROTOCOLS
        for value in [values[protocol][place]]
    ]
    fields = {
        "path_or_id": f"models/{name}",
        "revision": None,
        "model_class": "AlibiForCausalLM",
        "positions": "ALiBi",
        "trained_length": 256,
        "parameters": 4_198_912,
        "dtype": "float32",
        "device": "cpu",
        "vocabulary": 4096,
        "tokens": 24_576,
    }
    return ModelEvaluation(name, **{**fields, "readings": readings, **changes})


def evaluation(*models: ModelEvaluation, **changes) -> Evaluation:
    """Return the evaluation of these models."""
    fields = {
        "lengths": sorted({reading.length for model in models for reading in model.readings}),
        "text": [{"name": "held-out.txt", "sha256": "0f" * 32, "bytes": 123456, "characters": 123000}],
        "models": list(models),
        "notes": ["The same tokens at every length."],
        "machine": {"processor": "EPYC", "threads": 2},
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "command": "alibi-hf evaluate bloom mpt --text held-out.txt",
        "seconds": 12.3,
    }
    return Evaluation(**{**fields, **changes})


def usual() -> Evaluation:
    """One that holds, one that gets worse, one that fails past its training length, one that could not be loaded."""
    return evaluation(
        model("alibi", [26.8, 26.5, 26.6], [31.0, 29.0, 28.0]),
        model("rope", [26.0, 39.0, 65.0], [30.0, 33.0, 48.0], positions="RoPE (theta 10000)"),
        model("mpt", [27.0, None, None], [31.0, None, None], notes=["ran in eager attention"]),
        model("broken", [], trained_length=None, failure="OSError: there is no tokenizer"),
    )
