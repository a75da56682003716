"""`examples/train_short_test_long.py` on tiny settings: the trainings, what they are read as, results that are kept."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import short_long_runs
from alibi_hf.evaluation import perplexity
from position_encodings import ENCODINGS
from short_long_report import curves, findings, write_report
from short_long_results import Results
from short_long_runs import measure_steps
from short_long_training import Run, Settings, build_model, read_by_length, train
from step_cost import peak_bytes, time_steps
from train_short_test_long import SETTINGS, main, parse
from train_sotu import RandomWindows

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SENTENCES = ("The Congress meets today. ", "Peace is with all nations. ", "The debt is paid. ", "We shall act. ")
LINES = ["ALiBi", "RoPE", "RoPE, read with dynamic NTK", "RoPE, read with YaRN", "ALiBi + RoPE", "sinusoidal"]
LINES += ["no positions", "sinusoidal, trained at 16"]


def tiny(**changes):
    known = {name: value for name, value in SETTINGS["tiny"].items() if name in asdict(Settings())}
    return replace(Settings(**known), **changes)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(SENTENCES[i * i * i % 7 % 4] for i in range(800)))
    return path


def ignore():
    """Count nothing."""


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def in_threads(jobs, _context, initializer, arguments):
    """A pool without processes, which take long to start."""
    return ThreadPoolExecutor(jobs, "training", initializer, arguments)


@pytest.mark.slow
def test_a_killed_run_goes_on_without_training_anything_twice(text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["--setting", "tiny", "--text", str(text), "--output", str(out), "--jobs", "1"]
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "train_short_test_long.py"), *command],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        stdout=subprocess.DEVNULL,
    )
    while not (before := finished(out)):
        assert process.poll() is None, "it ended before any training was finished"
        time.sleep(0.05)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers and ends(workers), "a training goes on though nobody will take its result"
    assert len(before) < 6, "nothing was left to do"

    monkeypatch.setattr(short_long_runs, "ProcessPoolExecutor", in_threads)
    assert main(command) == 0
    printed = capsys.readouterr().out
    after = finished(out)
    assert "of 6 trainings are finished already" in printed
    assert all(run in after for run in before), "finished trainings were done again"
    assert {(run["encoding"], run["length"]) for run in after} == {
        *((name, 8) for name in ("alibi", "rope", "hybrid", "sinusoidal", "nope")),
        ("sinusoidal", 16),
    }
    table = (out / "table.md").read_text()
    assert all(table.count(f"\n| {line} |") >= 2 for line in LINES)
    with (out / "perplexity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(LINES) * 2 * 4 and {row["length"] for row in rows} == {"4", "8", "16", "32"}
    assert (out / "train_short_test_long.png").stat().st_size > 1000
    assert "The paper's claim is" in printed and not list(out.glob(".*"))


def finished(out):
    path = out / "results.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


def ends(pids, seconds=20):
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}/exe").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)


def test_all_encodings_start_from_the_same_weights():
    states = [build_model(Run(name, 8, 1), tiny()).state_dict() for name in ENCODINGS]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    other = build_model(Run("alibi", 8, 2), tiny()).state_dict()
    assert not torch.equal(other["model.embed_tokens.weight"], states[0]["model.embed_tokens.weight"])


def test_a_model_trained_with_alibi_needs_its_bias():
    sizes = {"hidden_size": 32, "heads": 4, "layers": 2, "longest": 16}
    settings = tiny(**sizes, steps=160, tokens_per_step=256, learning_rate=1e-2, held_out_tokens=1024)
    run, held_out = Run("alibi", 8, 0), repeating(1024, seed=9)
    model, figures = train(run, settings, repeating(4096), ignore)
    found = by_length(read_by_length(model, run, settings, held_out), "ALiBi")
    assert found[8] < 45 and figures["mean_training_loss"] > 0 and figures["cpu_seconds_per_step"] > 0
    assert found[128] == pytest.approx(perplexity(model, held_out, 128), rel=1e-5)
    without = read_by_length(model, Run("nope", 8, 0), settings, held_out)  # the same weights, no bias
    assert by_length(without, "no positions")[128] > 1.2 * found[128]


def test_scaled_rope_is_rope_up_to_the_training_length_and_another_one_past_it():
    settings, run = tiny(held_out_tokens=256), Run("rope", 8, 0)
    model = build_model(run, settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)  # attention that is not yet even
    rows = read_by_length(model, run, settings, repeating(256))
    plain = by_length(rows, "RoPE")
    for title in ("RoPE, read with dynamic NTK", "RoPE, read with YaRN"):
        scaled = by_length(rows, title)
        assert [scaled[4], scaled[8]] == [plain[4], plain[8]]
        assert scaled[16] != plain[16] and scaled[32] != plain[32]


def test_a_training_that_diverges_is_shown_as_failing(tmp_path):
    settings, run = tiny(learning_rate=1e30), Run("alibi", 8, 0)
    model, figures = train(run, settings, repeating(2048), ignore)
    readings = read_by_length(model, run, settings, repeating(128))
    assert all(row["perplexity"] is None and row["failure"] for row in readings)
    results = Results(tmp_path / "results.json", asdict(settings), {}, {})
    results.add(run, {**figures, "readings": readings})
    write_report(results, tmp_path)
    assert "| ALiBi | fails | fails | fails | fails |" in (tmp_path / "table.md").read_text()
    assert not findings(results)


def test_dropout_and_another_attention_are_those_of_training_alone():
    run, held_out = Run("hybrid", 8, 0), repeating(128)
    settings = tiny(dropout=0.5, attention="eager", steps=3)
    model, _ = train(run, settings, repeating(2048), ignore)
    assert model.config._attn_implementation == "eager" and model.training
    readings = [read_by_length(model, run, settings, held_out) for _ in range(2)]
    assert readings[0] == readings[1]


@pytest.mark.gpu
def test_training_and_its_costs_on_a_gpu(tmp_path):
    settings = tiny(
        device="cuda", attention="flex_attention", hidden_size=64, length=128, tokens_per_step=512, longest=2
    )
    torch.save((repeating(4096), repeating(1024)), tmp_path / "tokens.pt")
    model, figures = train(Run("alibi", 128, 0), settings, repeating(4096), ignore)
    readings = read_by_length(model, Run("alibi", 128, 0), settings, repeating(1024))
    assert model.device.type == "cuda" and figures["peak_bytes_of_step"] > 0
    assert all(row["perplexity"] > 1 for row in readings)
    costs = measure_steps(settings, tmp_path / "tokens.pt")
    assert len(costs) == 6 and all(cost["seconds"] > 0 and cost["peak_bytes"] > 0 for cost in costs)


def repeating(tokens, seed=0):
    """Tokens of which each follows from the one three before it: where something was, not what, tells what comes."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 60, (3,), generator=generator).tolist()
    while len(found) < tokens:
        chance = torch.rand((), generator=generator) < 0.1
        found.append(int(torch.randint(0, 60, (), generator=generator)) if chance else (found[-3] * 7 + 1) % 60)
    return torch.tensor(found)


