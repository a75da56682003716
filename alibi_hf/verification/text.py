"""The tokens that a verification runs on: real text if the checkpoint has a tokenizer, seeded random ids otherwise.

`sotu.txt` is Abraham Lincoln's annual message to Congress of 6 December 1864, a work of the United States government
in the public domain; it is one of the speeches that `examples/train_sotu.py` holds out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from alibi_hf.checkpoints.carried import require_own_tokenizer

SEED = 1108
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Tokens:
    """A stream of token ids [n] on the CPU, and where it comes from in words."""

    ids: torch.Tensor
    origin: str

    def rows(self, count: int, length: int) -> torch.Tensor:
        """Return `count` rows of `length` tokens, taken one after the other; the stream starts over where it ends."""
        index = torch.arange(count * length) % len(self.ids)
        return self.ids[index].view(count, length)


def default_text() -> str:
    """Return the text that ships with the package."""
    return (files("alibi_hf.verification") / "sotu.txt").read_text(encoding="utf-8")


def make_tokens(folder: str | os.PathLike, vocab_size: int, text: str | None = None) -> Tokens:
    """Tokenize `text` (default: the shipped one) with the tokenizer of `folder`.

    Without tokenizer files, or where the tokenizer does not fit the vocabulary, the ids are random with a fixed seed.
    """
    random = torch.randint(0, vocab_size, (8192,), generator=torch.Generator().manual_seed(SEED))
    if not any((Path(folder) / name).exists() for name in TOKENIZER_FILES):
        return Tokens(random, f"random ids, seed {SEED} (the checkpoint has no tokenizer)")
    from transformers import AutoTokenizer

    try:
        require_own_tokenizer(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = torch.tensor(tokenizer(text or default_text(), add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # one that needs remote code or a missing library, or is damaged: many kinds
        return Tokens(random, f"random ids, seed {SEED} (the tokenizer cannot be loaded: {type(error).__name__})")
    if len(ids) == 0 or int(ids.max()) >= vocab_size:
        return Tokens(random, f"random ids, seed {SEED} (the tokenizer gives ids outside the {vocab_size} rows)")
    origin = "given text" if text else "Lincoln's annual message of 1864"
    return Tokens(ids, f"{origin}, {len(ids)} tokens")
