"""What the tests of the fine-tuning examples share: a tiny checkpoint with a tokenizer, a text, a short run."""

import json
from pathlib import Path

from tests import builders

ROOT = Path(__file__).resolve().parents[2]

TINY = ["--per_device_train_batch_size", "2", "--length", "24", "--eval_lengths", "16", "48", "--eval_tokens", "96"]
TINY += ["--logging_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "1e-2"]


def write_text(folder: Path, documents: int = 12) -> Path:
    """Documents of mixed length that say the same thing again and again: easy to learn."""
    folder.mkdir()
    for number in range(documents):
        text = "the cat sat on the mat. " * (1 + number % 4) + "it sat. " * (number % 3)
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


def write_checkpoint(folder: Path, **raw: object) -> Path:
    """A BLOOM checkpoint trained on 16 tokens, in upstream's layout, with a tokenizer and a generation config."""
    builders.bloom(folder, raw={"seq_length": 16, **raw})
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 7, "pad_token_id": 1}))
    return builders.tokenizer(folder)
