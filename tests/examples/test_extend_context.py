"""`extend_context.py` on tiny settings: both runs start from the same weights, and scaling is what it says."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import extend_context
from alibi_hf import AlibiForCausalLM
from alibi_hf.evaluation import perplexity_by_length
from alibi_hf.model.bias_alibi import alibi_slopes
from tests.examples.finetuning import TINY, write_checkpoint, write_text
from texts import as_stream, load_texts, sample_evenly

LENGTHS = [16, 48]
FACTOR = 1.5  # from 16 tokens to 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder / "checkpoint")
    write_text(folder / "text")
    return folder


def run(source: Path, output: Path, *arguments: str) -> int:
    names = ["--model", str(source / "checkpoint"), "--text", str(source / "text"), "--output_dir", str(output)]
    return extend_context.main([*names, *TINY, "--max_steps", "6", *arguments])


def test_both_runs_learn_and_the_slopes_are_divided(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(source, tmp_path / "run", "--csv", str(tmp_path / "table.csv")) == 0
    with open(tmp_path / "table.csv", newline="") as file:
        table = {(row["slopes"], int(row["tokens"])): float(row["perplexity"]) for row in csv.DictReader(file)}
    before, after = "as they were, before", "as they were, after 6 steps"
    scaled_before, scaled_after = "divided by 1.5, before", "divided by 1.5, after 6 steps"
    assert set(table) == {(name, n) for name in (before, after, scaled_before, scaled_after) for n in LENGTHS}
    said = capsys.readouterr().out
    assert all(name in said for name in (before, after, scaled_before, scaled_after))

    model = AlibiForCausalLM.from_pretrained(source / "checkpoint", dtype=torch.float32)
    text = as_stream(AutoTokenizer.from_pretrained(source / "checkpoint"), load_texts(str(source / "text")).held_out)
    text = sample_evenly(text, 96, 48)
    for name, factor in ((before, 1.0), (scaled_before, FACTOR)):
        model.config.alibi_slopes = [slope / factor for slope in alibi_slopes(6)]
        for length, truth in perplexity_by_length(model, text, LENGTHS).items():
            assert table[name, length] == pytest.approx(truth, rel=1e-5), (name, length)
    assert table[before, 48] != pytest.approx(table[scaled_before, 48], rel=1e-3)
    for length in LENGTHS:
        assert table[after, length] < 0.7 * table[before, length]
        assert table[scaled_after, length] < 0.7 * table[scaled_before, length]


def test_what_it_saves_keeps_its_scaling_and_the_new_length(source: Path, tmp_path: Path) -> None:
    assert run(source, tmp_path / "run", "--max_steps", "1") == 0
    plain, scaled = (AlibiForCausalLM.from_pretrained(tmp_path / "run" / name) for name in ("as-they-were", "scaled"))
    assert (plain.config.alibi_scaling, scaled.config.alibi_scaling) == (None, {"type": "linear", "factor": FACTOR})
    assert plain.config.max_position_embeddings == scaled.config.max_position_embeddings == 24


@pytest.mark.parametrize(
    "arguments, changes, says",
    [
        (["--length", "16"], {}, "does not extend a model trained at 16"),
        (["--eval_lengths", "0"], {}, "a window of 0 tokens"),
        (["--max_steps", "0"], {}, "trains nothing"),
        (["--csv", f"{__file__}/table.csv"], {}, "exists|Not a directory"),
        ([], {"alibi_scaling": {"type": "linear", "factor": 2.0}}, "alibi_scaling=.* already"),
    ],
    ids=["length", "eval_lengths", "max_steps", "csv", "scaled"],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], changes: dict, says: str
) -> None:
    given = source
    if changes:
        given = tmp_path / "given"
        AlibiForCausalLM.from_pretrained(source / "checkpoint").save_pretrained(given / "checkpoint")
        config = json.loads((given / "checkpoint" / "config.json").read_text())
        (given / "checkpoint" / "config.json").write_text(json.dumps(config | changes))
        write_text(given / "text")
    capsys.readouterr()
    assert run(given, tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("extend_context.py: ") and re.search(says, error), error
    assert not (tmp_path / "run").exists()
