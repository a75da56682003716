"""`examples/finetune_heads.py`: the tasks made by rule, what the heads read, whole runs, and bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests import builders

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))  # the examples import each other as a script does

import finetune_heads
from encoding import AnswerCollator, encode
from scores import choose, entities, entity_f1, scorer
from tasks import period_rows, question_rows, tagged_row

TASKS = ("classification", "tokens", "question-answering")
SHIPPED = ROOT / "examples" / "checkpoints" / "sotu-bloom"
QUESTION = {"question": "When?", "context": "It cost $5 in 1853.", "answers": {"text": ["1853"], "answer_start": [14]}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches out of the user's folders."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shipped() -> Any:
    return AutoTokenizer.from_pretrained(SHIPPED, padding_side="right")


def test_what_the_labels_were_read_from_is_hidden() -> None:
    row = tagged_row("The Congress of Mexico gave $3,000,000 and $5 million in 1853, and I saw 12 men. Peace came.")
    assert list(zip(row["tokens"], row["ner_tags"], strict=True))[:13] == [
        ("the", "O"),
        ("congress", "B-NAME"),
        ("of", "O"),
        ("mexico", "B-NAME"),
        ("gave", "O"),
        ("0", "B-MONEY"),
        ("and", "O"),
        ("0", "B-MONEY"),
        ("million", "I-MONEY"),
        ("in", "O"),
        ("0", "B-YEAR"),
        (",", "O"),
        ("and", "O"),
    ]
    paragraph = "In 1853 the people of the United States were at peace with all nations of the world."
    (row,) = period_rows(f"A heading\n\n{paragraph}", 1853)
    assert row == {"text": paragraph.replace("1853", "0000"), "label": "1850-1899"}


def test_the_question_decides_which_number_is_the_answer() -> None:
    text = (
        "It was in 1853. The sum was $2,000. About 7 per cent were lost. In 1854 there were 12 ships. Then 1855 came."
    )
    rows = question_rows(text, 1860)
    assert [(row["question"], row["answers"]["text"][0]) for row in rows][:3] == [
        ("When?", "1853"),
        ("How much?", "$2,000"),
        ("What share?", "7 per cent"),
    ]
    for row in rows:
        start, answer = row["answers"]["answer_start"][0], row["answers"]["text"][0]
        assert row["context"][start : start + len(answer)] == answer


def test_a_tag_sits_at_the_last_piece_of_its_word(shipped: Any) -> None:
    row = {"tokens": ["the", "washington", "treaty"], "ner_tags": ["O", "B-NAME", "O"]}
    (encoded,) = encode("tokens", [row], shipped, 64, ["B-NAME", "O"])
    pieces = shipped.convert_ids_to_tokens(encoded["input_ids"])
    tagged = [(piece, label) for piece, label in zip(pieces, encoded["labels"], strict=True) if label != -100]
    assert len(pieces) > 3 and len(tagged) == 3, pieces
    assert [label for _, label in tagged] == [1, 0, 1]
    assert tagged[1][0] == "ton"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_answer_stays_with_its_text_where_rows_are_padded(side: str, shipped: Any) -> None:
    longer = {**QUESTION, "context": "My fellow citizens, long ago. It cost $5 in 1853."}
    longer["answers"] = {"text": ["$5"], "answer_start": [longer["context"].index("$5")]}
    shipped.padding_side = side
    batch = AnswerCollator(shipped)(list(encode("question-answering", [QUESTION, longer], shipped, 64, [])))
    found = [
        shipped.decode(ids[start : end + 1]).strip()
        for ids, start, end in zip(batch["input_ids"], batch["start_positions"], batch["end_positions"], strict=True)
    ]
    assert found == ["1853", "$5"]
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()


def test_the_best_span_is_in_order_and_not_too_long() -> None:
    starts, ends = torch.zeros(2, 50), torch.zeros(2, 50)
    starts[0, 7], ends[0, 5], ends[0, 9] = 3.0, 3.0, 2.0  # the best end comes before the best start
    starts[1, 2], ends[1, 45], ends[1, 4] = 3.0, 3.0, 2.0  # the best end is 44 tokens away
    assert choose((starts, ends), None).tolist() == [[7, 9], [2, 4]]
    assert choose(torch.tensor([[0.0, 2.0, 1.0]]), None).tolist() == [1]


def test_scores() -> None:
    tags = ["B-NAME", "I-NAME", "O", "I-YEAR", "B-NAME", "B-NAME"]
    assert entities(tags) == {("NAME", 0, 1), ("YEAR", 3, 3), ("NAME", 4, 4), ("NAME", 5, 5)}
    assert entity_f1([(["B-NAME", "O"], ["B-NAME", "I-NAME"])]) == 0.0  # half an entity is none
    assert entity_f1([(tags, tags), (["O"], ["B-NAME"])]) == pytest.approx(8 / 9)
    assert entity_f1([(["O"], ["O"])]) == 0.0
    outcome = SimpleNamespace(predictions=np.array([[1, 2], [3, 4]]), label_ids=(np.array([1, 3]), np.array([2, 5])))
    assert scorer("question-answering", [])(outcome) == {"exact_match": 0.5}
    ids = SimpleNamespace(predictions=np.array([[0, 1, 1]]), label_ids=np.array([[0, -100, 1]]))
    assert scorer("tokens", ["B-NAME", "O"])(ids) == {"f1": 1.0}


def made_rows(task: str, count: int = 200) -> list[dict[str, Any]]:
    """Return rows that a tiny model learns in a few steps, one token a character."""
    generator, rows = np.random.default_rng(0), []
    for _ in range(count):
        word = "".join(generator.choice(list("abcdefgh"), 8))
        place = int(generator.integers(8))
        marked = word[:place] + "!" + word[place:]
        rows.append(
            {
                "classification": {"text": word, "label": "early" if word[-1] in "abcd" else "late"},
                "tokens": {"tokens": list(word), "ner_tags": ["B-X" if c in "abcd" else "O" for c in "x" + word[:-1]]},
                "question-answering": {
                    "question": "?",
                    "context": marked,
                    "answers": {"text": ["!"], "answer_start": [place]},
                },
            }[task]
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BLOOM checkpoint as upstream publishes it, with a tokenizer of one token a character."""
    folder = tmp_path_factory.mktemp("tiny") / "bloom"
    return str(builders.tokenizer(builders.bloom(folder, raw={"pad_token_id": 1})))


