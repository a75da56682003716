"""Layer by layer: right conversions are proved, a fault is found in its layer, and one layer is in memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import alibi_hf.verification.controls as controls_module
import alibi_hf.verification.layerwise as layerwise_module
import alibi_hf.verification.proof as proof_module
from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.model.bias_alibi import Distances
from alibi_hf.verification import LAYERWISE, NotEnoughMemoryError, Verification, verify
from alibi_hf.verification.part import OurParts, UpstreamParts, Wanted
from alibi_hf.verification.report import is_enough
from alibi_hf.verification.subjects import load_ours
from tests import builders
from tests.verification.converted import pair

TRAINED = 24
BEYOND = (12, 60)


def run(source: Path, output: Path, only: tuple[str, ...] = ("layers",)) -> Verification:
    return verify(source, output, lengths=BEYOND, only=only)


def failed(report: Verification) -> set[tuple[str, int | None]]:
    """Name and layer of the checks that did not pass."""
    return {(check.name, check.layer) for check in report.checks if not check.passed}


def edited(output: Path, folder: Path, **tensors) -> Path:
    """A copy of the output in which functions have changed tensors in place."""
    shutil.copytree(output, folder)
    held = load_file(folder / "model.safetensors")
    for name, change in tensors.items():
        change(held[name.replace("__", ".")])
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "heads", "kwargs"),
    [
        ("bloom", 1, {}),
        ("bloom", 12, {"shards": 3, "prefix": False, "layers": 3}),
        ("bloom", 6, {"tie": False}),
        ("mpt", 40, {"length": TRAINED, "layers": 1}),
        ("falcon", 12, {}),
    ],
)
def test_right_conversions_pass(family: str, heads: int, kwargs: dict) -> None:
    source, output = pair(family, heads, **kwargs)
    report = run(source, output)
    assert not failed(report) and len(report.negative_controls) == 2
    assert all(control.caught and control.error > 100 * control.limit for control in report.negative_controls)
    layers = range(kwargs.get("layers", 2))
    assert {check.layer for check in report.checks} == {None, *layers}
    for layer in layers:  # each in both dtypes, at both lengths
        assert len({(c.name, c.dtype, c.length) for c in report.checks if c.layer == layer}) % 4 == 0
    assert "generation were not run" in report.notes[-1]


def test_a_plain_reference_goes_layer_by_layer_too(tmp_path) -> None:
    attention = {"qk_ln": True, "clip_qkv": 2, "attn_type": "grouped_query_attention", "kv_n_heads": 4}
    raw = {"no_bias": False, "logit_scale": 0.5, "tie_word_embeddings": False}
    source = builders.foundry(tmp_path / "source", 12, attn_config=attention, raw=raw)
    convert(source, tmp_path / "output", verify=False)
    assert not failed(run(source, tmp_path / "output"))


def test_another_dtype_is_compared_with_the_rounded_weights(tmp_path) -> None:
    source, _ = pair("bloom")
    convert(source, tmp_path / "output", dtype="bfloat16", verify=False)
    assert not failed(run(source, tmp_path / "output"))


def swap(weight: torch.Tensor) -> None:
    weight[: 2 * builders.HEAD_DIM] = weight[: 2 * builders.HEAD_DIM].roll(builders.HEAD_DIM, 0).clone()


@pytest.mark.parametrize(
    ("name", "change", "step", "layer"),
    [
        ("model__layers__1__self_attn__k_proj__weight", swap, "layer", 1),
        ("model__layers__0__mlp__up_proj__bias", lambda bias: bias.mul_(1.1), "layer", 0),
        ("model__norm__weight", lambda weight: weight.add_(0.01), "last norm and head", None),
        ("model__embed_norm__weight", lambda weight: weight.add_(0.01), "embedding", None),
    ],
)
def test_a_fault_is_found_where_it_is_and_nowhere_else(name, change, step, layer, tmp_path) -> None:
    source, output = pair("bloom")
    report = run(source, edited(output, tmp_path / "output", **{name: change}))
    assert failed(report) == {(step, layer)}
    assert report.verdict == "not proved"


@pytest.mark.parametrize(("factor", "beyond"), [(-1.0, 0), (0.0, 0), (1.1, 0), (1.1, TRAINED)])
def test_a_wrong_bias_is_found_in_every_layer(factor: float, beyond: int, monkeypatch) -> None:
    """Sign, no bias, ten per cent; the last only past the training length."""
    source, output = pair("mpt", 6, length=TRAINED)
    right = Distances.bias

    def bias(self: Distances, delta: torch.Tensor) -> torch.Tensor:
        return right(self, delta) * (factor if self.num_keys > beyond else 1.0)

    monkeypatch.setattr(Distances, "bias", bias)
    report = run(source, output)
    assert failed(report) == {("layer", 0), ("layer", 1)}
    assert {check.length for check in report.checks if not check.passed} == ({60} if beyond else {12, 60})


def test_a_control_that_passes_is_not_proved(monkeypatch) -> None:
    source, output = pair("mpt", 6, length=TRAINED)
    monkeypatch.setattr(controls_module, "WRONG_SLOPE", 1.0)
    report = run(source, output, LAYERWISE)
    assert not failed(report) and not report.proved
    assert [control.caught for control in report.negative_controls] == [False, True]


def test_the_head_in_pieces_is_the_head(monkeypatch) -> None:
    """Pieces that do not divide the vocabulary, tied and untied, and fewer positions than there are."""
    monkeypatch.setattr(layerwise_module, "HEAD_VALUES", 48 * 10)
    monkeypatch.setattr(layerwise_module, "LOGITS", builders.VOCAB * 20)
    for kwargs in ({}, {"tie": False}):
        source, output = pair("bloom", 6, **kwargs)
        report = run(source, output)
        assert not failed(report)
        whole = [check for check in report.checks if check.name == "last norm and head" and check.dtype == "float32"]
        assert [check.length for check in whole] == [12, 20]
        assert all(0 < check.ours < check.limit and check.detail["ours"]["argmax"] == 1 for check in whole)


def test_parts_put_together_are_the_model() -> None:
    """The chain of parts gives the logits of the whole, on both sides: no part is left out or run twice."""
    source, output = pair("bloom", 12, layers=2)
    checkpoint, ids = Checkpoint.open(source), builders.ids()
    reference = checkpoint.family.reference(checkpoint.config)
    whole = load_ours(output, torch.float64, "cpu")
    with torch.no_grad():
        expected = whole(ids, use_cache=False).logits
    upstream = UpstreamParts(checkpoint, reference, torch.float32, 40, "cpu")
    for load in (upstream.load, OurParts(output, "cpu").load):
        with reference.truth():
            states = load(torch.float64, Wanted(embedding=range(builders.VOCAB))).embed(ids)
            for layer in range(2):
                states = load(torch.float64, Wanted(layer=layer)).layer(states)
            logits = load(torch.float64, Wanted(head=range(builders.VOCAB))).logits(states)
        assert builders.distance(logits, expected) < 1e-7  # slopes are float32 in ours


def test_plain_verification_measures_every_layer_too() -> None:
    report = verify(*pair("mpt", 6, length=TRAINED), lengths=(12,))
    assert {check.layer for check in report.checks} == {None, 0, 1}
    assert len(report.negative_controls) == 4 and report.proved


@pytest.mark.parametrize(
    ("parts", "enough"),
    [(("bias", "tensors", "layers"), True), (("tensors", "bias", "model"), True), (("layers", "model", "bias"), False)],
)
def test_what_is_enough_to_prove(parts: tuple[str, ...], enough: bool) -> None:
    assert is_enough(parts) is enough
    report = verify(*pair("mpt"), lengths=(12,), only=parts)
    assert not failed(report) and report.proved is enough


def test_a_model_too_large_to_run_whole_is_proved_layer_by_layer(monkeypatch) -> None:
    source, output = pair("mpt", 6, length=TRAINED)
    monkeypatch.setattr(proof_module, "available_memory", lambda device: 700 * 2**20)
    monkeypatch.setattr(proof_module, "estimate_memory", lambda *_: layerwise_module_estimate)
    with pytest.raises(NotEnoughMemoryError, match=r"--layerwise \(only=\('bias', 'tensors', 'layers'\)\)"):
        verify(source, output, lengths=BEYOND)
    assert run(source, output, LAYERWISE).proved
    monkeypatch.setattr(proof_module, "available_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemoryError):
        run(source, output, LAYERWISE)


layerwise_module_estimate = proof_module.estimate_memory(
    Checkpoint.open(pair("mpt")[0]).config, 10**9, [(1, 10)], (1, 10), 1
)

SCRIPT = """
import sys, threading, time
from alibi_hf.verification import LAYERWISE, inputs, layerwise, verify
inputs.NUMBERS, layerwise.LOGITS, layerwise.HEAD_VALUES = 2**12, 2**14, 2**16
def held():
    line = next(line for line in open('/proc/self/status') if line.startswith('RssAnon'))
    return int(line.split()[1]) / 1024
