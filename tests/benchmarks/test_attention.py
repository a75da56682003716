"""The attention benchmark at tiny sizes: contenders compute ALiBi, the truth is right, the file says all it must."""

import json

import pytest
import torch

from benchmarks import attention, contenders, truth
from benchmarks.contenders import CONTENDERS, EAGER_LIMIT
from benchmarks.inputs import Problem, normal_problem, score_bound, trained_problems
from benchmarks.report import Report

ON_CPU = ["ours", "ours-dense", "row", "sdpa-no-alibi", "hf-sdpa-bias", "bloom-eager", "mpt-eager"]
TINY = ["--heads", "2", "--head-dim", "8", "--threads", "1", "--repeats", "2", "--seconds", "0.01"]


def float64_attention(problem: Problem, grad: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Output and gradients by autograd, all scores in memory, slopes from the paper's formula for six heads."""
    inputs = [t.double().requires_grad_() for t in (problem.query, problem.key, problem.value)]
    query, key, value = inputs
    slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3], dtype=torch.float64)
    index = torch.arange(problem.length)
    distance = index[:, None] - index
    scores = query @ key.transpose(2, 3) * problem.head_dim**-0.5 - slopes[:, None, None] * distance
    output = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ value
    return output.detach(), torch.autograd.grad(output, inputs, grad.double())


@pytest.mark.parametrize("sampled", [False, True])
def test_truth_is_autograd_in_float64(sampled, monkeypatch):
    if sampled:
        monkeypatch.setattr(truth, "ALL_ROWS", 50)
        monkeypatch.setattr(truth, "SAMPLED_ROWS", 9)
    monkeypatch.setattr(truth, "CHUNK_BYTES", 8 * 6 * 50 * 7)  # several chunks, the last one shorter
    problem = normal_problem(50, 6, 8, torch.float32, "cpu")
    found = truth.make_truth(problem, gradients=True)
    output, (dq, dk, dv) = float64_attention(problem, found.grad)
    assert len(found.rows) == (9 if sampled else 50)
    assert {0, 49} <= set(found.rows.tolist())
    pairs = zip((found.output, *found.gradients), (output[:, :, found.rows], dq[:, :, found.rows], dk, dv), strict=True)
    for own, true in pairs:
        torch.testing.assert_close(own, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in ON_CPU if CONTENDERS[name].alibi])
def test_contender_agrees_with_float64(name):
    problem = normal_problem(300, 6, 16, torch.float32, "cpu")  # more than one chunk, heads no power of two
    core = CONTENDERS[name].prepare(problem)
    errors = attention.measure_errors(problem, {name: core}, [name])[name]
    assert set(errors) == {"output", "dq", "dk", "dv"}
    assert all(error["rms"] < 1e-5 for error in errors.values())
    forward = attention.measure_errors(problem, {name: core}, [])[name]
    assert forward == {"output": forward["output"]} and forward["output"]["rms"] < 1e-5


def test_without_the_bias_the_error_is_large():
    problem = normal_problem(300, 6, 16, torch.float32, "cpu")
    true = truth.make_truth(problem, gradients=True)
    core = CONTENDERS["sdpa-no-alibi"].prepare(problem)
    output, gradients = attention.run_backward(core, true.grad)
    assert all(error["rms"] > 0.1 for error in truth.errors(true, output, core.split(gradients)).values())


def test_command_writes_every_case(tmp_path):
    path = tmp_path / "results" / "attention.json"
    attention.main(["--lengths", "24", "8", *TINY, "--output", str(path)])
    report = json.loads(path.read_text())
    assert report["benchmark"] == "attention" and report["schema_version"] == 1
    assert report["machine"]["name"] and report["machine"]["device"] == "cpu"
    assert {"alibi_hf", "torch", "transformers", "python"} <= set(report["versions"])
    cases = {(r["length"], r["dtype"], r["pass"], r["threads"], r["contender"]) for r in report["results"]}
    assert len(cases) == len(report["results"]) == 2 * 2 * 2 * 1 * len(ON_CPU)
    for row in report["results"]:
        assert row["rounds"] >= 1 and row["calls"] >= 1 and row["min_ms"] <= row["median_ms"]
        assert row["ratio_to"] == "ours" and row["ratio"] > 0
        backward = row["pass"] == "forward+backward"
        names = {"output", "dq", "dk", "dv"} if backward else {"output"}
        assert row["error"] is None if row["contender"] == "sdpa-no-alibi" else set(row["error"]) == names
    left_out = {(row["contender"], row["reason"]) for row in report["left_out"]}
    assert {name for name, _ in left_out} == set(CONTENDERS) - set(ON_CPU)
    assert ("flex-alibi", "runs on CUDA alone") in left_out


def test_eager_is_left_out_by_name_when_long():
    problem = normal_problem(EAGER_LIMIT, 1, 1, torch.bfloat16, "cpu")
    for name in ("bloom-eager", "mpt-eager"):
        assert "16384 tokens" in CONTENDERS[name].left_out(problem, backward=False)
    assert CONTENDERS["ours"].left_out(problem, backward=True) is None


def test_what_does_not_fit_is_left_out_with_both_numbers(monkeypatch):
    problem = normal_problem(1024, 16, 1, torch.float32, "cpu")
    monkeypatch.setattr(contenders, "available_memory", lambda device: 2**28)
    assert CONTENDERS["bloom-eager"].left_out(problem, backward=False) is None
    assert "needs about 0.4 GiB, 0.2 GiB" in CONTENDERS["bloom-eager"].left_out(problem, backward=True)


def test_what_is_too_slow_is_left_out_of_that_pass_alone():
    options = attention.parse(["--contenders", "ours", "row", "--slowest", "7", "--threads", "1", "2"])
    short, long = (normal_problem(length, 2, 8, torch.float32, "cpu") for length in (8, 32))
    measured = {**short.describe(), "contender": "row", "pass": "forward+backward", "threads": 1, "median_ms": 500.0}
    report = Report("attention", {}, {}, {}, results=[measured])
    plan = attention.make_plan(long, options, report)
    assert plan.pop(("forward+backward", 1)) == ["ours"]
    assert len(plan) == 3 and all(names == ["ours", "row"] for names in plan.values())
    (row,) = report.left_out
    assert row["reason"] == "forward+backward with threads=1 would take about 8 s a call, --slowest is 7"
    assert attention.too_slow({**measured, "length": 32}, 8.0, report) is None


def test_trained_inputs_are_those_of_the_checkpoints():
    problems = list(trained_problems(40, torch.bfloat16, "cpu"))
    assert [problem.source.split()[0] for problem in problems] == ["sotu-bloom", "sotu-mpt"]
    assert [(problem.heads, problem.head_dim) for problem in problems] == [(8, 32), (6, 32)]
    for problem in problems:
        scores = problem.query.double() @ problem.key.double().transpose(2, 3) * problem.scaling
        bound = score_bound(problem.query, problem.key)
        assert torch.all(scores.abs().amax(dim=(0, 2, 3)) <= bound)
        assert torch.all(bound > 1)  # trained: far from the tiny scores of a new model


def test_peaks_are_given_for_each_pass():
    about = normal_problem(16, 2, 8, torch.float32, "cpu").describe()
    peaks = attention.core_peaks(about, "ours", attention.PASSES, "cpu", 1)
    assert list(peaks) == list(attention.PASSES)
