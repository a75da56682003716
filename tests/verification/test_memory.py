"""The estimate that comes before anything is loaded."""

from pathlib import Path

import pytest
import torch

import alibi_hf.verification.proof as proof_module
from alibi_hf import AlibiConfig
from alibi_hf.checkpoints.shards import TensorInfo
from alibi_hf.errors import AlibiError
from alibi_hf.verification import NotEnoughMemoryError, verify
from alibi_hf.verification.inputs import make_inputs
from alibi_hf.verification.layerwise import LOGITS, layer_rows
from alibi_hf.verification.memory import (
    Estimate,
    available_memory,
    estimate_layer_memory,
    estimate_memory,
    require_memory,
)
from alibi_hf.verification.text import make_tokens
from tests.verification.converted import LENGTHS, pair


def test_the_machine_has_memory() -> None:
    assert available_memory() > 2**20


def test_a_large_model_needs_at_least_its_weights_and_two_gradients() -> None:
    config = AlibiConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    estimate = estimate_memory(config, 7 * 10**9, [(1, 4096)], (2, 128), 4096)
    assert estimate.total > 24 * 7 * 10**9
    longer = estimate_memory(config, 7 * 10**9, [(1, 8192)], (2, 128), 4096)
    assert longer.activations > 3 * estimate.activations


def test_the_error_names_need_available_and_what_is_left() -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"about 3\.0 GiB.*1\.0 GiB are available.*--layerwise"):
        require_memory(Estimate(2**30, 2**30, 2**30, 0), 2**30)
    assert issubclass(NotEnoughMemoryError, AlibiError)
    require_memory(Estimate(1, 1, 1, 1), 4)


def test_verify_refuses_before_it_loads(monkeypatch) -> None:
    source, output = pair("bloom")
    monkeypatch.setattr(proof_module, "available_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemoryError):
        verify(source, output, lengths=LENGTHS)
    report = verify(source, output, lengths=LENGTHS, only=("bias", "tensors"))
    assert all(check.passed for check in report.checks) and len(report.checks) >= 4
    assert report.verdict == "not proved" and "not checked: layers, model" in report.notes[-1]


def test_bloom_176b_is_proved_layer_by_layer_on_24_gib() -> None:
    """Its published sizes; a layer in float64 is 19.7 GB."""
    config = AlibiConfig(
        vocab_size=250880, hidden_size=14336, num_hidden_layers=70, num_attention_heads=112, intermediate_size=57344
    )
    width, bf16 = 14336, torch.bfloat16
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    layer = [TensorInfo(str(shape), Path(), shape, bf16) for shape in shapes]
    inputs = make_inputs(make_tokens("", 250880), config, None, "cpu")
    rows = layer_rows(inputs.rows, 112, asked=False)
    batches = [(len(row), row.shape[1]) for row in rows]
    estimate = estimate_layer_memory(config, layer, 2 * 250880 * width, batches, LOGITS)
    assert 8 * 12 * width**2 < estimate.total < 22 * 2**30
    assert estimate_memory(config, 176 * 10**9, inputs.batches, (2, 128), 64).total > 100 * estimate.total
