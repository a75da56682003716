"""Sending a model to the Hub: the card, the checks before, and the push."""

from alibi_hf.hub.card import mark_verified, write_card

__all__ = ["mark_verified", "write_card"]
