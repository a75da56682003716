"""torch.export with free batch and length: saved, loaded again, and right at lengths that were never traced."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.checkpoints.exporting import bend_bias
from tests.model.cases import assert_close, build, documents, expected
from tests.model.feeding import pad

pytestmark = pytest.mark.slow
FREE = torch.export.Dim.DYNAMIC
BOUND = 1e-5
Past = list[tuple[torch.Tensor, torch.Tensor]]


class Decoder(torch.nn.Module):
    """The model with its cache as plain tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: Past) -> tuple[torch.Tensor, Past]:
        cache = DynamicCache(past)
        logits = self.model(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True).logits
        return logits, [(layer.keys, layer.values) for layer in cache.layers]


def saved(module: torch.nn.Module, given: dict[str, Any], shapes: dict[str, Any], path: Path) -> Callable[..., Any]:
    """Export, write to a file, and return what is loaded from it."""
    with torch.no_grad():
        torch.export.save(torch.export.export(module, (), given, dynamic_shapes=shapes), path)
    return torch.export.load(path).module()


def exported_decoder(case: str, tmp_path: Path) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the graph that reads new rows, and the one that reads one token more."""
    model = Decoder(build(case, torch.float32))
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    both = {"input_ids": {0: FREE, 1: FREE}, "attention_mask": {0: FREE, 1: FREE}}
    prefill = saved(
        model, {"input_ids": ids, "attention_mask": mask, "past": []}, {**both, "past": []}, tmp_path / "a.pt2"
    )
    _, past = prefill(input_ids=ids, attention_mask=mask, past=[])
    layer = ({0: FREE, 2: FREE}, {0: FREE, 2: FREE})
    shapes = {"input_ids": {0: FREE}, "attention_mask": {0: FREE, 1: FREE}, "past": [layer] * len(past)}
    given = {"input_ids": ids[:, :1], "attention_mask": torch.ones(2, 6, dtype=torch.long), "past": past}
    return prefill, saved(model, given, shapes, tmp_path / "step.pt2")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", ["six", "scaled_by_length"])
def test_logits_at_any_length_and_batch(case: str, padded: bool, tmp_path: Path) -> None:
    given: dict[str, Any] = {"input_ids": torch.ones(2, 5, dtype=torch.long), "use_cache": False}
    shapes: dict[str, Any] = {"input_ids": {0: FREE, 1: FREE}, "use_cache": None}
    if padded:
        given["attention_mask"], shapes["attention_mask"] = torch.ones(2, 5, dtype=torch.long), {0: FREE, 1: FREE}
    module = saved(build(case, torch.float32), given, shapes, tmp_path / "model.pt2")
    if not padded:
        for text in documents(2, 40, 301):
            rows = text[None].repeat(3, 1)
            assert_close(module(input_ids=rows, use_cache=False).logits[2], expected(case, text).logits, BOUND)
        return
    for side in ("left", "right", "interior"):
        texts = documents(9, 150, 31)
        ids, mask = pad(texts, side)
        found = module(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, text in enumerate(texts):
            assert_close(found[row, mask[row].bool()], expected(case, text).logits, BOUND)


def decode(prefill: Callable[..., Any], step: Callable[..., Any], texts: list[torch.Tensor], read: int) -> list[Any]:
    """Return the logits of each text of a left-padded batch, all but the first `read` columns token by token."""
    ids, mask = pad(texts, "left")
    logits, past = prefill(input_ids=ids[:, :read], attention_mask=mask[:, :read], past=[])
    outputs = [logits]
    for stop in range(read + 1, ids.shape[1] + 1):
        logits, past = step(input_ids=ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], past=past)
        outputs.append(logits)
    return [row[kept.bool()] for row, kept in zip(torch.cat(outputs, dim=1), mask, strict=True)]


@torch.no_grad()
def test_with_a_cache(tmp_path: Path) -> None:
    texts = documents(60, 45)  # trained on 32
    for found, text in zip(decode(*exported_decoder("twelve_grouped", tmp_path), texts, 50), texts, strict=True):
        assert_close(found, expected("twelve_grouped", text).logits, BOUND)


@torch.no_grad()
def test_a_wrong_bias_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bend_bias(monkeypatch, 0.0)
    texts = documents(60, 45)
    for found, text in zip(decode(*exported_decoder("six", tmp_path), texts, 50), texts, strict=True):
        truth = expected("six", text).logits
        for part in (slice(40), slice(-5, None)):  # what was read in one call, and what was decoded
            with pytest.raises(AssertionError, match="of the largest value"):
                assert_close(found[part], truth[part], 100 * BOUND)