def by_length(rows, title, protocol="non-overlapping"):
    return {row["length"]: row["perplexity"] for row in rows if (row["read_as"], row["protocol"]) == (title, protocol)}


def made_up(tmp_path, perplexities):
    """Results of one seed: by (encoding, trained at), the perplexity by length."""
    results = Results(tmp_path / "results.json", asdict(tiny(longest=16)), {}, {})
    titles = {"alibi": "ALiBi", "rope": "RoPE", "sinusoidal": "sinusoidal"}
    for (encoding, length), values in perplexities.items():
        rows = [
            {"read_as": titles[encoding], "protocol": "non-overlapping", "length": at, "perplexity": value}
            for at, value in values.items()
        ]
        results.runs.append({"encoding": encoding, "length": length, "seed": 0, "readings": rows})
    return results


@pytest.mark.parametrize(("ours", "verdict"), [(20.1, "reproduced"), (20.3, "NOT reproduced")])
def test_the_claim_is_judged_at_twice_the_training_length(tmp_path, ours, verdict):
    found = {("alibi", 8): {8: 20.5, 16: ours, 128: 1.01 * ours}, ("sinusoidal", 16): {8: 1.0, 16: 20.0, 128: 90.0}}
    sentences = findings(made_up(tmp_path, found | {("rope", 8): {8: 19.0, 16: 25.0, 128: 50.0}}))
    assert f"perplexity {ours} against 20.0 with sinusoidal positions trained at 16." in sentences[0]
    assert sentences[0].endswith(f" is {verdict}.")
    assert "ALiBi +1.0 %, RoPE +100.0 %" in sentences[1]
    assert sentences[2] == "At the training length itself: ALiBi 20.5, RoPE 19.0."


def test_a_difference_that_rounds_to_nothing_has_no_minus(tmp_path):
    results = made_up(tmp_path, {("alibi", 8): {8: 2.0}})
    for encoding, length, memory in (("alibi", 8, 999), ("sinusoidal", 8, 999), ("sinusoidal", 16, 1000)):
        cost = {"encoding": encoding, "length": length, "attention": "sdpa", "seconds": length, "peak_bytes": memory}
        results.step_costs.append(cost)
    assert "ALiBi at 8 takes -50 % time and +0 % memory against sinusoidal positions at 16." in findings(results)[-1]


def test_all_encodings_read_the_same_rows_in_the_same_order(monkeypatch):
    read, window = [], RandomWindows.__getitem__

    def noted(windows, index):
        read.append(window(windows, index)["input_ids"])
        return window(windows, index)

    monkeypatch.setattr(RandomWindows, "__getitem__", noted)
    settings = tiny(dropout=0.3, steps=3)
    for name in ENCODINGS:
        train(Run(name, 8, 1), settings, repeating(2048), ignore)
    first, *rest = torch.stack(read).view(len(ENCODINGS), -1, 8)
    assert len(first) >= 3 * 8 and len(first.unique(dim=0)) > 8 and all(torch.equal(first, other) for other in rest)


