"""How well a second model expects a text: its perplexity, and bits per byte, piece by piece.

The judge reads in windows of the length it was trained at, which overlap by half: it never reads past its own training
length, and each token but those of the first window has at least half a window of context. Tokenizers may differ: the
judge is given text, and bits per byte can be compared between judges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from alibi_hf import AlibiForCausalLM, UnknownFamilyError
from alibi_hf.evaluation.reading import find_position_table

LOGITS = 2**26  # how many numbers are computed at once: 256 MiB


@dataclass(frozen=True)
class Verdict:
    """What the judge makes of one piece of a text.

    Attributes:
        perplexity: by its own tokens.
        bits_per_byte: of the UTF-8 text.
    """

    perplexity: float
    bits_per_byte: float


def load(path: str) -> tuple[Any, Any]:
    """Return model and tokenizer, in float32: this package's class for any ALiBi checkpoint, else Transformers' own.

    Raises:
        OSError, ValueError: where there is no such checkpoint, or it cannot be read.
    """
    try:
        model = AlibiForCausalLM.from_pretrained(path, dtype=torch.float32)
    except UnknownFamilyError:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


class Judge:
    """A causal model that reads texts in windows.

    Args:
        model, tokenizer: as `load` returns them.
        window: tokens that it reads at once; its training length if not given.

    Raises:
        ValueError: where the model does not say at what length it was trained, and `window` does not either; a window
            of fewer than two tokens, or of more than its table of positions has.
    """

    def __init__(self, model: Any, tokenizer: Any, window: int | None = None) -> None:
        window = getattr(model.config, "max_position_embeddings", None) if window is None else window
        if window is None:
            raise ValueError(f"{type(model.config).__name__} names no training length; say what window to read in.")
        if window < 2:
            raise ValueError(f"A window of {window} tokens has nothing to predict; give at least 2.")
        table = find_position_table(model)
        if table is not None and window > table[1]:
            raise ValueError(f"A window of {window} tokens: {table[0]} of the judge has {table[1]} positions.")
        self.model, self.tokenizer, self.window = model, tokenizer, window

    def read(self, pieces: Sequence[str]) -> list[Verdict]:
        """Return a verdict for each of the consecutive pieces of one text; a piece is the context of the next.

        Raises:
            ValueError: where the judge has nothing to predict in a piece.
        """
        ids = [self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in pieces]
        for index, tokens in enumerate(ids):
            if len(tokens) < (2 if index == 0 else 1):  # the first token of all is not predicted
                raise ValueError(f"The judge has nothing to predict in {pieces[index]!r}, piece {index} of the text.")
        losses = self.losses(torch.tensor([token for piece in ids for token in piece]))
        verdicts, stop = [], 0
        for piece, tokens in zip(pieces, ids, strict=True):
            start, stop = stop, stop + len(tokens)
            found = losses[max(start, 1) : stop]
            bits = float(found.sum()) / math.log(2) / len(piece.encode())
            verdicts.append(Verdict(float(found.double().mean().exp()), bits))
        return verdicts

    @torch.no_grad()
    def losses(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the loss of each token in nats, float32 `[tokens]`; NaN for the first, which has no context."""
        losses = torch.full((len(tokens),), math.nan)
        window, new = min(self.window, len(tokens)), (self.window + 1) // 2
        starts = [*range(0, len(tokens) - window, new), len(tokens) - window]
        known = 1  # tokens whose loss is known, or that have none
        for group in torch.tensor(starts).split(max(1, LOGITS // (window * self.model.config.vocab_size))):
            rows = torch.stack([tokens[start : start + window] for start in group.tolist()])
            logits = self.model(input_ids=rows.to(self.model.device), use_cache=False).logits[:, :-1].float().cpu()
            found = cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
            for start, row in zip(group.tolist(), found, strict=True):
                losses[known : start + window] = row[known - start - 1 :]
                known = start + window
        return losses
