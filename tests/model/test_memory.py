"""sdpa never holds anything of the size heads x queries x keys; eager does, and the test sees it."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from alibi_hf import AlibiConfig, AlibiForCausalLM
from alibi_hf.model import layers_alibi
from alibi_hf.model.layers_alibi import AlibiAttention, AlibiMLP

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


WIDTH, INNER = 16, 64
MLPS = {"plain": {}, "gated": {"mlp_type": "gated", "hidden_act": "silu"}}


def small_config(**changes: Any) -> AlibiConfig:
    return AlibiConfig(hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=2, mlp_bias=True, **changes)


def kept_by(layer: torch.nn.Module, run: Any) -> tuple[int, torch.Tensor]:
    """Return how many bytes autograd keeps beside the parameters while `run()` runs, and what it returns."""
    own, kept = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own), result


@pytest.mark.parametrize("kind", MLPS)
def test_an_mlp_keeps_no_input_of_its_last_product_while_training(kind):
    """And its gradients are the same to the last bit."""
    layer, states = AlibiMLP(small_config(**MLPS[kind])), torch.randn(1, 40, WIDTH, requires_grad=True)
    found = []
    for training in (True, False):
        layer.train(training)
        kept, output = kept_by(layer, lambda: layer(states))
        found.append((kept // (4 * 40), torch.autograd.grad(output.square().sum(), [states, *layer.parameters()])))
    (lean, gradients), (full, truth) = found
    halves = 2 if kind == "gated" else 1  # gate and up; what the activation makes of the gate is one more
    assert lean == WIDTH + halves * INNER
    assert full == WIDTH + 2 * halves * INNER
    assert all(torch.equal(one, other) for one, other in zip(gradients, truth, strict=True))


@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("shape", [(1, 1000), (3, 333)])
def test_without_gradients_the_inside_of_an_mlp_is_held_in_parts(
    kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_alibi, "MLP_ROWS", 100)
    torch.manual_seed(0)
    mlp = AlibiMLP(AlibiConfig(hidden_size=16, intermediate_size=256, num_attention_heads=4, mlp_type=kind)).double()
    states = torch.randn(*shape, 16, dtype=torch.float64)
    mlp.eval()
    whole = mlp(states)
    with torch.no_grad(), LargestTensor() as seen:
        parts = mlp(states)
    assert torch.allclose(parts, whole, rtol=0, atol=1e-14) and not torch.equal(parts[:, 1:], parts[:, :-1])
    assert seen.largest <= max(100 * 256, states.numel()) * 2  # float64 counts twice
    with LargestTensor() as seen:
        mlp(states)
    assert seen.largest >= states[..., 0].numel() * 256 * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_drops_out_alike_twice(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reentrant checkpointing runs forward without gradients first: as many tokens at a time as with them."""
    monkeypatch.setattr(layers_alibi, "MLP_ROWS", 10)
    mlp = AlibiMLP(small_config()).train()
    mlp.up_proj = nn.Sequential(mlp.up_proj, nn.Dropout(0.5))  # as in an adapter
    found = []
    for wrap in (False, True):
        torch.manual_seed(0)
        states = torch.ones(2, 40, WIDTH, requires_grad=True)
        output = checkpoint(mlp, states, use_reentrant=reentrant) if wrap else mlp(states)
        output.square().sum().backward()
        found.append((output, states.grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("around", ["act_fn", "down_proj"])
def test_a_hook_in_an_mlp_runs_once(around):
    """It may drop out, or count: it is not run again in backward."""
    layer, calls = AlibiMLP(small_config()).train(), []
    getattr(layer, around).register_forward_hook(lambda *_: calls.append("hook"))
    layer(torch.randn(1, 4, WIDTH)).sum().backward()
    assert calls == ["hook"]


def test_an_activation_put_in_runs_once():
    """It may have dropout of its own."""
    layer, calls = AlibiMLP(small_config()).train(), []
    layer.act_fn = torch.nn.Sequential(layer.act_fn)
    layer.act_fn[0].register_forward_hook(lambda *_: calls.append("activation"))
    layer(torch.randn(1, 4, WIDTH)).sum().backward()
    assert calls == ["activation"]


def test_a_layer_around_the_last_product_runs_once():
    """An adapter may have dropout of its own."""
    layer, calls = AlibiMLP(small_config()).train(), []

    class Adapter(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            calls.append("adapter")
            return super().forward(states)

    layer.down_proj = Adapter(INNER, WIDTH)
    layer(torch.randn(1, 4, WIDTH)).sum().backward()
    assert calls == ["adapter"]


def test_products_of_one_input_share_its_copy_under_autocast():
    layer, states = AlibiAttention(small_config(), 0), torch.randn(1, 40, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        kept, (query, *_) = kept_by(layer, lambda: layer.project(states))
        assert torch.equal(query, layer.q_proj(states).view(1, 40, 2, 8).transpose(1, 2))
    assert kept == 2 * (40 * WIDTH + 3 * WIDTH * WIDTH)  # the input and the three weights, in 16 bits