def test_lines_of_the_training_length_come_first(tmp_path):
    results = made_up(tmp_path, {("sinusoidal", 16): {8: 3.0}, ("sinusoidal", 8): {8: 2.0}, ("alibi", 8): {8: None}})
    assert curves(results, "non-overlapping") == {
        "ALiBi": {8: [None]},
        "sinusoidal": {8: [2.0]},
        "sinusoidal, trained at 16": {8: [3.0]},
    }
    assert curves(results, "sliding") == {}


def test_memory_of_a_step_is_that_of_its_tensors():
    assert peak_bytes(lambda: torch.zeros(1000, 1000) + torch.ones(1000, 1000), "cpu") == 12_000_000
    slow, fast = torch.ones(400, 400), torch.ones(10, 10)
    seconds = time_steps({"slow": lambda: slow @ slow @ slow, "fast": lambda: fast + fast}, 5, "cpu")
    assert seconds["slow"] > seconds["fast"] >= 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 7}, "--length 7 must be a multiple of 2"),
        ({"length": 2}, "--length 2 is too small; give at least 4"),
        ({"tokens_per_step": 72}, "--tokens_per_step 72 must be a multiple of twice --length, which is 8"),
        ({"held_out_tokens": 100}, "must be a multiple of 32, the longest length that is read"),
        ({"held_out_tokens": 320000}, "tokens of"),
        ({"hidden_size": 18}, "--hidden_size 18 must be a multiple of twice --heads"),
        ({"vocab_size": 4096}, "and --vocab_size is 4096"),
        ({"vocab_size": 100}, "Bytes and special tokens alone are 260"),
        ({"encodings": "rotary"}, "There is no encoding 'rotary'; choose from alibi, rope"),
        ({"encodings": ["alibi", "alibi"]}, "must name each encoding once"),
        ({"seeds": [1, 1]}, "must name each seed once"),
        ({"seeds": [-1]}, "--seeds -1 must be at least 0"),
        ({"attention": "nonsense"}, "attn_implementation='nonsense'"),
        ({"device": "cuda:1"}, "--device cuda:1 is neither cpu nor cuda"),
        ({"tokens_per_step": 16000}, "tokens are to train on, and --tokens_per_step is 16000"),
        ({"jobs": 0}, "--jobs 0 is too small"),
        ({"learning_rate": 0}, "--learning_rate 0.0 must be positive"),
        ({"dropout": 1}, "--dropout 1.0 must be"),
        ({"text": "/no/such/text.txt"}, "/no/such/text.txt"),
    ],
)
def test_bad_input_ends_with_one_line(options, words, text, tmp_path, capsys):
    status, error = run_main({"text": text, **options}, tmp_path / "out", capsys)
    assert status == 2 and words in error and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_setting_needs_a_gpu(text, tmp_path, capsys):
    status, error = run_main({"setting": "gpu", "text": text}, tmp_path / "out", capsys)
    assert status == 2 and "--device cuda needs a GPU" in error


def test_the_gpu_setting_is_of_the_size_it_says():
    _, settings = parse(["--setting", "gpu", "--device", "cpu"])
    settings.check()
    assert settings.lengths[1] == 512 and settings.lengths[-1] == 16384
    assert settings.steps * settings.tokens_per_step == pytest.approx(50e6, rel=0.01)
    with torch.device("meta"):
        model = build_model(Run("alibi", 512, 0), replace(settings, device="meta"), attention="sdpa")
    assert model.num_parameters() == pytest.approx(15e6, rel=0.1)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 1, "runs": []}', '{"schema_version": 99}'])
def test_a_broken_file_of_results_is_neither_used_nor_touched(content, text, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    status, error = run_main({"text": text}, tmp_path, capsys)
    assert status == 2 and "is not a file of results" in error
    assert (tmp_path / "results.json").read_text() == content


def test_results_of_other_settings_are_not_mixed(text, tmp_path, capsys):
    described = {"length": 8, "device": "cpu"}
    Results.open(tmp_path, described, overwrite=False).add(Run("alibi", 8, 0), {"readings": []})
    again = Results.open(tmp_path, described, overwrite=False)
    assert again.missing([Run("alibi", 8, 0), Run("alibi", 8, 1)]) == [Run("alibi", 8, 1)]
    with pytest.raises(ValueError, match="was made with length=8, and this run has length=16"):
        Results.open(tmp_path, {**described, "length": 16}, overwrite=False)
    assert Results.open(tmp_path, {**described, "length": 16}, overwrite=True).runs == []


def run_main(options, output, capsys):
    """Run the example on tiny settings; returns its status and the one line it printed on stderr."""
    arguments = ["--setting", str(options.pop("setting", "tiny")), "--output", str(output)]
    for name, value in options.items():
        arguments += [f"--{name}", *(str(each) for each in (value if isinstance(value, list) else [value]))]
    status = main(arguments)
    error = capsys.readouterr().err.strip()
    assert error.startswith("train_short_test_long.py: ") and "\n" not in error
    return status, error
