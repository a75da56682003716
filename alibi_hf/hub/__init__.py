"""Sending a model to the Hub: its card."""

from alibi_hf.hub.card import mark_verified, write_card

__all__ = ["mark_verified", "write_card"]
