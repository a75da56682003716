"""The parity check itself is tested: every way in which the bias could be wrong has to fail it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alibi_hf.model import bias_alibi, modeling_alibi
from alibi_hf.model.bias_alibi import Distances
from tests.model.cases import BACKENDS, TOLERANCE, build, check, documents
from tests.model.feeding import FEEDS

CASE = "twelve_grouped"  # slopes that are no powers of two
TRAINED = 32  # max_position_embeddings of the cases
SLOPES, MAKE, FIND = bias_alibi.config_slopes, modeling_alibi.make_distances, modeling_alibi.find_documents

Patch = Callable[[pytest.MonkeyPatch], None]


def slopes(change: Callable[[torch.Tensor], torch.Tensor]) -> Patch:
    """Change the slopes of every call."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bias_alibi, "config_slopes", lambda *args: change(SLOPES(*args)))

    return patch


def distances(change: Callable[[Distances], None]) -> Patch:
    """Change the distances of every call in place."""

    def wrong(*args: Any) -> Distances:
        result = MAKE(*args)
        change(result)
        return result

    return lambda monkeypatch: monkeypatch.setattr(modeling_alibi, "make_distances", wrong)


def no_bias_in_decode(made: Distances) -> None:
    """Forget the bias of a call with one query that has keys before it."""
    if made.query_index.numel() == 1 and made.num_keys > 1:
        made.slopes = made.slopes * 0


def clamped_past_training(made: Distances) -> None:
    """Count positions no further than the training length."""
    made.query_position = made.query_index.clamp(max=TRAINED - 1)[None]
    made.key_position = torch.arange(made.num_keys).clamp(max=TRAINED - 1)[None]


def key_one_too_late(made: Distances) -> None:
    """Count the distance to every key but the query's own one too small."""
    made.query_position = made.query_index[None]
    made.key_position = (torch.arange(made.num_keys) + 1).clamp(max=int(made.query_index[-1]))[None]


def documents_one_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every document one token too late."""

    def wrong(*args: Any) -> torch.Tensor | None:
        found = FIND(*args)
        return None if found is None else torch.cat([found[:, :1], found[:, :-1]], dim=1)

    monkeypatch.setattr(modeling_alibi, "find_documents", wrong)


def no_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take packed documents for one."""
    monkeypatch.setattr(modeling_alibi, "find_documents", lambda *_: None)


def wrong_head(heads: torch.Tensor) -> torch.Tensor:
    """Make the slope of one head a tenth too steep."""
    return heads * torch.where(torch.arange(heads.numel()) == 3, 1.1, 1.0)


# What is wrong, a way of feeding that must show it, and the lengths of the documents.
MUTATIONS: dict[str, tuple[Patch, str, tuple[int, ...]]] = {
    "zero": (slopes(torch.zeros_like), "whole", (20,)),
    "sign": (slopes(torch.neg), "whole", (20,)),
    "head_order": (slopes(lambda heads: heads.flip(0)), "whole", (20,)),
    "bloom_order_sorted": (slopes(lambda heads: heads.sort(descending=True).values), "whole", (20,)),
    "one_head": (slopes(wrong_head), "whole", (20,)),
    "rounded_to_bfloat16": (slopes(lambda heads: heads.bfloat16().float()), "whole", (20,)),
    "decode_dynamic": (distances(no_bias_in_decode), "tokens_dynamic", (20,)),
    "decode_static": (distances(no_bias_in_decode), "tokens_static", (20,)),
    "decode_padded": (distances(no_bias_in_decode), "left_dynamic", (20, 30)),
    "past_training": (distances(clamped_past_training), "whole", (TRAINED + 2,)),
    "past_training_decode": (distances(clamped_past_training), "tokens_dynamic", (TRAINED + 2,)),
    "key_one_too_late": (distances(key_one_too_late), "whole", (20,)),
    "document_one_late": (documents_one_late, "packed_positions", (20, 30)),
    "no_documents": (no_documents, "packed_positions_no_cache", (20, 30)),
}
# What the same mistakes must not touch: the check would otherwise fail for another reason than the one it names.
UNTOUCHED = {
    "decode_dynamic": ("whole", (20,)),
    "past_training": ("whole", (TRAINED,)),
    "document_one_late": ("whole", (20,)),
    "no_documents": ("whole", (20,)),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_bias_fails_the_check(
    mutation: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch, feed, lengths = MUTATIONS[mutation]
    model, texts = build(CASE, dtype, backend), documents(*lengths)
    check(model, FEEDS[feed], CASE, texts)
    patch(monkeypatch)
    with pytest.raises(AssertionError, match="of the largest value"):
        check(model, FEEDS[feed], CASE, texts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mutation", UNTOUCHED)
def test_the_mistake_is_only_where_it_says(mutation: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feed, lengths = UNTOUCHED[mutation]
    MUTATIONS[mutation][0](monkeypatch)
    check(build(CASE, torch.float64, backend), FEEDS[feed], CASE, documents(*lengths))


def test_the_check_refuses_not_a_number() -> None:
    model = build(CASE)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(AssertionError):
        check(model, FEEDS["whole"], CASE, documents(5))
