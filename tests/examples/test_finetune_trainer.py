"""`finetune_trainer.py` on tiny settings: it learns, saves what loads anywhere, and goes on where it stopped."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainerState
from transformers.trainer_jit_checkpoint import CheckpointManager

import finetune_trainer
from alibi_hf import AlibiForCausalLM
from alibi_hf.evaluation import perplexity
from alibi_trainer import evaluations
from tests.all_families import FAMILIES
from tests.builders import tokenizer, write
from tests.examples.finetuning import ROOT, TINY, write_checkpoint, write_text
from texts import as_stream, load_texts, sample_evenly

STEPS = ["--max_steps", "6", "--save_steps", "2", "--eval_steps", "3"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `checkpoint/`, which has dropout, and `text/`."""
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder / "checkpoint", hidden_dropout=0.1)
    write_text(folder / "text")
    return folder


def run(source: Path, output: Path, *arguments: str, status: int = 0) -> None:
    names = ["--model", str(source / "checkpoint"), "--text", str(source / "text"), "--output_dir", str(output)]
    assert finetune_trainer.main([*names, *TINY, *STEPS, *arguments]) == status


@pytest.fixture(scope="module")
def straight(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    output = tmp_path_factory.mktemp("straight") / "run"
    run(source, output)
    return output


def curve(folder: Path) -> list[dict]:
    """Return the log history without what depends on the clock."""
    history = TrainerState.load_from_json(str(folder / "trainer_state.json")).log_history
    timed = ("runtime", "per_second", "train_loss", "flos")
    return [{k: v for k, v in entry.items() if not any(part in k for part in timed)} for entry in history]


def assert_same_run(found: Path, truth: Path) -> None:
    assert curve(found) == curve(truth)
    ours, theirs = load_file(found / "model.safetensors"), load_file(truth / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_learns_and_measures_perplexity_at_every_length(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(source, tmp_path / "run", "--max_steps", "20", "--save_strategy", "no", "--gradient_accumulation_steps", "2")
    table = capsys.readouterr().out
    history = curve(tmp_path / "run")
    measured = {entry["step"]: entry for entry in history if "eval_loss" in entry}
    assert sorted(measured) == [0, 3, 6, 9, 12, 15, 18, 20]
    for key in ("eval_loss", "eval_perplexity_16", "eval_perplexity_48"):
        assert measured[20][key] < 0.9 * measured[0][key], key
    assert f"{measured[0]['eval_perplexity_48']:.2f}" in table and f"{measured[20]['eval_perplexity_48']:.2f}" in table

    text = as_stream(AutoTokenizer.from_pretrained(tmp_path / "run"), load_texts(str(source / "text")).held_out)
    model = AlibiForCausalLM.from_pretrained(source / "checkpoint", dtype=torch.float32)
    for length in (16, 48):
        truth = perplexity(model, sample_evenly(text, 96, 48), length)
        assert measured[0][f"eval_perplexity_{length}"] == pytest.approx(truth, rel=1e-5)


@pytest.mark.slow
def test_what_it_saves_loads_and_writes_without_the_package(source: Path, straight: Path, tmp_path: Path) -> None:
    saved = AlibiForCausalLM.from_pretrained(straight)
    assert saved.config.use_cache and saved.config.max_position_embeddings == 24
    assert saved.generation_config.top_k == 7
    checkpoint = AlibiForCausalLM.from_pretrained(straight / "checkpoint-6")
    assert checkpoint.config.use_cache
    assert AutoTokenizer.from_pretrained(straight).chat_template is not None
    command = [sys.executable, ROOT / "examples" / "generate_without_package.py", straight, "60"]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(done.stdout)
    assert written["loaded"].startswith("transformers_modules") and written["tokens"] == 60


def test_a_stopped_run_goes_on_bit_for_bit_and_passes_over_a_broken_checkpoint(
    source: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stopped = tmp_path / "run"
    shutil.copytree(straight / "checkpoint-4", stopped / "checkpoint-4")
    shutil.copytree(straight / "checkpoint-6", stopped / "checkpoint-6")
    (stopped / "checkpoint-6" / "trainer_state.json").unlink()
    run(source, stopped, "--resume_from_checkpoint", "true")
    assert "Passing over" in (said := capsys.readouterr().err) and "checkpoint-6: it has no trainer_state.json" in said
    assert_same_run(stopped, straight)


@pytest.mark.parametrize("options", [["--gradient_checkpointing", "true"], ["--bf16", "true"]])
def test_checkpointing_changes_nothing_and_bfloat16_little(
    source: Path, straight: Path, tmp_path: Path, options: list[str]
) -> None:
    run(source, tmp_path / "run", "--save_strategy", "no", *options)
    truth = {entry["step"]: entry["loss"] for entry in curve(straight) if "loss" in entry}
    found = {entry["step"]: entry["loss"] for entry in curve(tmp_path / "run") if "loss" in entry}
    assert found == pytest.approx(truth, rel=0.05 if "--bf16" in options else 1e-5)
    assert (found == truth) is ("--bf16" not in options)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, number: signal.Signals
) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    write_text(tmp_path / "text")
    run(tmp_path, tmp_path / "straight", "--save_strategy", "no")
    monkeypatch.setattr(CheckpointManager.__init__, "__defaults__", (0,))  # Trainer waits 3 seconds before it saves
    step = Trainer.training_step

    def interrupted(trainer: Trainer, *args: object, **kwargs: object) -> torch.Tensor:
        if trainer.state.global_step == 3:
            signal.raise_signal(number)
            for thread in threading.enumerate():
                if isinstance(thread, threading.Timer):  # which asks for the checkpoint
                    thread.join()
        return step(trainer, *args, **kwargs)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Trainer, "training_step", interrupted)
    run(tmp_path, tmp_path / "run", "--save_strategy", "no", status=1)
    assert "--resume_from_checkpoint true" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not (tmp_path / "run" / "model.safetensors").exists()
    monkeypatch.setattr(Trainer, "training_step", step)
    run(tmp_path, tmp_path / "run", "--save_strategy", "no", "--resume_from_checkpoint", "last")
    assert_same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on_from_the_save_before(source: Path, straight: Path, tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "examples")!r})
