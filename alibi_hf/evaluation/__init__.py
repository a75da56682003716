"""How well a model reads: perplexity against length."""

from .perplexity import perplexity, perplexity_by_length

__all__ = ["perplexity", "perplexity_by_length"]