verify(sys.argv[1], sys.argv[2], only=LAYERWISE, lengths=(16,))  # imports and first-use costs
start, peak, running = held(), [0.0], [True]
def watch():
    while running[0]:
        peak[0] = max(peak[0], held())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
report = verify(sys.argv[3], sys.argv[4], only=LAYERWISE, lengths=(16,))
running[0] = False; thread.join()
print(report.verdict, peak[0] - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_that_of_one_layer_whatever_their_number(tmp_path) -> None:
    """One layer is 6 MiB in float64, and so is the embedding; the model is 66 MiB."""
    source = builders.bloom(tmp_path / "source", heads=32, layers=10, raw={"vocab_size": 3072, "seq_length": 16})
    convert(source, tmp_path / "output", verify=False)
    folders = map(str, [*pair("mpt", 6, length=TRAINED), source, tmp_path / "output"])
    command = [sys.executable, "-c", SCRIPT, *folders]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    verdict, peak = ran.stdout.rsplit(" ", 1)
    assert verdict == "proved" and float(peak) < 40


def test_the_report_has_the_layers(tmp_path) -> None:
    report = run(*pair("mpt", 6, length=TRAINED), LAYERWISE)
    report.save(tmp_path)
    saved = json.loads((tmp_path / "verification.json").read_text())
    assert saved["parts"] == list(LAYERWISE)
    assert sorted({check["layer"] for check in saved["checks"] if check["layer"] is not None}) == [0, 1]
    page = (tmp_path / "verification.md").read_text()
    assert "| layer [0] | float32 | 60 |" in page and "| layer [1] | bfloat16 | 12 |" in page
