"""The training benchmark at a tiny size: every recipe takes the same step, and one that does not is seen."""

import functools
import json
import math

import pytest
import torch

from benchmarks import training
from benchmarks.subjects import CONTENDERS, write_checkpoint
from benchmarks.timing import Timing
from benchmarks.training import RECIPES, Recipe, Run

TINY = ["--size", "tiny", "--threads", "1", "--repeats", "1", "--seconds", "0.01", "--no-memory", "--lengths", "48"]


@pytest.fixture
def run(tmp_path):
    folder = write_checkpoint("bloom", "tiny", 256, tmp_path)
    return Run("bloom", folder, "float32", autocast=False, optimizer=False, device="cpu", threads=1)


def step(run, recipe, without=()):
    """Return loss and norm of the gradients on documents, as the recipe reads them but for some inputs."""
    options = training.parse(["--size", "tiny", "--documents", "5", "--longest", "60", "--lengths", "40"])
    batches = {way: batch for _, ways in training.cases(options) for way, batch in ways.items()}
    batch = {name: value for name, value in batches[recipe.way].items() if name not in without}
    return training.make_step(run, recipe, batch)()


def test_command_writes_every_recipe(tmp_path):
    path = tmp_path / "training.json"
    training.main([*TINY, "--documents", "4", "--longest", "60", "--dtypes", "fp32", "bf16", "--output", str(path)])
    report = json.loads(path.read_text())
    rows = report["results"]
    found = [(row["model"], row["dtype"], row["task"], row["contender"], row["way"]) for row in rows]
    assert found == [
        (model, dtype, task, recipe.contender, recipe.way)
        for model in ("bloom", "mpt")
        for dtype in ("float32", "bfloat16")
        for task, recipes in RECIPES.items()
        for recipe in recipes
    ]
    assert not report["left_out"]
    for row in rows:
        assert row["times_faster"] > 0 and row["time_over_own"] > 0 and row["autocast"] == (row["dtype"] == "bfloat16")
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["median_ms"] * 1e3)
        assert (row["places"] > row["tokens"]) == (row["way"] == "padded")
        assert row["unlike_upstream"] < (1e-5 if row["dtype"] == "float32" else 0.02)


def test_another_step_would_be_seen(run, monkeypatch):
    """Losses and norms of upstream padded are those of ours packed; not without a bias, nor where documents leak."""
    monkeypatch.setitem(CONTENDERS, "no-alibi", {"alibi": False})
    truth = step(run, Recipe("upstream", "padded"))

    def unlike(contender, without=()):
        return float(((step(run, Recipe(contender, "packed"), without) - truth) / truth).abs().max())

    assert unlike("ours") < 1e-5
    assert unlike("no-alibi") > 1e-3
    assert unlike("ours", without=("position_ids",)) > 1e-3
    assert unlike("upstream") > 1e-3


def test_checkpointing_computes_layers_again(run):
    calls = []
    batch = {"input_ids": torch.ones(1, 9, dtype=torch.long), "labels": torch.ones(1, 9, dtype=torch.long)}
    for way in ("plain", "checkpointed"):
        call = training.make_step(run, Recipe("ours", way), batch)
        call.args[0].model.layers[0].mlp.register_forward_pre_hook(
            functools.partial(lambda w, *_: calls.append(w), way)
        )
        call()
        assert all(parameter.grad is None for parameter in call.args[0].parameters())
    assert calls == ["plain", "checkpointed", "checkpointed"]


def test_lengths_are_those_of_paragraphs():
    lengths = torch.tensor(training.document_lengths(20000, 10**6)).double()
    assert lengths.median().item() == pytest.approx(83, rel=0.03)
    assert lengths.log().std().item() == pytest.approx(0.95, rel=0.03)
    assert max(training.document_lengths(8, 100)) == 100
    assert training.document_lengths(8, 2048) == training.document_lengths(8, 2048)


def test_ratios_are_against_the_like():
    def timing(ratio):
        return Timing(0.0, 0.0, 0.0, ratio, 1, 1)

    ratios = {"upstream, plain": 1.0, "ours, plain": 0.5, "upstream, checkpointed": 1.5, "ours, checkpointed": 0.6}
    timings = {name: timing(ratio) for name, ratio in ratios.items()}
    found = training.comparison(Recipe("ours", "checkpointed"), RECIPES["step"], timings)
    assert found["times_faster"] == 2.5 and math.isclose(found["time_over_own"], 1.2)
    ratios = {"upstream, padded": 1.0, "ours, padded": 0.5, "ours, packed": 0.25}
    timings = {name: timing(ratio) for name, ratio in ratios.items()}
    found = training.comparison(Recipe("ours", "packed"), RECIPES["documents"], timings)
    assert found == {"times_faster": 4.0, "time_over_own": 0.5}


def test_peaks_are_given_for_each_recipe(run):
    batch = {"input_ids": torch.ones(1, 40, dtype=torch.long), "labels": torch.ones(1, 40, dtype=torch.long)}
    recipes = [Recipe("ours", "plain"), Recipe("ours", "checkpointed")]
    assert list(training.step_peaks(run, [(recipe, batch) for recipe in recipes])) == recipes
