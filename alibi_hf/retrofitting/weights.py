"""The check that the weights arrived: Transformers' class with its positions removed against the written folder.

In float64, twice: without any positions (our ALiBi off), and with ALiBi's bias, written apart from the model's own,
added to the source's scores through its mask. Equality says that the weights are the source's and that ALiBi is where
the positions were; it says nothing about how well the model reads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import NotProvedError
from alibi_hf.families._truth import true_slopes
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from alibi_hf.verification.memory import available_memory
from alibi_hf.verification.subjects import load_upstream, quiet
from alibi_hf.verification.text import make_tokens

TOKENS = 64
LIMIT = 1e-10  # of the largest logit: both sides compute in float64, with the bias rounded to float32
WITHOUT, WITH = "without any positions", "with ALiBi's bias"


@dataclass(frozen=True)
class WeightCheck:
    """One comparison of logits in float64.

    Attributes:
        name: what both sides computed.
        tokens: length of the row.
        error: the largest difference over the source's largest logit.
        limit: the largest `error` that passes.
    """

    name: str
    tokens: int
    error: float
    limit: float = LIMIT

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= self.limit


def why_not(checkpoint: Checkpoint) -> str:
    """Why the weights of a checkpoint cannot be checked here; "" where they can."""
    if checkpoint.class_name != "AlibiForCausalLM":
        return f"its head is that of {checkpoint.class_name}, and language models are compared"
    need, free = (8 + 2) * checkpoint.parameters, available_memory()  # float64, and the tensor being read
    if need > free:
        return f"that takes about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are available"
    return ""


def check_weights(checkpoint: Checkpoint, folder: Path, stored: torch.dtype) -> list[WeightCheck]:
    """Compare the logits of the source's class and of the model in `folder` on a short text.

    Nothing is compared, and nothing returned, where the source's own logits are NaN or infinite.

    Args:
        checkpoint: the source.
        folder: where weights in this package's layout are.
        stored: the dtype of the written weights; the source's are rounded to it first.

    Raises:
        NotProvedError: with the error and its limit, where they differ.
    """
    with quiet():
        ids = make_tokens(checkpoint.path, checkpoint.config.vocab_size).rows(1, TOKENS)
        biases = {WITHOUT: causal_bias(checkpoint, 0.0), WITH: causal_bias(checkpoint, 1.0)}
        theirs = _source_logits(checkpoint, ids, biases, stored)
        if not all(logits.isfinite().all() for logits in theirs.values()):
            return []
        ours = _our_logits(checkpoint, folder, ids)
    checks = [WeightCheck(name, TOKENS, _distance(ours[name], theirs[name])) for name in biases]
    for check in checks:
        if not check.passed:
            raise NotProvedError(
                f"the written weights {check.name} give logits that are {check.error:.1e} of the largest away from the "
                f"source's class, and {check.limit:.0e} is the limit. Nothing was kept; please report the config."
            )
    return checks


def causal_bias(checkpoint: Checkpoint, factor: float) -> torch.Tensor:
    """`factor` times ALiBi's bias, hidden where a key is later than the query: float64 [1, heads, TOKENS, TOKENS].

    Slope and bias are each rounded to float32 once, as the model's are.
    """
    config = checkpoint.config
    slopes = true_slopes(config.num_attention_heads, float(config.alibi_bias_max)).float()
    index = torch.arange(TOKENS)
    distance = (index[:, None] - index).float()
    bias = -(slopes[:, None, None] * distance).double() * factor
    return bias.masked_fill(distance < 0, torch.finfo(torch.float64).min)[None]


@torch.no_grad()
def _source_logits(
    checkpoint: Checkpoint, ids: torch.Tensor, biases: dict[str, torch.Tensor], stored: torch.dtype
) -> dict[str, torch.Tensor]:
    reference = checkpoint.family.reference(checkpoint.config)
    model: Any = load_upstream(checkpoint, reference, torch.float64, ids.shape[1], stored, "cpu")
    nowhere = torch.zeros_like(ids)  # every token at position 0
    with reference.truth():
        return {name: model(ids, attention_mask=bias, position_ids=nowhere).logits for name, bias in biases.items()}


@torch.no_grad()
def _our_logits(checkpoint: Checkpoint, folder: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    model = AlibiForCausalLM.from_pretrained(str(folder), config=config, dtype=torch.float64, use_safetensors=True)
    model.eval()
    found = {WITH: model(ids).logits}
    model.config.alibi = False
    return found | {WITHOUT: model(ids).logits}


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


__all__ = ["WeightCheck", "check_weights", "why_not"]
