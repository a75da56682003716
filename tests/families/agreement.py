"""How a family without a class in Transformers is held against its reference: loaded directly and converted."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from alibi_hf.checkpoints.convert import convert
from alibi_hf.model.bias_alibi import alibi_slopes
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from alibi_hf.verification import Verification, verify
from tests.builders import distance, ids

LENGTH = 40  # the references write checkpoints that were trained at 24 or 32
PADDED = 7
FLOAT64 = 1e-10
SINGLE = 1e-7  # slope and bias are float32 in a float64 model


def loaded(source: Path, out: Path, backend: str = "eager") -> Iterator[AlibiForCausalLM]:
    """The checkpoint in float64, converted (several shards) and directly."""
    if not out.exists():
        convert(source, out, verify=False, max_shard_size="40KB")
    for folder in (out, source):
        yield AlibiForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation=backend).eval()


@torch.no_grad()
def decoded(model: AlibiForCausalLM, tokens: torch.Tensor, prefill: int) -> torch.Tensor:
    """Logits of what follows `prefill`, token by token through the cache."""
    cache, steps = model(tokens[:, :prefill], use_cache=True).past_key_values, []
    for index in range(prefill, tokens.shape[1]):
        output = model(tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
        steps.append(output.logits)
    return torch.cat(steps, dim=1)


@torch.no_grad()
def check(reference: ModuleType, source: Path, out: Path, limit: float = FLOAT64, backend: str = "eager") -> None:
    """Hold every way of feeding a checkpoint against a module of `tests.references`: 40 tokens, past the training.

    Args:
        limit: the largest error in float64, of the largest logit. Below `SINGLE` the reference rounds its bias as the
            package does (`single=True`), which only some can.
    """
    how = {"single": True} if limit < SINGLE else {}
    exact, near = reference.logits(source, tokens()), reference.logits(source, tokens(), **how)
    padded, shown = reference.logits(source, tokens(), mask(), **how), mask().bool()
    for model in loaded(source, out, backend):
        assert distance(model(tokens()).logits, exact) < SINGLE
        assert distance(model(tokens()).logits, near) < limit
        assert distance(decoded(model, tokens(), 18), near[:, 18:]) < limit
        assert distance(model(tokens(), attention_mask=mask()).logits[shown], padded[shown]) < limit
        assert distance(model.float()(tokens()).logits, exact) < 2e-6


def prove(source: Path, out: Path, **kwargs: Any) -> Verification:
    """Convert and verify: everything passes, and both wrong conversions are caught."""
    convert(source, out, verify=False, **kwargs)
    report = verify(source, out, lengths=(LENGTH,))
    assert report.proved, [check for check in report.checks if not check.passed]
    assert [control.caught for control in report.negative_controls] == [True] * 4  # in layers and whole
    return report


def wrong_by(source: Path, truth: torch.Tensor, change: Callable[[AlibiForCausalLM], None]) -> float:
    """How far from the truth a directly loaded model is after `change`."""
    model = AlibiForCausalLM.from_pretrained(source, dtype=torch.float64, attn_implementation="eager").eval()
    change(model)
    with torch.no_grad():
        return distance(model(tokens()).logits, truth)


def scale_slopes(factor: float) -> Callable[[AlibiForCausalLM], None]:
    """A change for `wrong_by`: every slope times `factor`, which no valid config could say."""

    def change(model: AlibiForCausalLM) -> None:
        slopes = model.config.alibi_slopes or alibi_slopes(model.config.num_attention_heads)
        model.config.alibi_slopes = [factor * slope for slope in slopes]

    return change


def swap(one: str, other: str) -> Callable[[AlibiForCausalLM], None]:
    """A change for `wrong_by`: two weights of the first layer in each other's place."""

    def change(model: AlibiForCausalLM) -> None:
        first, second = (model.model.layers[0].get_submodule(name) for name in (one, other))
        first.weight.data, second.weight.data = second.weight.data, first.weight.data

    return change


def tokens() -> torch.Tensor:
    """Two rows, past the training length."""
    return ids(length=LENGTH)


def mask() -> torch.Tensor:
    """The first row is padded on the left."""
    kept = torch.ones(2, LENGTH, dtype=torch.long)
    kept[0, :PADDED] = 0
    return kept
