"""A Trainer for ALiBi models: perplexity by length at each evaluation; what it saves has the config it was given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerState

from alibi_hf.evaluation import check_lengths, perplexity_by_length

PREFIX = "perplexity_"


class AlibiTrainer(Trainer):
    """Adds `eval_perplexity_LENGTH` to the metrics of every evaluation, and so to logs, loggers and best-model choice.

    In the evaluation loop, not in a callback's `on_evaluate`: that one is called after the metrics are logged. With
    several processes each measures the same. While it trains, `use_cache` and an `alibi_scaling` by length are off in
    the model's config; it is saved, and read for perplexity, with its own.

    Args:
        model: the model, changed in place.
        length: the longest document in a row of the training data, in tokens.
        eval_tokens: `[tokens]`, the held-out text.
        eval_lengths: of the windows it is read in, in tokens.

    Raises:
        AlibiError: lengths that such a text cannot be read in.
        ValueError: a model whose slopes change with a document of `length` tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        length: int,
        eval_tokens: torch.Tensor,
        eval_lengths: Sequence[int],
        **kwargs: Any,
    ) -> None:
        check_lengths(eval_tokens, eval_lengths)
        self.eval_tokens, self.eval_lengths = eval_tokens, eval_lengths
        self.own_config = {name: getattr(model.config, name) for name in ("use_cache", "alibi_scaling")}
        set_scaling_aside(model.config, length)
        super().__init__(model, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as ever, then read the held-out text at each length."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        with self._own_config():
            found = perplexity_by_length(self.model, self.eval_tokens, self.eval_lengths)
        output.metrics.update({f"{metric_key_prefix}_{PREFIX}{length}": value for length, value in found.items()})
        return output

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save as ever, in checkpoints too, with the config that the model was given."""
        with self._own_config():
            super().save_model(*args, **kwargs)

    @contextmanager
    def _own_config(self) -> Iterator[None]:
        config = self.model.config
        training = {name: getattr(config, name) for name in self.own_config}
        for name, value in self.own_config.items():
            setattr(config, name, value)
        try:
            yield
        finally:
            for name, value in training.items():
                setattr(config, name, value)


def set_scaling_aside(config: Any, length: int) -> None:
    """Drop a scaling by the length of the call: a packed row is longer than its documents, which are not scaled."""
    limit = (config.alibi_scaling or {}).get("train_seq_len", math.inf)
    if length > limit:
        raise ValueError(
            f"A length of {length} tokens is past alibi_scaling={config.alibi_scaling}, which divides the slopes by "
            f"the length of the call; packed documents need a fixed factor. Give a length of at most {limit}."
        )
    if limit < math.inf:
        config.alibi_scaling = None


def evaluations(state: TrainerState) -> dict[int, dict[int, float]]:
    """Return step -> length -> perplexity of all evaluations in the log history."""
    found: dict[int, dict[int, float]] = {}
    for entry in state.log_history:
        values = {int(key.rpartition("_")[2]): value for key, value in entry.items() if f"_{PREFIX}" in key}
        if values:
            found[entry["step"]] = dict(sorted(values.items()))  # a saved state sorts the names as text
    return found


def print_table(rows: dict[str, dict[int, float]]) -> None:
    """Print perplexity by length, one line a row: name -> length -> perplexity."""
    lengths = list(next(iter(rows.values())))
    width = max(22, *(len(name) for name in rows)) + 2
    print(f"\n{'held-out perplexity at':{width}}" + "".join(f"{length:>9,}" for length in lengths) + " tokens")
    for name, values in rows.items():
        print(f"{name:{width}}" + "".join(f"{values[length]:9.2f}" for length in lengths))
