"""One training of `train_short_test_long.py`, what it costs, and how the trained model reads at each length.

Everything but the encoding is the same: the decoder, its first weights, the windows of text and their order, the
tokens of a step, the steps, and the schedule of the learning rate. As in fairseq, which the paper trained in,
embeddings are drawn with a standard deviation of 1/sqrt(width) and multiplied by sqrt(width): beside smaller ones,
sinusoidal positions would drown the tokens.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from alibi_hf import AlibiConfig, AlibiForCausalLM
from alibi_hf.evaluation.losses import LossReader
from alibi_hf.evaluation.reading import read
from alibi_hf.evaluation.report import PROTOCOLS
from alibi_hf.evaluation.text import Tokens
from alibi_hf.evaluation.windows import make_region
from position_encodings import ENCODINGS
from step_cost import peak_bytes, train_step
from train_sotu import RandomWindows


@dataclass(frozen=True)
class Run:
    """One training: `encoding` at `length` tokens, from the weights and on the windows of `seed`."""

    encoding: str
    length: int
    seed: int

    def __str__(self) -> str:
        return f"{ENCODINGS[self.encoding].title} at {self.length} tokens, seed {self.seed}"


def option(default: Any, explanation: str) -> Any:
    """Return a field with its default and what `--help` says of it."""
    return field(default=default, metadata={"help": explanation})


@dataclass(frozen=True)
class Settings:
    """What decides the figures, beside the run; two results can be compared where all of it agrees."""

    length: int = option(128, "L, the training length in tokens")
    longest: int = option(32, "models read up to this many times the training length")
    hidden_size: int = option(128, "width of the decoder")
    layers: int = option(3, "its layers")
    heads: int = option(4, "its attention heads")
    vocab_size: int = option(1024, "entries of the vocabulary, which is made of the training text")
    dropout: float = option(0.0, "of embeddings and of what the layers add")
    steps: int = option(700, "of each training")
    tokens_per_step: int = option(1024, "the same at every length; a multiple of 2 L")
    learning_rate: float = option(3e-3, "the highest, after a tenth of the steps; then a cosine to zero")
    held_out_tokens: int = option(16384, "that the trained models read; a multiple of the longest length")
    text: str = option("sotu", "the speeches, a text file, a folder of them, or a dataset")
    device: str = option("cpu", "cpu or cuda; on cuda the products of training are in bfloat16")
    attention: str = option("sdpa", "attention implementation of training; models read with sdpa, in float32")
    threads: int = option(1, "of one training on CPU; with one it can be repeated bit by bit")

    @property
    def lengths(self) -> list[int]:
        """Half the training length, the training length, twice it, and so on."""
        return [self.length // 2 * 2**power for power in range((2 * self.longest).bit_length())]

    def check(self) -> None:
        """Refuse numbers that do not fit each other.

        Raises:
            ValueError: naming the option and what would fit.
        """
        least = {"length": 4, "longest": 2, "layers": 1, "heads": 1, "steps": 1, "threads": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"--{name} {getattr(self, name)} is too small; give at least {smallest}.")
        divisors = {
            "length": (2, "2, as models are read at half of it"),
            "tokens_per_step": (2 * self.length, f"twice --length, which is {self.length}"),
            "held_out_tokens": (self.lengths[-1], f"{self.lengths[-1]}, the longest length that is read"),
            "hidden_size": (2 * self.heads, f"twice --heads, which is {self.heads}: RoPE turns pairs of features"),
        }
        for name, (divisor, words) in divisors.items():
            if getattr(self, name) <= 0 or getattr(self, name) % divisor:
                raise ValueError(f"--{name} {getattr(self, name)} must be a multiple of {words}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout} must be at least 0 and below 1.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning_rate {self.learning_rate} must be positive and finite.")


def build_config(run: Run, settings: Settings, **fields: Any) -> AlibiConfig:
    """Return the decoder of one run; only the fields of its encoding, and the training length, differ between runs."""
    return AlibiConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=run.length,
        embedding_scale=math.sqrt(settings.hidden_size),
        initializer_range=1 / math.sqrt(settings.hidden_size),
        hidden_dropout=settings.dropout,
        embedding_dropout=settings.dropout,
        **{**ENCODINGS[run.encoding].fields, **fields},
    )


class Counter(TrainerCallback):
    """Tells `advance` of every step."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance

    def on_step_end(self, *_arguments: Any, **_named: Any) -> None:
        """Count one step."""
        self.advance()


def training_arguments(run: Run, settings: Settings, folder: str) -> TrainingArguments:
    """Return the settings of Transformers' Trainer for one run."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.tokens_per_step // run.length,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 10,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        use_cpu=settings.device == "cpu",
        bf16=settings.device != "cpu",
        seed=run.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


def build_model(run: Run, settings: Settings, attention: str | None = None) -> Any:
    """Return the untrained model; its weights are the same for every encoding."""
    set_seed(run.seed)
    attention = attention or settings.attention
    model = AlibiForCausalLM._from_config(build_config(run, settings), attn_implementation=attention)
    return model.to(settings.device)


def train(run: Run, settings: Settings, tokens: torch.Tensor, advance: Callable[[], None]) -> tuple[Any, dict]:
    """Train one model on `tokens` `[tokens]`; return it, and what the training cost and reached."""
    model, rows = build_model(run, settings), settings.tokens_per_step // run.length
    windows = RandomWindows(tokens, run.length, settings.steps * rows, run.seed)
    batch = torch.stack([windows[row]["input_ids"] for row in range(rows)]).to(settings.device)
    peak = peak_bytes(lambda: train_step(model, batch), settings.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(run, settings, folder)
        arguments._n_gpu = 1  # Trainer would take all there are, and a batch for each
        trainer = Trainer(model=model, args=arguments, train_dataset=windows, callbacks=[Counter(advance)])
        trainer.remove_callback(PrinterCallback)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = trainer.train().training_loss
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return model, {
        "parameters": model.num_parameters(),
        "mean_training_loss": loss if math.isfinite(loss) else None,
        "seconds_per_step": wall / settings.steps,
        "cpu_seconds_per_step": cpu / settings.steps,
        "peak_bytes_of_step": peak,
    }


def read_by_length(model: Any, run: Run, settings: Settings, held_out: torch.Tensor) -> list[dict[str, Any]]:
    """Return how a trained model reads `held_out` `[tokens]`: one row a way of reading, protocol and length."""
    tokens = Tokens(held_out, torch.zeros_like(held_out), [])
    region, rows = make_region(len(held_out), settings.lengths), []
    for title, rescale in ENCODINGS[run.encoding].readings.items():
        for length in settings.lengths:
            fields = {} if rescale is None else {"rope_parameters": rescale(length, run.length)}
            reader = LossReader(_for_reading(model, run, settings, fields), held_out)
            for protocol in PROTOCOLS:
                found = read(reader, tokens, length, protocol, region)
                rows.append(
                    {
                        "read_as": title,
                        "protocol": protocol,
                        "length": length,
                        "perplexity": found.perplexity if math.isfinite(found.perplexity or 0) else None,
                        "loss": found.loss,
                        "standard_error": found.standard_error,
                        "tokens": found.tokens,
                        "failure": found.failure,
                    }
                )
    return rows


def _for_reading(model: Any, run: Run, settings: Settings, fields: dict[str, Any]) -> Any:
    """Return a model with these weights, to be read in float32 with sdpa."""
    config = build_config(run, settings, **fields)
    reading = AlibiForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    reading.load_state_dict(model.state_dict())
    return reading.to(settings.device).eval()
