"""A Trainer for ALiBi models: perplexity by length at each evaluation; what it saves has the config it was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerState

from alibi_hf.evaluation import check_lengths, perplexity_by_length

PREFIX = "perplexity_"


class AlibiTrainer(Trainer):
    """Adds `eval_perplexity_LENGTH` to the metrics of every evaluation, and so to logs, loggers and best-model choice.

    In the evaluation loop, not in a callback's `on_evaluate`: that one is called after the metrics are logged. With
    several processes each measures the same. While it trains, the config has `use_cache` off; a saved model has it as
    it was.

    Args:
        model: the model, changed in place.
        eval_tokens: `[tokens]`, the held-out text.
        eval_lengths: of the windows it is read in, in tokens.

    Raises:
        AlibiError: lengths that such a text cannot be read in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *args: Any,
        eval_tokens: torch.Tensor,
        eval_lengths: Sequence[int],
        **kwargs: Any,
    ) -> None:
        check_lengths(eval_tokens, eval_lengths)
        self.eval_tokens, self.eval_lengths = eval_tokens, eval_lengths
        self.use_cache = model.config.use_cache
        super().__init__(model, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate as ever, then read the held-out text at each length."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        found = perplexity_by_length(self.model, self.eval_tokens, self.eval_lengths)
        output.metrics.update({f"{metric_key_prefix}_{PREFIX}{length}": value for length, value in found.items()})
        return output

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save as ever, in checkpoints too, with the config that the model was given."""
        training, self.model.config.use_cache = self.model.config.use_cache, self.use_cache
        try:
            super().save_model(*args, **kwargs)
        finally:
            self.model.config.use_cache = training


def evaluations(state: TrainerState) -> dict[int, dict[int, float]]:
    """Return step -> length -> perplexity of all evaluations in the log history."""
    found: dict[int, dict[int, float]] = {}
    for entry in state.log_history:
        values = {int(key.rpartition("_")[2]): value for key, value in entry.items() if f"_{PREFIX}" in key}
        if values:
            found[entry["step"]] = dict(sorted(values.items()))  # a saved state sorts the names as text
    return found


def print_evaluations(state: TrainerState) -> None:
    """Print the perplexity of all evaluations in the log history, one line a step."""
    print_table({f"after {step} steps" if step else "before": found for step, found in evaluations(state).items()})


def print_table(rows: dict[str, dict[int, float]]) -> None:
    """Print perplexity by length, one line a row: name -> length -> perplexity."""
    lengths = list(next(iter(rows.values())))
    width = max(22, *(len(name) for name in rows)) + 2
    print(f"\n{'held-out perplexity at':{width}}" + "".join(f"{length:>9,}" for length in lengths) + " tokens")
    for name, values in rows.items():
        print(f"{name:{width}}" + "".join(f"{values[length]:9.2f}" for length in lengths))
