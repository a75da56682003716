"""`finetune_lora.py` on tiny settings: train, merge, export, reload, and what it says to bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import finetune_lora
from alibi_hf import AlibiForCausalLM
from tests import builders
from tests.all_families import FAMILIES
from tests.examples.finetuning import TINY, write_text
from tests.model.cases import assert_close

TOKENS = builders.ids(1, 60)


def run(family: str, folder: Path, *more: str) -> int:
    """Run the script on a tiny checkpoint of `family`; everything lies in `folder`."""
    model = builders.tokenizer(FAMILIES[family](folder / family))
    given = ["--model", str(model), "--text", str(write_text(folder / "text")), "--output_dir", str(folder / "output")]
    return finetune_lora.main([*given, *TINY, "--max_steps", "8", "--learning_rate", "0.02", "--rank", "4", *more])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_train_merge_export_reload(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(family, tmp_path) == 0
    output = tmp_path / "output"
    base = AlibiForCausalLM.from_pretrained(tmp_path / family)
    merged = AlibiForCausalLM.from_pretrained(output / "merged")
    assert merged.config.use_cache
    upstream = AutoModelForCausalLM.from_pretrained(output / "exported")
    assert type(upstream).__module__.startswith(f"transformers.models.{family}")
    assert_close(logits(upstream), logits(merged), 1e-5)
    assert not torch.allclose(logits(base), logits(merged), rtol=0.01, atol=0.01)
    assert_close(logits(PeftModel.from_pretrained(base, output)), logits(merged), 1e-5)

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    perplexities = [[float(value) for value in line[-2:]] for line in lines if line[:1] in (["before"], ["after"])]
    assert all(after < 0.9 * before for before, after in zip(perplexities[0], perplexities[-1], strict=True))
    differences = [float(line[-1]) for line in lines if line[-2:-1] in (["adapted"], ["merged"])]
    assert len(differences) == 2 and max(differences) < 1e-5


def test_a_family_without_a_target_of_its_own_is_merged_and_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("refact", tmp_path) == 0
    assert "Not exported: name a layout with --export_to." in capsys.readouterr().out
    assert (tmp_path / "output" / "merged" / "config.json").is_file()
    assert not (tmp_path / "output" / "exported").exists()


def test_scaling_by_length_is_in_the_merged_model_again(tmp_path: Path) -> None:
    scaling = {"type": "linear", "train_seq_len": 64}
    model = AlibiForCausalLM.from_pretrained(builders.tokenizer(FAMILIES["bloom"](tmp_path / "bloom")))
    model.config.alibi_scaling, model.config.alibi_rounding = scaling, "exact"
    model.save_pretrained(tmp_path / "own")
    builders.tokenizer(tmp_path / "own")
    given = ["--model", str(tmp_path / "own"), "--text", str(write_text(tmp_path / "text"))]
    assert finetune_lora.main([*given, *TINY, "--max_steps", "2", "--output_dir", str(tmp_path / "output")]) == 0
    assert AlibiForCausalLM.from_pretrained(tmp_path / "output" / "merged").config.alibi_scaling == scaling


def test_an_export_that_cannot_be_is_one_line_and_leaves_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("refact", tmp_path, "--export_to", "bloom") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("finetune_lora.py: adapter and merged model are saved, not exported: ")
    assert (tmp_path / "output" / "adapter_config.json").is_file()
    assert not (tmp_path / "output" / "exported").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--length", "1"], "A length of 1 tokens"),
        (["--eval_lengths", "100000"], "fewer than one window of 100000"),
        (["--target_modules", "query_key_value"], "query_key_value"),
        (["--rank", "0"], "`r` should be a positive integer"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    changed: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("bloom", tmp_path, *changed) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("finetune_lora.py: ") and message in line
    assert not (tmp_path / "output").exists()
