"""How well a model reads: perplexity against length."""

from .perplexity import check_lengths, perplexity, perplexity_by_length

__all__ = ["check_lengths", "perplexity", "perplexity_by_length"]
