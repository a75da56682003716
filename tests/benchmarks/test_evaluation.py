"""The benchmark of evaluation at a tiny size: both ways are timed and measured, on the same tokens."""

import json

import pytest

from benchmarks import evaluation


def test_command_writes_both_ways(tmp_path):
    path = tmp_path / "evaluation.json"
    options = ["--size", "tiny", "--threads", "1", "--repeats", "1", "--seconds", "0.01", "--lengths", "48"]
    evaluation.main([*options, "--models", "bloom", "--output", str(path)])
    report = json.loads(path.read_text())
    found = [(row["model"], row["length"], row["way"]) for row in report["results"]]
    assert found == [("bloom", 48, way) for way in ("prefill", "evaluation")]
    assert not report["left_out"]
    for row in report["results"]:
        assert row["peak_bytes"] > 10**7
        assert row["tokens_per_second"] == pytest.approx(row["length"] / row["median_ms"] * 1e3)
        assert (row["ratio"] == 1) == (row["way"] == "prefill")