import finetune_trainer
from transformers import Trainer
save = Trainer._save_rng_state  # after the weights and the optimizer
def die(trainer, folder):
    if trainer.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save(trainer, folder)
Trainer._save_rng_state = die
names = ["--model", {str(source / "checkpoint")!r}, "--text", {str(source / "text")!r}, "--output_dir", "run"]
finetune_trainer.main([*names, *{[*TINY, *STEPS]!r}])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").exists()
    run(source, tmp_path / "run", "--resume_from_checkpoint", "true")
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_a_step_and_keeps_its_scaling(family: str, tmp_path: Path) -> None:
    FAMILIES[family](tmp_path / "checkpoint")
    tokenizer(tmp_path / "checkpoint")
    write_text(tmp_path / "text", 4)
    before = AlibiForCausalLM.from_pretrained(tmp_path / "checkpoint").config
    run(tmp_path, tmp_path / "run", "--max_steps", "1", "--save_strategy", "no")
    after = AlibiForCausalLM.from_pretrained(tmp_path / "run").config
    for name in ("alibi_scaling", "alibi_slopes", "alibi_distance", "alibi_rounding", "use_cache"):
        assert getattr(after, name) == getattr(before, name), name
    losses = [entry["loss"] for entry in curve(tmp_path / "run") if "loss" in entry]
    assert len(losses) == 1 and math.isfinite(losses[0])


def break_state(folder: Path) -> None:
    (folder / "trainer_state.json").write_text('{"global_step": 4, "log_hi')


def break_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def break_optimizer(folder: Path) -> None:
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:1000])


def remove_optimizer(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


@pytest.mark.parametrize(
    "damage, says",
    [
        (break_state, "trainer_state.json is cut short"),
        (break_weights, "model.safetensors is not whole"),
        (break_optimizer, "optimizer.pt is not whole"),
        (remove_optimizer, "no optimizer state"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_what_is_wrong_with_it(
    source: Path, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture, damage: object, says: str
) -> None:
    broken = tmp_path / "checkpoint-4"
    shutil.copytree(straight / "checkpoint-4", broken)
    damage(broken)
    run(source, tmp_path / "run", "--resume_from_checkpoint", str(broken), status=2)
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--eval_lengths", "0"], "a window of 0 tokens"),
        (["--eval_lengths", "5000"], "fewer than one window of 5000"),
        (["--length", "1"], "length of 1 tokens"),
        (["--max_steps", "0"], "--max_steps 0 trains nothing"),
        (["--dtype", "int4"], "int4 is none of float32"),
        (["--model", "EMPTY"], "EMPTY"),
        (["--model", "NEW"], "llama"),
        (["--text", "EMPTY"], "holds no document"),
        (["--text", "BLANK"], "a.txt of .* is empty"),
        (["--resume_from_checkpoint", "true"], "no whole checkpoint"),
    ],
    ids=lambda value: "-".join(value)[2:] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], says: str
) -> None:
    for name in ("EMPTY", "BLANK", "NEW"):
        (tmp_path / name).mkdir()
    (tmp_path / "BLANK" / "a.txt").write_text("\n")
    write(tmp_path / "NEW", {"model_type": "llama"}, {"model.embed_tokens.weight": torch.zeros(3, 2)})
    given = [str(tmp_path / value) if value.isupper() else value for value in arguments]
    run(source, tmp_path / "run", *given, status=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("finetune_trainer.py: ") and re.search(says, error), error
    assert not (tmp_path / "run").exists()


def test_a_new_run_does_not_mix_with_an_earlier_one(
    source: Path, straight: Path, capsys: pytest.CaptureFixture
) -> None:
    files = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    run(source, straight, status=2)
    assert "holds checkpoint-6 of an earlier run" in capsys.readouterr().err
    assert files == {path: path.stat().st_mtime_ns for path in straight.rglob("*")}


def test_evaluations_are_read_from_a_log_history_by_length() -> None:
    entry = {"eval_loss": 1.0, "eval_perplexity_1024": 3.0, "eval_perplexity_256": 4.0, "step": 7}
    found = evaluations(TrainerState(log_history=[{"loss": 2.0, "step": 5}, entry]))
    assert found == {7: {256: 4.0, 1024: 3.0}} and list(found[7]) == [256, 1024]


def test_the_run_is_drawn(straight: Path, tmp_path: Path) -> None:
    import plot_loss

    plot_loss.main([str(straight), str(tmp_path / "loss.png")])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"no .*trainer_state\.json"):
        plot_loss.main([str(tmp_path), str(tmp_path / "other.png")])
    assert not (tmp_path / "other.png").exists()
