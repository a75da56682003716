"""How well a model reads: perplexity against length."""

from .evaluate import evaluate
from .jobs import read_lengths
from .perplexity import check_lengths, perplexity, perplexity_by_length
from .report import Evaluation, ModelEvaluation, Reading, Span

__all__ = [
    "Evaluation",
    "ModelEvaluation",
    "Reading",
    "Span",
    "check_lengths",
    "evaluate",
    "perplexity",
    "perplexity_by_length",
    "read_lengths",
]
