"""`examples/finetune_lora.py` on tiny checkpoints: train, merge, export, and what it says to bad input."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("peft")
from peft import PeftModel

from alibi_hf import AlibiForCausalLM
from tests import builders
from tests.all_families import FAMILIES
from tests.model.cases import assert_close

ROOT = Path(__file__).resolve().parents[2]
TEXT = "My fellow citizens, the state of our Union is strong. "
TOKENS = builders.ids(1, 60)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with its siblings importable."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("finetune_lora")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with documents of mixed length."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(TEXT * (1 + number % 4))
    return folder


def arguments(family: str, tmp_path: Path, texts: Path, *more: str) -> list[str]:
    """Return a short run on a tiny checkpoint of `family`, with a tokenizer of one token a character."""
    folder = builders.tokenizer(FAMILIES[family](tmp_path / family))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "~"
    tokenizer.save_pretrained(folder)
    output = tmp_path / "output"
    given = ["--model", folder, "--text", texts, "--output_dir", output, "--length", 48, "--max_steps", 8]
    settings = ["--learning_rate", 0.02, "--rank", 4, "--disable_tqdm", "true", "--use_cpu", "true"]
    return [str(value) for value in (*given, *settings, *more)]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_train_merge_export_reload(
    family: str, example: ModuleType, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(arguments(family, tmp_path, texts)) == 0
    output = tmp_path / "output"
    base = AlibiForCausalLM.from_pretrained(tmp_path / family)
    merged = logits(AlibiForCausalLM.from_pretrained(output / "merged"))
    upstream = AutoModelForCausalLM.from_pretrained(output / "exported")
    assert type(upstream).__module__.startswith(f"transformers.models.{family}")
    assert_close(logits(upstream), merged, 1e-5)
    assert not torch.allclose(logits(base), merged, rtol=0.01, atol=0.01)
    assert_close(logits(PeftModel.from_pretrained(base, output / "adapter")), merged, 1e-5)

    figures = [line.split() for line in capsys.readouterr().out.splitlines()]
    before, after = (float(line[-1]) for line in figures if line[:2] == ["held-out", "perplexity,"])
    assert after < 0.9 * before
    differences = [float(line[-4]) for line in figures if line[:1] == ["logits,"]]
    assert len(differences) == 2 and max(differences) < 1e-5


def test_a_family_without_an_own_target_is_merged_and_not_exported(
    example: ModuleType, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(arguments("refact", tmp_path, texts)) == 0
    assert "Not exported: name a layout with --export_to." in capsys.readouterr().out
    assert (tmp_path / "output" / "merged" / "config.json").is_file()
    assert not (tmp_path / "output" / "exported").exists()


def test_an_export_that_cannot_be_is_one_line_and_leaves_the_rest(
    example: ModuleType, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example.main(arguments("refact", tmp_path, texts, "--export_to", "bloom")) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("finetune_lora.py: adapter and merged model are saved, not exported: ")
    assert (tmp_path / "output" / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "output" / "exported").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--length", "100000"], "--length 100000 must be 2 to "),
        (["--length", "1"], "--length 1 must be 2 to "),
        (["--text", "no-such-dataset-anywhere"], "no-such-dataset-anywhere"),
        (["--model", "./no-such-folder"], "./no-such-folder"),
        (["--target_modules", "query_key_value"], "query_key_value"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    changed: list[str],
    message: str,
    example: ModuleType,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert example.main(arguments("bloom", tmp_path, texts, *changed)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("finetune_lora.py: ") and message in line
    assert not (tmp_path / "output").exists()