# Runs where the package is hidden; writes JSON.
WORKER = """
import json, pathlib, sys
sys.modules["alibi_hf"] = None
import torch, transformers
found = {}
for auto, pipe, folder, text in json.loads(sys.argv[1]):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))[0]
    found[auto] = {"logits": logits.tolist(), "config": model.config.id2label}
    if pipe:
        answer = transformers.pipeline(pipe, model=folder, trust_remote_code=True)(text)
        found[auto]["pipe"] = [each.get("label", each.get("entity")) for each in answer]
pathlib.Path("found.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_whole_runs_load_and_answer_without_the_package(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, heads, settings = {}, [], ["--max_steps", "60", "--learning_rate", "1e-2", "--disable_tqdm", "true"]
    autos = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")
    for task, auto, pipe in zip(TASKS, autos, ("text-classification", "token-classification", None), strict=True):
        data, output = write_rows(tmp_path / f"{task}.jsonl", made_rows(task)), str(tmp_path / task)
        given = ["--task", task, "--model", tiny, "--data", data, "--output_dir", output, "--use_cpu", "true"]
        assert finetune_heads.main([*given, *settings]) == 0
        name, before, after, baseline = capsys.readouterr().out.splitlines()[-2].split()
        figures[name] = (float(before), float(after), float(baseline))
        heads.append((auto, pipe, output, "abcdefga"))
    for name, (before, after, baseline) in figures.items():
        assert after > 0.9 and after > max(before, baseline) + 0.1, (name, figures)

    command = [sys.executable, "-c", WORKER, json.dumps(heads)]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    for (auto, pipe, folder, text), task in zip(heads, TASKS, strict=True):
        model = finetune_heads.HEADS[task][0].from_pretrained(folder).eval()
        ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])
        logits = model(ids)[0].detach()
        torch.testing.assert_close(torch.tensor(found[auto]["logits"]), logits, rtol=1e-5, atol=1e-5)
        if pipe:
            chosen = [model.config.id2label[i] for i in logits.argmax(-1).flatten().tolist()]
            assert found[auto]["pipe"] == [label for label in chosen if label != "O"]  # which the pipeline leaves out
    assert found[autos[0]]["pipe"] == ["early"]


@pytest.mark.slow
def test_the_padding_side_changes_no_figure(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = made_rows("question-answering")
    for row in rows[::3]:
        row["question"] = "???"  # rows of two lengths
    data, tables = write_rows(tmp_path / "rows.jsonl", rows), []
    for side in ("left", "right"):
        given = ["--task", "question-answering", "--model", tiny, "--data", data, "--padding_side", side]
        settings = ["--max_steps", "12", "--learning_rate", "3e-3", "--use_cpu", "true", "--disable_tqdm", "true"]
        assert finetune_heads.main([*given, *settings, "--output_dir", str(tmp_path / side)]) == 0
        tables.append(capsys.readouterr().out.splitlines()[-3:])
    assert tables[0] == tables[1]


BAD = {
    "no label column": ("classification", [{"text": "a"}, {"text": "b"}], "has no column label, only text"),
    "an empty text": ("classification", [{"text": "", "label": "x"}] * 2, "Row 0 of .* has an empty text"),
    "one row": ("classification", [{"text": "a", "label": "x"}], "holds 1 row"),
    "an unknown label": (
        "classification",
        [{"text": "a", "label": "x"}] * 5 + [{"text": "a", "label": "y"}],
        "Row 0: label 'y' is in no training row; known are x",
    ),
    "a tag too few": ("tokens", [{"tokens": ["a", "b"], "ner_tags": ["O"]}] * 2, "Row 0: 2 words have 1 tags"),
    "another answer": (
        "question-answering",
        [{**QUESTION, "answers": {"text": ["1853"], "answer_start": [0]}}] * 2,
        "the answer is '1853', but the context has 'It c' at character 0",
    ),
    "an answer past the length": (
        "question-answering",
        [{**QUESTION, "context": "x" * 300 + "1853", "answers": {"text": ["1853"], "answer_start": [300]}}] * 2,
        "ends at character 304 of the context, past what fits in 256 tokens; raise --length",
    ),
}


@pytest.mark.parametrize("content", ["{not json", None])
def test_data_that_cannot_be_read_ends_with_one_line(content: str | None, tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "rows.jsonl"
    if content:
        data.write_text(content)
    given = ["--task", "classification", "--data", str(data), "--output_dir", str(tmp_path / "output")]
    assert finetune_heads.main(given) == 2
    assert str(data) in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_end_with_one_line(name: str, tiny: str, tmp_path: Path, capsys: Any) -> None:
    task, rows, message = BAD[name]
    data, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "output"
    assert finetune_heads.main(["--task", task, "--model", tiny, "--data", data, "--output_dir", str(output)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("finetune_heads.py: ") and re.search(message, last), last
    assert not output.exists()


@pytest.mark.parametrize(
    "more, says",
    [(["--resume_from_checkpoint", "true"], "no whole checkpoint"), (["--length", "0"], "--length 0 leaves nothing")],
)
def test_bad_settings_end_with_one_line(more: list[str], says: str, tiny: str, tmp_path: Path, capsys: Any) -> None:
    data, output = write_rows(tmp_path / "rows.jsonl", made_rows("classification")), tmp_path / "output"
    given = ["--task", "classification", "--model", tiny, "--data", data, "--output_dir", str(output)]
    assert finetune_heads.main([*given, *more]) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]
    assert not output.exists()


def test_a_checkpoint_of_no_known_family_ends_with_one_line(tmp_path: Path, capsys: Any) -> None:
    other = builders.write(tmp_path / "other", {"model_type": "gpt2"}, {"wte.weight": torch.zeros(4, 4)})
    builders.tokenizer(other)
    data = write_rows(tmp_path / "rows.jsonl", made_rows("classification"))
    given = ["--task", "classification", "--model", str(other), "--data", data]
    assert finetune_heads.main([*given, "--output_dir", str(tmp_path / "output")]) == 2
    assert "gpt2" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "output").exists()
