"""Tiny decoders with an adapter whose weights are random, so that it changes every logit."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, get_peft_model

from tests.model.cases import build


def fill(model: Any, seed: int = 3) -> Any:
    """Add noise to everything that is trained, always the same, and return the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval()


def adapted(case: str, config: PeftConfig, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Return a model of a case with an adapter, both in `dtype`."""
    torch.manual_seed(0)
    return fill(get_peft_model(build(case, dtype, **changes), config).to(dtype))
