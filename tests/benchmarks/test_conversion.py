"""The benchmark of conversion on a very small checkpoint: every step is there, nothing is left behind."""

import json

import pytest
import torch

from benchmarks import conversion
from benchmarks.memory import STATUS, peak_private

MIB = 2**20


@pytest.mark.skipif(not STATUS.exists(), reason="reads /proc")
def test_private_memory_counts_what_is_allocated_and_freed():
    result, before = peak_private(lambda: 1)
    _, peak = peak_private(lambda: [torch.ones(100 * MIB, dtype=torch.uint8).max() for _ in range(3)])
    assert result == 1 and 90 * MIB < peak - before < 250 * MIB


def test_a_small_run(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "WIDTH", 64)
    monkeypatch.setattr(conversion, "HEADS", 4)
    monkeypatch.setattr(conversion, "VOCABULARY", 97)
    monkeypatch.setattr(conversion, "in_fresh_process", lambda function, *given: function(*given))
    output, folder = tmp_path / "result.json", tmp_path / "work"
    folder.mkdir()
    options = ["--gigabytes", "2e-4", "--workers", "1", "3", "--rounds", "1", "--folder", str(folder)]
    conversion.main([*options, "--output", str(output)])
    saved = json.loads(output.read_text())
    steps = [row["step"] for row in saved["results"]]
    assert steps == ["cp", "convert, 1 workers", "convert, 3 workers", "verify, layer by layer"]
    assert saved["settings"]["layers"] == 2 and saved["results"][-1]["verdict"] == "proved"
    assert all(row["mb_per_second"] > 0 for row in saved["results"][:3])
    assert "folder" not in saved["settings"] and not list(folder.iterdir())
