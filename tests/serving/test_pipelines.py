"""Pipelines and continuous batching with converted folders, by the package and by the folder's own code.

Batched with padding, and past the training length, each answer is that of a float64 model that reads the text alone.
Transformers 5 has no question-answering pipeline.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import alibi_hf
from tests.builders import bloom, fill, tokenizer
from tests.checkpoints.exporting import bend_bias
from tests.model.cases import assert_close
from tests.serving import asked

TEXTS = ["My fellow citizens of the Senate", "Peace.", "The state of the Union is strong, and our people are free."]
TRAINED = 16  # tokens, of one character each
HEADS = {
    "text-classification": alibi_hf.AlibiForSequenceClassification,
    "token-classification": alibi_hf.AlibiForTokenClassification,
    "feature-extraction": alibi_hf.AlibiModel,
}
BOUND = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a folder for each task: one converted, the others saved with a head of their own."""
    root = tmp_path_factory.mktemp("folders")
    source = tokenizer(
        bloom(root / "source", tie=False, raw={"seq_length": TRAINED, "pad_token_id": 1, "eos_token_id": 0})
    )
    alibi_hf.convert(source, root / "text-generation", verify=False)
    for task, head in HEADS.items():
        labels = {} if task == "feature-extraction" else {"num_labels": 3}
        fill(head.from_pretrained(root / "text-generation", **labels), seed=3).save_pretrained(root / task)
        tokenizer(root / task)
    return {task: str(root / task) for task in asked.OPTIONS}


@pytest.fixture(scope="module")
def without_package(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a process answers that has only the folders' own code."""
    work = tmp_path_factory.mktemp("work")
    torch.save({"folders": folders, "texts": TEXTS}, work / "given.pt")
    command = [sys.executable, asked.__file__, str(work / "given.pt"), str(work / "found.pt")]
    environment = os.environ | {"HF_MODULES_CACHE": str(work / "modules")}
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(work / "found.pt", weights_only=False)


def exact(cls: Any, folder: str) -> Any:
    return cls.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


@torch.no_grad()
def truth(folders: dict[str, str], task: str) -> list[torch.Tensor]:
    """Return what a float64 model says to each text alone."""
    read, model = AutoTokenizer.from_pretrained(folders[task]), exact(HEADS[task], folders[task])
    return [model(read(text, return_tensors="pt")["input_ids"])[0][0] for text in TEXTS]


@torch.no_grad()
def greedy(folders: dict[str, str]) -> list[list[int]]:
    """Return what follows each text, by a float64 model that reads everything again for every token."""
    folder = folders["text-generation"]
    read, model, written = AutoTokenizer.from_pretrained(folder), exact(alibi_hf.AlibiForCausalLM, folder), []
    for text in TEXTS:
        prompt = ids = read(text, return_tensors="pt")["input_ids"]
        for _ in range(asked.OPTIONS["text-generation"]["max_new_tokens"]):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        written.append(ids[0, prompt.shape[1] :].tolist())
    assert all(len(set(tokens)) > 2 for tokens in written)
    return written


def check(answers: dict[str, list[Any]], folders: dict[str, str]) -> None:
    """Assert that every task answers as the float64 models do, one by one and batched."""
    read, expected = AutoTokenizer.from_pretrained(folders["text-generation"]), greedy(folders)
    for rows in answers["text-generation"]:
        for text, row, tokens in zip(TEXTS, rows, expected, strict=True):
            kept = [token for token in row[0]["generated_token_ids"] if token != read.pad_token_id]
            assert kept == read(text)["input_ids"] + tokens
    for rows in answers["text-classification"]:
        found = torch.tensor([[each["score"] for each in sorted(row, key=lambda one: one["label"])] for row in rows])
        assert_close(found, torch.stack(truth(folders, "text-classification")), BOUND)
    for rows in answers["token-classification"]:
        for row, logits in zip(rows, truth(folders, "token-classification"), strict=True):
            best = logits.softmax(-1).max(-1)
            assert [each["entity"] for each in row] == [f"LABEL_{label}" for label in best.indices]
            assert_close(torch.tensor([float(each["score"]) for each in row]), best.values, BOUND)
    for rows in answers["feature-extraction"]:
        for row, states in zip(rows, truth(folders, "feature-extraction"), strict=True):
            assert_close(torch.tensor(row[0])[: len(states)], states, BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_with_the_package_and_a_wrong_bias_is_noticed(
    folders: dict[str, str], factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = asked.ask_pipelines(folders, TEXTS)
    check(answers, folders)
    bend_bias(monkeypatch, factor)  # of the models that the answers are compared with
    for task in asked.OPTIONS:
        with pytest.raises(AssertionError):
            check({name: answers[task] if name == task else [] for name in asked.OPTIONS}, folders)


@pytest.mark.slow
def test_without_the_package(folders: dict[str, str], without_package: dict[str, Any]) -> None:
    check(without_package["pipelines"], folders)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_continuous_batching_without_the_package(
    folders: dict[str, str], without_package: dict[str, Any], backend: str
) -> None:
    assert without_package["batching"][backend] == greedy(folders)
