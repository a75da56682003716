"""What the examples read: where from, what is held out, and what is refused."""

from pathlib import Path

import pytest
import torch

from texts import as_documents, as_stream, load_texts, sample_evenly


def words(texts: list[str], **_: object) -> dict[str, list[list[int]]]:
    """A tokenizer of numbers."""
    return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


TOKENIZER = type("Numbers", (), {"eos_token_id": 0, "__call__": lambda self, texts, **_: words(texts)})()


def write(folder: Path, texts: dict[str, str]) -> str:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def test_every_tenth_document_is_held_out_whole(tmp_path: Path) -> None:
    texts = load_texts(write(tmp_path, {f"{number:02d}.txt": f"text {number}" for number in range(23)}))
    assert texts.held_out_names == ["05.txt", "15.txt"]
    assert texts.held_out == ["text 5", "text 15"]
    assert len(texts.train) == 21 and not set(texts.train) & set(texts.held_out)


def test_docstrings_are_those_of_pythons_own_modules() -> None:
    texts = load_texts("docstrings")
    assert len(texts.train) > 100 and len(texts.held_out) > 10
    assert any("Wrap a single paragraph of text" in text for text in texts.train + texts.held_out)
    assert not any("def " in text.splitlines()[0] for text in texts.train)


@pytest.mark.parametrize("count", [2, 3])
def test_of_a_few_documents_one_is_held_out(tmp_path: Path, count: int) -> None:
    texts = load_texts(write(tmp_path, {f"{number}.txt": "text" for number in range(count)}))
    assert (len(texts.train), len(texts.held_out)) == (count - 1, 1)


def test_of_one_file_the_last_tenth_is_held_out(tmp_path: Path) -> None:
    write(tmp_path, {"only.md": "0123456789" * 3})
    texts = load_texts(str(tmp_path / "only.md"))
    assert (texts.train, texts.held_out) == (["0123456789" * 2 + "0123456"], ["789"])


@pytest.mark.parametrize(
    "name, content", [("a.jsonl", '{"body": "one"}\n{"body": "two"}\n'), ("a.csv", "body,n\none,1\ntwo,2\n")]
)
def test_datasets_are_read_by_column(tmp_path: Path, name: str, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path, {name: content})
    texts = load_texts(str(tmp_path / name), "body")
    assert texts.train + texts.held_out == ["one", "two"]
    with pytest.raises(ValueError, match="no column text, only body"):
        load_texts(str(tmp_path / name))


@pytest.mark.parametrize(
    "content, says",
    [
        ("{not json\n", "a.jsonl cannot be read: .*JSON"),
        ("", "a.jsonl cannot be read: it holds no row"),
        ('{"text": 5}\n', "row 0 of .*a.jsonl is 5, which is no text"),
        ('{"text": ["a"]}\n', "row 0 of .*a.jsonl is .*, which is no text"),
        ('{"text": "a"}\n{"text": ""}\n', "000000001 of .*a.jsonl is empty"),
    ],
)
def test_tables_without_texts_are_refused_by_name(
    tmp_path: Path, content: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path, {"a.jsonl": content})
    with pytest.raises(ValueError, match=says):
        load_texts(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("texts, says", [({"a.txt": "x", "b.txt": " \n"}, "b.txt.* is empty"), ({}, "no document")])
def test_nothing_to_read_is_refused(tmp_path: Path, texts: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_texts(write(tmp_path, texts))


def test_text_in_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="old.txt is not UTF-8"):
        load_texts(str(tmp_path / "old.txt"))


def test_documents_are_closed_and_cut_and_the_stream_is_all_of_them() -> None:
    texts = ["1 2 3 4 5", "6", "7 8"]
    assert as_documents(TOKENIZER, texts) == [[1, 2, 3, 4, 5, 0], [6, 0], [7, 8, 0]]
    assert as_documents(TOKENIZER, texts, longest=2) == [[1, 2], [3, 4], [5, 0], [6, 0], [7, 8], [0]]
    assert as_stream(TOKENIZER, texts).tolist() == [1, 2, 3, 4, 5, 0, 6, 0, 7, 8, 0]
    endless = type("Endless", (type(TOKENIZER),), {"eos_token_id": None})()
    assert as_documents(endless, texts) == [[1, 2, 3, 4, 5], [6], [7, 8]]


@pytest.mark.parametrize("tokens, piece, count", [(30, 10, 3), (39, 10, 3), (5, 10, 1), (1000, 10, 10), (100, 100, 1)])
def test_samples_come_from_all_over_the_text(tokens: int, piece: int, count: int) -> None:
    sample = sample_evenly(torch.arange(100), tokens, piece).view(count, piece)
    assert torch.equal(sample, sample[:, :1] + torch.arange(piece))
    if count > 1:
        assert (sample[0, 0], sample[-1, -1]) == (0, 99)
