"""Retrofit a GPT-2 with ALiBi, train on, and see when it reads as well as before, and how it reads past its old length.

    python examples/retrofit.py                                    # trains a small GPT-2 first
    python examples/retrofit.py --source my-gpt2 --text my-texts/  # any GPT-2, Llama or Mistral folder

A GPT-2 has a row of learned positions for each token it may read, and fails past them. `alibi-hf retrofit` drops the
positions and puts ALiBi in their place: the same weights read badly at first, and training on mends that. As a control,
the source is trained on for as many steps, from the same weights on the same windows. All settings of Transformers'
Trainer can be given. `OUTPUT_DIR` holds the models, figures.json, perplexity.csv and retrofit.png.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from alibi_hf import AlibiError, AlibiForCausalLM, retrofit
from alibi_hf.evaluation import perplexity
from texts import as_stream, load_texts
from train_sotu import RandomWindows

EXAMPLES = Path(__file__).resolve().parent
DEFAULTS = {
    "output_dir": "build/retrofit",
    "max_steps": 250,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.1,
    "eval_steps": 25,
    "logging_steps": 100,
    "save_strategy": "no",
    "report_to": "none",
}
Figures = dict[int, float | None]  # perplexity by length or step; None where the model fails


@dataclass
class ScriptArguments:
    """What is retrofitted, on which text, and how it is measured."""

    source: str | None = field(default=None, metadata={"help": "GPT-2, Llama or Mistral folder; default: a new GPT-2"})
    text: str = field(default="sotu", metadata={"help": "sotu, a text file, a folder of them, or a dataset"})
    source_steps: int = field(default=800, metadata={"help": "steps that the new GPT-2 is trained for"})
    source_learning_rate: float = field(default=3e-3, metadata={"help": "its learning rate"})
    length: int = field(default=128, metadata={"help": "tokens of a row in training, and positions of the new GPT-2"})
    hidden_size: int = field(default=128, metadata={"help": "its width, of four layers and four heads"})
    tokenizer: str = field(
        default=str(EXAMPLES / "checkpoints" / "sotu-bloom"), metadata={"help": "tokenizer of the new GPT-2"}
    )
    bias_max: float = field(default=8.0, metadata={"help": "alibi_bias_max of the retrofitted model"})
    longest: int = field(default=16, metadata={"help": "read rows of up to this many times that length"})
    held_out_tokens: int = field(default=16384, metadata={"help": "tokens of held-out text that are read"})


class Probe(TrainerCallback):
    """Measures the perplexity on held-out text every `eval_steps` steps (below 1: a share), and at the last."""

    def __init__(self, tokens: torch.Tensor, length: int) -> None:
        self.tokens, self.length = tokens, length
        self.found: Figures = {}

    def on_step_end(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
        """Measure where it is time to."""
        if state.global_step % state.eval_steps == 0 or state.global_step == state.max_steps:
            self.found[state.global_step] = perplexity(model, self.tokens, self.length)


def check(script: ScriptArguments, arguments: TrainingArguments) -> None:
    """Refuse, before anything is trained, settings that would end the run later.

    Raises:
        ValueError: naming the setting.
    """
    least = {"length": 2, "longest": 1, "source_steps": 1}
    given = {name: (getattr(script, name), smallest) for name, smallest in least.items()}
    given["max_steps"] = (arguments.max_steps, 1)
    for name, (value, smallest) in given.items():
        if value < smallest:
            raise ValueError(f"--{name} {value} is too small; give at least {smallest}.")
    if not 0 < script.bias_max < math.inf:
        raise ValueError(f"--bias_max {script.bias_max} must be positive and finite.")
    if arguments.resume_from_checkpoint is not None:
        raise ValueError("Two short runs are not resumed; start again without --resume_from_checkpoint.")


def train(model: Any, tokens: torch.Tensor, length: int, arguments: TrainingArguments, *probes: Probe) -> None:
    """Train on windows of `length` tokens that start anywhere, the same ones for every model."""
    size = arguments.max_steps * arguments.train_batch_size * arguments.gradient_accumulation_steps
    windows = RandomWindows(tokens, length, size, arguments.seed)
    Trainer(model=model, args=arguments, train_dataset=windows, callbacks=list(probes)).train()
    model.config.use_cache = True  # Trainer turned it off


def new_gpt2(script: ScriptArguments, arguments: TrainingArguments, train_tokens: torch.Tensor, tokenizer: Any) -> Path:
    """Train a small GPT-2 with Transformers' own class and return its folder."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=script.length,
        n_embd=script.hidden_size,
        n_layer=4,
        n_head=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    settings = copy.copy(arguments)
    settings.max_steps, settings.learning_rate = script.source_steps, script.source_learning_rate
    train(model, train_tokens, script.length, settings)
    folder = Path(arguments.output_dir) / "source"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(model: Any, tokens: torch.Tensor, lengths: list[int]) -> Figures:
    """Return the perplexity by length; None where there is no learned position for a token."""
    found: Figures = {}
    for length in lengths:
        try:
            found[length] = perplexity(model, tokens, length)
        except IndexError:
            found[length] = None
    return found


