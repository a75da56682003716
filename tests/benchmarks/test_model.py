"""The model benchmark at tiny sizes: both sides have the same weights, and the file says all it must."""

import json

import torch

from benchmarks import model
from benchmarks.report import Report
from benchmarks.subjects import CONTENDERS, filled_cache, load_subject, write_checkpoint

TINY = ["--size", "tiny", "--threads", "1", "--repeats", "2", "--seconds", "0.01", "--no-memory"]


def test_command_writes_every_case(tmp_path):
    path = tmp_path / "model.json"
    model.main([*TINY, "--lengths", "24", "--contexts", "8", "--output", str(path)])
    report = json.loads(path.read_text())
    rows = report["results"]
    cases = {(row["model"], row["dtype"], row["task"], row["length"]) for row in rows}
    tasks = {("decode", 8), ("prefill", 24), ("train", 24)}
    assert cases == {(m, d, *task) for m in ("bloom", "mpt") for d in ("float32", "bfloat16") for task in tasks}
    left_out = {row["contender"] for row in report["left_out"]}
    assert {row["contender"] for row in rows} == set(CONTENDERS) - left_out >= {"upstream", "ours-dense"}
    assert "upstream" not in left_out and all(row["reason"] for row in report["left_out"])
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["times_faster"] > 0
        if row["task"] != "train":
            # 16 bits: upstream's own rounding; far from what a wrong bias gives (see below)
            assert row["unlike_upstream"] < (1e-5 if row["dtype"] == "float32" else 0.05)


def test_a_wrong_bias_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(CONTENDERS, "no-alibi", {"alibi": False})
    for family in ("bloom", "mpt"):
        folder = write_checkpoint(family, "tiny", 256, tmp_path / family)
        upstream, wrong = (
            load_subject(family, name, folder, torch.float32, "cpu") for name in ("upstream", "no-alibi")
        )
        for case in (("decode", 40), ("prefill", 40)):
            true = model.make_call(upstream, case)().double()
            assert model.relative_error(model.make_call(wrong, case)(), true)["rms"] > 0.1


def test_caches_are_equal_and_grow_as_tokens_are_decoded(tmp_path):
    folder = write_checkpoint("bloom", "tiny", 256, tmp_path)
    caches = []
    for name in ("upstream", "ours-dense"):
        subject = load_subject("bloom", name, folder, torch.float32, "cpu")
        caches.append(filled_cache(subject, 20))
        assert caches[-1].get_seq_length() == 20
        model.decode(subject.model, torch.tensor([[5]]), caches[-1])
        assert caches[-1].get_seq_length() == 20 + model.TOKENS
    upstream, own = (cache.layers[1].keys for cache in caches)
    assert torch.equal(upstream[:, :, :20], own[:, :, :20])


def test_training_leaves_no_gradients(tmp_path):
    subject = load_subject("mpt", "ours-dense", write_checkpoint("mpt", "tiny", 256, tmp_path), torch.float32, "cpu")
    assert model.make_call(subject, ("train", 12))() > 0
    assert all(parameter.grad is None for parameter in subject.model.parameters())


def test_training_that_is_too_slow_is_foretold_by_prefill():
    about = {"model": "bloom", "contender": "ours"}
    report = Report("model", {}, {}, {}, [{**about, "task": "prefill", "length": 1024, "median_ms": 3000.0}])
    assert model.expected_seconds({**about, "task": "train", "length": 2048}, report) == 24.0
    assert model.expected_seconds({**about, "task": "prefill", "length": 2048}, report) == 6.0
    assert model.expected_seconds({**about, "task": "decode", "length": 2048}, report) == 0.0


def test_peaks_are_given_for_each_case(tmp_path):
    folder = write_checkpoint("bloom", "tiny", 256, tmp_path)
    own = [("prefill", 32), ("train", 32)]
    assert list(model.model_peaks("bloom", "upstream", folder, "float32", own, "cpu", 1)) == own
