"""Draw a run of Trainer: training and held-out loss, and perplexity by length.

    python examples/finetune_trainer.py
    python examples/plot_loss.py build/finetuned docs/finetune.png      # RUN_FOLDER PICTURE.png

RUN_FOLDER holds the `trainer_state.json` that `finetune_trainer.py` leaves, or is a `checkpoint-N` of any Trainer.
Needs matplotlib: pip install 'alibi-hf[plots]'.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from transformers import TrainerState

from alibi_trainer import evaluations


def draw(state: TrainerState, path: Path) -> None:
    """Draw the log history of a run: loss over steps, and perplexity over length."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, lengths = figure.subplots(1, 2)
    for key, name, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        entries = [entry for entry in state.log_history if key in entry]
        losses.plot([entry["step"] for entry in entries], [entry[key] for entry in entries], style, label=name)
    losses.set_ylabel("loss, packed rows")
    for step, found in evaluations(state).items():
        lengths.plot(list(found), list(found.values()), "o-", label=f"after {step} steps" if step else "before")
        lengths.set_xscale("log", base=2)
        lengths.set_xticks(list(found), [f"{length:,}" for length in found])
    losses.set_xlabel("step")
    lengths.set_xlabel("tokens read")
    lengths.set_ylabel("held-out perplexity")
    lengths.set_yscale("log")
    for panel in (losses, lengths):
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the run that the command line names."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) != 2:
        sys.exit("Usage: python examples/plot_loss.py RUN_FOLDER PICTURE.png")
    file = Path(given[0]) / "trainer_state.json"
    if not file.is_file():
        sys.exit(f"There is no {file}; name the folder of a finished run, or one of its checkpoint-N folders.")
    draw(TrainerState.load_from_json(str(file)), Path(given[1]))


if __name__ == "__main__":
    main()
