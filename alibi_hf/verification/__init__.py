"""Proof that a converted checkpoint computes what its source computes: `verify` and the report it returns."""

from alibi_hf.verification.memory import NotEnoughMemoryError
from alibi_hf.verification.proof import verify
from alibi_hf.verification.report import LAYERWISE, PARTS, Check, Control, Verification

__all__ = ["LAYERWISE", "PARTS", "Check", "Control", "NotEnoughMemoryError", "Verification", "verify"]
