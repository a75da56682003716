"""sdpa never holds anything of the size heads x queries x keys; eager does, and the test sees it."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alibi_hf import AlibiConfig, AlibiForCausalLM

TOKENS, HEADS = 2048, 4
SCORES = HEADS * TOKENS * TOKENS  # entries of what must not be held


class LargestTensor(TorchDispatchMode):
    """Remembers the largest storage that any operation returned, in float32 entries."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
        return result


def largest_tensor(backend: str, inputs: dict[str, torch.Tensor], train: bool = False) -> int:
    config = AlibiConfig(vocab_size=16, hidden_size=64, num_hidden_layers=1, num_attention_heads=HEADS)
    model = AlibiForCausalLM(config)
    model.set_attn_implementation(backend)
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    with torch.set_grad_enabled(train), LargestTensor() as seen:
        outputs = model(ids, use_cache=False, **inputs)
        if train:
            outputs.logits.sum().backward()
    return seen.largest


def inputs(kind: str) -> dict[str, torch.Tensor]:
    if kind == "packed":
        return {"position_ids": torch.arange(TOKENS).remainder(700)[None]}
    if kind == "custom":
        return {"attention_mask": torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()}
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[0, {"left": slice(0, 100), "interior": slice(500, 600), "whole": slice(0, 0)}[kind]] = 0
    return {"attention_mask": mask}


@pytest.mark.parametrize("kind", ["whole", "left", "interior", "packed"])
def test_sdpa_holds_no_scores(kind):
    assert largest_tensor("sdpa", inputs(kind)) <= SCORES // 4


def test_nor_in_training():
    assert largest_tensor("sdpa", {}, train=True) <= SCORES // 4


def test_eager_does():
    assert largest_tensor("eager", {}) >= SCORES


@pytest.mark.parametrize("kind", ["whole", "left", "interior", "packed", "custom"])
def test_nor_does_backward_keep_them(kind):
    """What autograd saves in two layers, counted: not the bias of chunk after chunk."""
    config = AlibiConfig(vocab_size=16, hidden_size=64, num_hidden_layers=2, num_attention_heads=HEADS)
    model = AlibiForCausalLM(config)
    saved: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False, **inputs(kind)).logits.sum()
    loss.backward()
    assert sum(saved.values()) <= SCORES // 2
