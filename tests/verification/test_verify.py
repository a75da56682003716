"""Whole verifications: right conversions are proved, wrong ones are not, and the report says what happened."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import alibi_hf.verification.controls as controls_module
from alibi_hf.checkpoints.convert import convert
from alibi_hf.errors import AlibiError, CheckpointFileError, ConfigFieldError
from alibi_hf.model import positions_alibi
from alibi_hf.model.bias_alibi import Distances
from alibi_hf.verification import LAYERWISE, verify
from tests import builders
from tests.verification.converted import LENGTHS, pair

TRAINED = 24
BEYOND = (12, 24, 60)


def failed(report) -> set[str]:
    """Names of the checks that did not pass."""
    return {check.name for check in report.checks if not check.passed}


@pytest.mark.parametrize(
    ("family", "heads", "kwargs"),
    [
        ("bloom", 1, {}),
        ("bloom", 12, {"shards": 3, "prefix": False}),
        ("bloom", 40, {"layers": 1}),
        ("mpt", 6, {"length": TRAINED}),
        ("falcon", 6, {}),
        ("falcon", 12, {"layers": 1}),
    ],
)
def test_right_conversions_are_proved(family: str, heads: int, kwargs: dict) -> None:
    source, output = pair(family, heads, **kwargs)
    report = verify(source, output, lengths=BEYOND)
    assert report.verdict == "proved", failed(report)
    assert all(control.caught and control.error > 100 * control.limit for control in report.negative_controls)
    names = {check.name.split(",")[0] for check in report.checks}
    whole = {"upstream as it stands", "logits", "loss", "gradients", "greedy tokens"}
    expected = {"tensors", "bias", "embedding", "layer", "last norm and head"} | whole
    assert names == expected | ({"bias bits"} if family != "mpt" else set())


def test_fields_that_transformers_ignores_are_compared_with_the_plain_module(tmp_path) -> None:
    attention = {
        "alibi_bias_max": 16,
        "qk_ln": True,
        "clip_qkv": 2,
        "attn_type": "grouped_query_attention",
        "kv_n_heads": 4,
    }
    source = builders.foundry(tmp_path / "source", 12, attn_config=attention, raw={"no_bias": False})
    convert(source, tmp_path / "output", verify=False)
    report = verify(source, tmp_path / "output", lengths=LENGTHS)
    assert report.proved, failed(report)
    assert "alibi_bias_max=16" in report.reference["reason"]


def test_native_mpt_s_limit_is_said() -> None:
    source, output = pair("mpt", 6, length=TRAINED)
    report = verify(source, output, lengths=BEYOND)
    assert "refuses more than max_seq_len=24" in report.reference["length"]
    assert "max_seq_len=60" in report.reference["length"]


def test_falcon_is_proved_twice() -> None:
    source, output = pair("falcon", 12, layers=1)  # slopes that are no powers of two: bfloat16 rounds them
    report = verify(source, output, lengths=LENGTHS)
    assert report.reference["attn_implementation"] == "sdpa"
    for suffix in (", falcon bias", ", exact bias"):
        assert {check.dtype for check in report.checks if check.name == f"logits{suffix}"} == {"float32", "bfloat16"}
    # What Falcon's own rounding costs is far more than what either of us may be off.
    rounding = next(check for check in report.checks if check.name == "upstream as it stands, exact bias")
    exact = next(check for check in report.checks if check.name == "logits, exact bias" and check.dtype == "float32")
    assert rounding.upstream > 100 * exact.limit


def edited(output: Path, folder: Path, **fields: object) -> Path:
    """A copy of the output with other fields in its config."""
    shutil.copytree(output, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **fields}))
    return folder


def test_a_wrong_slope_is_not_proved(tmp_path) -> None:
    source, output = pair("mpt")
    slopes = [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.1251]
    report = verify(source, edited(output, tmp_path / "output", alibi_slopes=slopes), lengths=LENGTHS)
    assert {"bias, against float64", "logits", "gradients"} <= failed(report)


def test_swapped_keys_are_not_proved(tmp_path) -> None:
    source, output = pair("bloom")
    shutil.copytree(output, tmp_path / "output")
    tensors = load_file(tmp_path / "output" / "model.safetensors")
    weight = tensors["model.layers.0.self_attn.k_proj.weight"]
    weight[: 2 * builders.HEAD_DIM] = weight[: 2 * builders.HEAD_DIM].roll(builders.HEAD_DIM, 0).clone()
    save_file(tensors, tmp_path / "output" / "model.safetensors", metadata={"format": "pt"})
    report = verify(source, tmp_path / "output", lengths=LENGTHS)
    assert {"tensors", "logits", "loss", "gradients", "greedy tokens"} <= failed(report)


def break_bias(monkeypatch, when) -> None:
    """Make our bias ten per cent too large in the calls for which `when(distances, start)` holds."""
    right = Distances.bias

    def bias(self: Distances, delta: torch.Tensor) -> torch.Tensor:
        return right(self, delta) * (1.1 if when(self, delta) else 1.0)

    monkeypatch.setattr(Distances, "bias", bias)


def test_wrong_only_in_decode_is_not_proved(monkeypatch) -> None:
    source, output = pair("mpt", 6, length=TRAINED)
    break_bias(monkeypatch, lambda distances, delta: distances.query_index.numel() == 1 and distances.num_keys > 1)
    report = verify(source, output, lengths=BEYOND)
    assert "logits, cached decode" in failed(report)
    assert "logits" not in failed(report)


def test_wrong_only_beyond_training_is_not_proved(monkeypatch) -> None:
    source, output = pair("mpt", 6, length=TRAINED)
    break_bias(monkeypatch, lambda distances, delta: distances.num_keys > 2 * TRAINED)
    wrong = {check.length for check in verify(source, output, lengths=BEYOND).checks if not check.passed}
    assert wrong == {60}


def test_wrong_only_under_padding_is_not_proved(monkeypatch) -> None:
    source, output = pair("bloom")
    right = positions_alibi._use_padding_mask

    def wrong(distances: Distances, mask: torch.Tensor) -> None:
        right(distances, mask)
        if distances.key_mask is not None:
            distances.slopes = distances.slopes * 1.1

    monkeypatch.setattr(positions_alibi, "_use_padding_mask", wrong)
    assert "logits, left-padded batch" in failed(verify(source, output, lengths=LENGTHS))


def test_a_control_that_passes_is_not_proved(monkeypatch) -> None:
    source, output = pair("mpt")
    monkeypatch.setattr(controls_module, "WRONG_SLOPE", 1.0)
    report = verify(source, output, lengths=LENGTHS)
    assert not failed(report)
    assert report.verdict == "not proved"
    assert [control.caught for control in report.negative_controls] == [False, True, False, True]


def test_another_dtype_is_proved_against_the_rounded_weights(tmp_path) -> None:
    source, _ = pair("bloom")
    convert(source, tmp_path / "output", dtype="bfloat16", verify=False)
    report = verify(source, tmp_path / "output", lengths=LENGTHS)
    assert report.proved, failed(report)
    assert "rounded to bfloat16" in report.reference["weights"]


def test_the_report(tmp_path) -> None:
    source, output = pair("bloom")
    seen: list[tuple[str, int, int]] = []
    report = verify(source, output, lengths=LENGTHS, progress=lambda *step: seen.append(step))
    assert report.save(tmp_path) == tmp_path / "verification.md"
    saved = json.loads((tmp_path / "verification.json").read_text())
    assert saved["verdict"] == "proved" and saved["schema_version"] == 1
    assert {"class", "attn_implementation", "truth"} <= saved["reference"].keys()
    assert {"torch", "transformers", "alibi_hf"} <= saved["versions"].keys()
    fields = {"name", "dtype", "length", "ours", "upstream", "limit", "passed"}
    assert all(fields <= check.keys() for check in saved["checks"])
    assert [control["caught"] for control in saved["negative_controls"]] == [True] * 4
    page = (tmp_path / "verification.md").read_text()
    assert page.startswith("# Proved") and "| logits | float32 | 40 |" in page
    console = Console(width=200, record=True)
    console.print(report.table())
    assert "transformers.BloomForCausalLM (eager)" in console.export_text()
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert seen[-1] == ("done", seen[-1][2], seen[-1][2])


def test_numbers_that_are_none_become_null(tmp_path) -> None:
    source, output = pair("bloom")
    shutil.copytree(output, tmp_path / "output")
    tensors = load_file(tmp_path / "output" / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "output" / "model.safetensors", metadata={"format": "pt"})
    report = verify(source, tmp_path / "output", lengths=LENGTHS)
    assert "logits" in failed(report)
    report.save(tmp_path)
    saved = json.loads((tmp_path / "verification.json").read_text())
    assert next(check for check in saved["checks"] if check["name"] == "logits")["ours"] is None
    report.table()


def test_the_output_must_be_converted() -> None:
    source, _ = pair("bloom")
    with pytest.raises(CheckpointFileError, match="model_type='bloom'"):
        verify(source, source, lengths=LENGTHS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers=1, the source has 2"),
        ({"vocab_size": 98}, "vocab_size=98, the source has 97"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2, the source has 6"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple"),
        ({"alibi_rounding": "bloom"}, "alibi_rounding='bloom' is not the rounding of mpt"),
    ],
)
def test_a_config_that_is_not_the_sources_is_refused(change, words, tmp_path) -> None:
    source, output = pair("mpt", 6)
    shutil.copytree(output, tmp_path / "output")
    config = json.loads((output / "config.json").read_text())
    (tmp_path / "output" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigFieldError, match=words):
        verify(source, tmp_path / "output", only=LAYERWISE)


def test_bad_arguments_are_named() -> None:
    source, output = pair("bloom")
    with pytest.raises(AlibiError, match=r"\['speed'\] is not known"):
        verify(source, output, only=("speed",))
    with pytest.raises(AlibiError, match="a row of 1 tokens"):
        verify(source, output, lengths=(1, 8))