def run(script: ScriptArguments, arguments: TrainingArguments) -> dict[str, Any]:
    """Train the source if there is none, retrofit it, train both on, and return all figures."""
    set_seed(arguments.seed)
    texts = load_texts(script.text)
    tokenizer = AutoTokenizer.from_pretrained(script.source or script.tokenizer)
    train_tokens = as_stream(tokenizer, texts.train)
    held_out = as_stream(tokenizer, texts.held_out)[: script.held_out_tokens]
    for name, tokens in {"to train on": train_tokens, "held out": held_out}.items():
        if len(tokens) <= script.length:
            raise ValueError(f"{len(tokens)} tokens are {name}, and a row has {script.length}; give a longer --text.")
    folder = Path(script.source) if script.source else new_gpt2(script, arguments, train_tokens, tokenizer)
    output = Path(arguments.output_dir)
    report = retrofit(folder, output / "retrofitted", bias_max=script.bias_max, dtype="float32", overwrite=True)
    length = min(script.length, report.config["to"]["max_position_embeddings"])
    models = {
        "source": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "retrofitted": AlibiForCausalLM.from_pretrained(output / "retrofitted"),
    }
    figures = train_on(models, train_tokens, held_out, length, script.longest, arguments)
    models["retrofitted"].save_pretrained(output / "trained")
    tokenizer.save_pretrained(output / "trained")
    return {"statement": report.statement, "weights": report.weights, **figures}


def train_on(
    models: dict[str, Any],
    train_tokens: torch.Tensor,
    held_out: torch.Tensor,
    length: int,
    longest: int,
    arguments: TrainingArguments,
) -> dict[str, Any]:
    """Train each of `models` and return the perplexities by length, before and after, and by step."""
    lengths = [length * 2**power for power in range(longest.bit_length()) if length * 2**power <= len(held_out)]
    # On the CPU: on a GPU a position that is not there ends the process.
    by_length = {name: measure(model.cpu(), held_out, lengths) for name, model in models.items()}
    by_step = {}
    for name, model in models.items():
        probe = Probe(held_out, length)
        train(model, train_tokens, length, arguments, probe)
        by_step[name] = {0: by_length[name][length]} | probe.found
        by_length[f"{name}, trained on"] = measure(model.cpu(), held_out, lengths)
    bar = by_length["source"][length]
    return {
        "length": length,
        "steps": arguments.max_steps,
        "recovered_after": next((step for step, value in by_step["retrofitted"].items() if value <= bar), None),
        "perplexity_by_length": by_length,
        "perplexity_by_step": by_step,
    }


def as_table(figures: dict[str, Any]) -> Table:
    """Return the perplexities by length, one row a model."""
    rows = figures["perplexity_by_length"]
    table = Table(title="held-out perplexity by length in tokens", title_justify="left")
    table.add_column("model")
    for length in rows["source"]:
        table.add_column(str(length), justify="right")
    for name, values in rows.items():
        table.add_row(name, *("fails" if value is None else f"{value:.1f}" for value in values.values()))
    return table


def save(figures: dict[str, Any], output: Path) -> None:
    """Write figures.json, perplexity.csv, and retrofit.png where matplotlib is installed."""
    (output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    with (output / "perplexity.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "by", "value", "perplexity"])
        for by in ("length", "step"):
            for name, values in figures[f"perplexity_by_{by}"].items():
                writer.writerows([name, by, at, value] for at, value in values.items())
    if find_spec("matplotlib"):
        draw(figures, output / "retrofit.png")


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw perplexity by step of training on, and by length."""
    from matplotlib import pyplot

    by_length, length = figures["perplexity_by_length"], figures["length"]
    colours = {name: f"C{index}" for index, name in enumerate(by_length)}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.axhline(by_length["source"][length], color=colours["source"], linestyle=":", label="source, before")
    for name, values in figures["perplexity_by_step"].items():
        trained = f"{name}, trained on"
        left.plot(list(values), list(values.values()), color=colours[trained], label=trained)
    left.set(xlabel="steps trained on", ylabel="held-out perplexity", title=f"rows of {length} tokens")
    for name, values in by_length.items():
        read = {at: value for at, value in values.items() if value is not None}
        right.plot(list(read), list(read.values()), color=colours[name], marker="o", label=name)
    right.set(xlabel="length in tokens", title="by length, as far as each can read", xscale="log")
    right.set_xticks(list(by_length["source"]), labels=list(by_length["source"]))
    right.set_xticks([], minor=True)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter("{x:.0f}")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run everything, print what came out, and return the exit status."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments), description=(__doc__ or "").partition("\n")[0])
    parser.set_defaults(**DEFAULTS)
    logging.set_verbosity_error()
    try:
        script, arguments = parser.parse_args_into_dataclasses()
        check(script, arguments)
        figures = run(script, arguments)
    except (AlibiError, ValueError, OSError) as error:
        print(f"retrofit.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    save(figures, Path(arguments.output_dir))
    console = Console()
    console.print(figures["statement"])
    console.print(as_table(figures))
    step = figures["recovered_after"]
    words = f"after {step} steps" if step is not None else f"not within {figures['steps']} steps"
    console.print(f"The source's perplexity at {figures['length']} tokens is reached again {words}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
