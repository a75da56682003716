"""What both models are fed: rows of several lengths, a batch to pad, a row to decode, prompts, and a training batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alibi_hf.errors import AlibiError
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.verification.logits import kept_positions
from alibi_hf.verification.subjects import depends_on_call
from alibi_hf.verification.text import Tokens

LONGEST_ANCHOR = 2048  # decoding and generation happen around the training length, but not further out
LONGEST_PADDED = 512
STEPS = 24
TRAINING_LENGTH = 128
# Short rows and narrow models come in batches: an error figure taken from few numbers is luck.
NUMBERS = 2**18  # positions times width that a figure should rest on
MOST_POSITIONS = 8192
DECODE_POSITIONS = 2048
PARTS = (8, 5, 2)  # eighths of the longest row that the rows of the padded batch are long


def default_lengths(trained: int) -> tuple[int, ...]:
    """Return the lengths to compare at: within, at and beyond the training length, as far as that is no large run."""
    if trained > LONGEST_ANCHOR:
        return (LONGEST_ANCHOR // 4, LONGEST_ANCHOR)
    beyond = (2 * trained, 4 * trained) if trained <= 256 else (2 * trained if trained <= 1024 else trained * 3 // 2,)
    return tuple(sorted({max(2, trained // 4), max(2, trained), *beyond}))


@dataclass(frozen=True)
class Inputs:
    """Token ids, int64.

    Attributes:
        rows: `[batch, length]`, one for each length that is compared; the shorter, the more rows.
        padded: rows `[1, n_i]` of different lengths that become one left-padded batch; none where padding would change
            the answer (`depends_on_call`).
        decode: `[batch, prefill + steps]`: `prefill` tokens are read at once, the others one at a time; where the
            lengths allow, the training length lies in between.
        prompts: rows `[1, n_i]` that are continued by `STEPS` tokens, past the training length; of one length where
            padding would change the answer.
        training: `[2, length]`, for loss and gradients.
        pad: the id that fills padding; it is masked.
    """

    rows: list[torch.Tensor]
    padded: list[torch.Tensor]
    decode: torch.Tensor
    prefill: int
    prompts: list[torch.Tensor]
    training: torch.Tensor
    pad: int

    @property
    def longest(self) -> int:
        """The longest row of all, generated tokens included."""
        return max(self.rows[-1].shape[1], self.decode.shape[1], self.prompts[0].shape[1] + STEPS)

    @property
    def batches(self) -> list[tuple[int, int]]:
        """(rows, length) of every batch that is run without gradients."""
        padded = [(len(self.padded), self.padded[0].shape[1])] if self.padded else []
        return [(len(row), row.shape[1]) for row in [*self.rows, self.decode]] + padded

    def kept(self, vocab_size: int) -> int:
        """Return the number of positions whose true logits are kept for comparing."""
        rows = sum(len(row) * len(kept_positions(row.shape, vocab_size)) for row in self.rows)
        return rows + sum(row.shape[1] for row in self.padded) + len(self.decode) * STEPS


def make_inputs(tokens: Tokens, config: AlibiConfig, lengths: Sequence[int] | None, device: str) -> Inputs:
    """Return the inputs around the training length of `config`; `lengths` None means `default_lengths`.

    Raises:
        AlibiError: for a length below two.
    """
    trained = config.max_position_embeddings
    chosen = tuple(sorted(set(lengths))) if lengths else default_lengths(trained)
    if chosen[0] < 2:
        raise AlibiError(f"lengths={chosen}: a row of {chosen[0]} tokens has no distance to compare; give at least 2.")
    anchor = min(trained, LONGEST_ANCHOR, chosen[-1])
    prefill = max(1, anchor - STEPS // 2)
    positions = min(MOST_POSITIONS, NUMBERS // config.hidden_size)

    def rows(length: int, least: int, most: int, wanted: int = positions) -> torch.Tensor:
        return tokens.rows(min(most, max(least, wanted // length)), length).to(device)

    longest = min(anchor, LONGEST_PADDED)
    texts = () if depends_on_call(config) else rows(longest, 3, 24, positions // 2).split(1)
    pad = config.pad_token_id
    prompts = tokens.rows(2, prefill).to(device).split(1)
    return Inputs(
        rows=[rows(length, 1, 64) for length in chosen],
        padded=[text[:, : max(1, longest * PARTS[number % 3] // 8)] for number, text in enumerate(texts)],
        decode=rows(prefill + STEPS, 2, 16, DECODE_POSITIONS),
        prefill=prefill,
        prompts=[prompts[0], prompts[1] if depends_on_call(config) else prompts[1][:, : max(1, prefill // 2)]],
        training=tokens.rows(2, min(anchor, TRAINING_LENGTH)).to(device),
        pad=pad if pad is not None and 0 <= pad < config.vocab_size else 0,
    )
