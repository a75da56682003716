"""Train short, test long: matched small models that differ in how they tell positions, read far past their length.

    python examples/train_short_test_long.py                    # about 20 minutes on two CPU cores
    python examples/train_short_test_long.py --setting gpu      # 15M parameters, 50M tokens each, 512 to 16,384 tokens
    python examples/train_short_test_long.py --seeds 0 --encodings alibi rope --steps 300

The headline of Press, Smith and Lewis (arXiv:2108.12409): a model trained with ALiBi at L tokens, read at 2 L, does as
well as one trained with sinusoidal positions at 2 L, which costs more to train; and it reads on at any length. Here
ALiBi, RoPE, both at once, sinusoidal positions and none train in one decoder, with the same first weights, text and
budget of tokens; every model is read at L/2 to 32 L by both protocols of `alibi-hf evaluate`, and the RoPE one with
YaRN and NTK-aware scaling too, which need no training.

`--output` then holds results.json, perplexity.csv, table.md and train_short_test_long.png. Each training is kept in
results.json as soon as it is finished: a run that was cut off goes on when the command is given again, and more
`--seeds` or `--encodings` can be added. The `gpu` setting has not been run on a GPU yet.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler tells of every start

import torch
from rich.console import Console
from transformers import HfArgumentParser
from transformers.utils import logging

from position_encodings import ENCODINGS, check_encodings
from short_long_report import findings, write_report
from short_long_results import Results
from short_long_runs import run_all
from short_long_training import Run, Settings, build_model
from texts import as_stream, load_texts
from train_sotu import train_tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu": {
        "length": 512,
        "hidden_size": 384,
        "layers": 8,
        "heads": 6,
        "vocab_size": 4096,
        "steps": 1526,
        "tokens_per_step": 32768,
        "learning_rate": 2e-3,
        "dropout": 0.1,  # the speeches are read about twenty times
        "held_out_tokens": 131072,  # eight times the longest
        "device": "cuda",
        "attention": "flex_attention",
        "seeds": [0, 1],
    },
    "tiny": {
        "length": 8,
        "longest": 4,
        "hidden_size": 16,
        "layers": 1,
        "heads": 2,
        "vocab_size": 300,
        "steps": 20,
        "tokens_per_step": 64,
        "held_out_tokens": 128,
        "seeds": [0],
    },
}


@dataclass
class Options:
    """What is run, and where the results go."""

    setting: Literal["cpu", "gpu", "tiny"] = field(default="cpu", metadata={"help": "defaults of what follows"})
    encodings: list[str] = field(default_factory=lambda: list(ENCODINGS), metadata={"help": "which to train"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of weights and order of the text"})
    jobs: int = field(default=2, metadata={"help": "trainings at a time, each in a process of its own"})
    output: str = field(default="build/train-short-test-long", metadata={"help": "folder of the results"})
    overwrite: bool = field(default=False, metadata={"help": "forget the results that are there"})


def parse(arguments: Sequence[str] | None) -> tuple[Options, Settings]:
    """Return the options, those not given as `--setting` has them."""
    parser = HfArgumentParser((Options, Settings), description=(__doc__ or "").partition("\n")[0])
    chosen, _ = parser.parse_known_args(arguments)
    parser.set_defaults(**SETTINGS[chosen.setting])
    return parser.parse_args_into_dataclasses(arguments)


def plan(options: Options, settings: Settings) -> list[Run]:
    """Return all trainings, one seed after the other; sinusoidal positions are trained at 2 L too."""
    pairs = [(encoding, settings.length) for encoding in options.encodings]
    if "sinusoidal" in options.encodings:
        pairs.append(("sinusoidal", 2 * settings.length))
    return [Run(encoding, length, seed) for seed in options.seeds for encoding, length in pairs]


def check(options: Options, settings: Settings) -> None:
    """Refuse, before anything is computed, what would end the run later.

    Raises:
        ValueError: naming the option.
    """
    check_encodings(options.encodings)
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise ValueError(f"--seeds {options.seeds} must name each seed once.")
    if wrong := [seed for seed in options.seeds if not 0 <= seed < 2**32]:
        raise ValueError(f"--seeds {wrong[0]} must be at least 0 and below 2**32.")
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs} is too small; give at least 1.")
    if settings.device not in ("cpu", "cuda"):
        raise ValueError(f"--device {settings.device} is neither cpu nor cuda; CUDA_VISIBLE_DEVICES chooses a GPU.")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {settings.device} needs a GPU that PyTorch can use; choose --setting cpu.")
    settings.check()
    with torch.device("meta"):  # which refuses an attention implementation that there is not
        build_model(plan(options, settings)[0], replace(settings, device="meta"))


def load_tokens(settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens to train on and the held-out ones, `[tokens]`, under a vocabulary made of the former.

    The held-out tokens are from the middle of the held-out documents.

    Raises:
        ValueError: where there are too few.
    """
    texts = load_texts(settings.text)
    tokenizer = train_tokenizer(texts.train, settings.vocab_size)
    if len(tokenizer) != settings.vocab_size:
        raise ValueError(
            f"{settings.text} gives a vocabulary of {len(tokenizer)}, and --vocab_size is {settings.vocab_size}; "
            f"give at most {len(tokenizer)}, or a longer text. Bytes and special tokens alone are 260."
        )
    tokens, held_out = as_stream(tokenizer, texts.train), as_stream(tokenizer, texts.held_out)
    if len(tokens) <= settings.tokens_per_step:
        raise ValueError(
            f"{len(tokens)} tokens are to train on, and --tokens_per_step is {settings.tokens_per_step}; give more "
            "--text."
        )
    wanted, longest = settings.held_out_tokens, settings.lengths[-1]
    if len(held_out) < wanted:
        raise ValueError(
            f"{len(held_out)} tokens of {settings.text} are held out, and --held_out_tokens is {wanted}, to be read up "
            f"to {longest} at once; give more --text, or fewer tokens."
        )
    start = (len(held_out) - wanted) // 2
    return tokens, held_out[start : start + wanted].clone()


def describe(settings: Settings, tokens: torch.Tensor, held_out: torch.Tensor) -> dict[str, Any]:
    """Return the settings, and what the text has come to."""
    digest = hashlib.sha256(tokens.numpy().tobytes() + held_out.numpy().tobytes()).hexdigest()
    return {**asdict(settings), "training_tokens": len(tokens), "tokens_sha256": digest}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything, print what came out, and return the exit status: 0 done, 1 cut off, 2 bad input."""
    logging.set_verbosity_error()
    console = Console()
    try:
        options, settings = parse(arguments)
        check(options, settings)
        torch.set_num_threads(settings.threads)
        output = Path(options.output)
        Results.check(output, options.overwrite)
        tokens, held_out = load_tokens(settings)
        results = Results.open(output, describe(settings, tokens, held_out), options.overwrite)
    except (ValueError, OSError) as error:
        print(f"train_short_test_long.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tokens.pt"
            torch.save((tokens, held_out), file)
            run_all(plan(options, settings), settings, file, options.jobs, results, console)
    except (BrokenProcessPool, KeyboardInterrupt, torch.OutOfMemoryError) as error:
        why = "stopped" if isinstance(error, KeyboardInterrupt) else f"a training has died: {error}"
        print(f"train_short_test_long.py: {why}; finished ones are kept, and the command goes on.", file=sys.stderr)
        return 1
    write_report(results, output)
    console.print("\n".join(findings(results)), highlight=False, soft_wrap=True)
    console.print(f"Written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
