"""Export a checkpoint to ONNX, and show that ONNX Runtime computes the same at any length.

    python examples/export_onnx.py                                   # the shipped BLOOM, trained on 256 tokens
    python examples/export_onnx.py --model PATH_OR_ID --output FOLDER --lengths 256 2048

One graph reads prompts and writes tokens. In go `input_ids` [batch, tokens], `attention_mask` [batch, cached + tokens]
and the cache, empty at first: `past_key_values.LAYER.key` and `.value`, [batch, key/value heads, cached, head_dim]. Out
come `logits` and the grown cache, `present.LAYER.key` and `.value`. Batch and lengths are free, past the training
length too: the graph computes the bias. It holds that of all pairs of query and key: memory grows with their number.

It needs three packages more: pip install onnx onnxscript onnxruntime. In `--output` are model.onnx, config, tokenizer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache, HfArgumentParser

import alibi_hf
from alibi_hf import AlibiForCausalLM

CHECKPOINT = Path(__file__).parent / "checkpoints" / "sotu-bloom"
TEXT = Path(alibi_hf.__file__).parent / "verification" / "sotu.txt"

Past = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Options:
    """What is exported, and at which lengths it is compared."""

    model: str = field(default=str(CHECKPOINT), metadata={"help": "Folder or Hub id of an ALiBi checkpoint."})
    output: str = field(default="build/onnx", metadata={"help": "Folder of model.onnx, config and tokenizer."})
    lengths: list[int] = field(
        default_factory=lambda: [32, 256, 1024], metadata={"help": "Tokens at which logits are compared."}
    )
    prompt: str = field(default="The state of the Union", metadata={"help": "What the greedy text begins with."})
    new_tokens: int = field(default=40, metadata={"help": "Tokens of the greedy text."})


class Decoder(torch.nn.Module):
    """The model with its cache as plain tensors, which is what an ONNX graph can take."""

    def __init__(self, model: AlibiForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: Past) -> tuple[torch.Tensor, Past]:
        """Return the logits `[batch, tokens, vocab]` and the keys and values of every layer, old and new."""
        cache = DynamicCache(past)
        logits = self.model(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True).logits
        return logits, [(layer.keys, layer.values) for layer in cache.layers]


def make_past(config: Any, rows: int, cached: int) -> Past:
    """Return the keys and values of `cached` tokens, all zero."""
    shape = (rows, config.num_key_value_heads, cached, config.head_dim)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]


def export_onnx(model: AlibiForCausalLM, path: Path) -> None:
    """Write the graph of a float32 model to `path`."""
    past = make_past(model.config, rows=2, cached=3)  # sizes of 0 and 1 would be taken for constants
    given = {
        "input_ids": torch.zeros(2, 5, dtype=torch.long),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "past": past,
    }
    free = torch.export.Dim.DYNAMIC
    layer = ({0: free, 2: free}, {0: free, 2: free})
    shapes = {"input_ids": {0: free, 1: free}, "attention_mask": {0: free, 1: free}, "past": [layer] * len(past)}
    cached = [f"{index}.{part}" for index in range(len(past)) for part in ("key", "value")]
    program = torch.onnx.export(
        Decoder(model).eval(),
        (),
        kwargs=given,
        dynamic_shapes=shapes,
        input_names=["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in cached)],
        output_names=["logits", *(f"present.{name}" for name in cached)],
        dynamo=True,
        verbose=False,
    )
    program.save(str(path))


class Runner:
    """ONNX Runtime on CPU, with the cache kept between calls."""

    def __init__(self, path: Path, config: Any) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.config = config
        self.past: list[Any] = []

    def start(self, rows: int) -> None:
        """Forget what was read."""
        self.past = [states.numpy() for layer in make_past(self.config, rows, 0) for states in layer]

    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits `[batch, tokens, vocab]` of the next tokens; the mask covers what was read before too."""
        arrays = [input_ids.numpy(), attention_mask.numpy(), *self.past]
        names = [given.name for given in self.session.get_inputs()]
        logits, *self.past = self.session.run(None, dict(zip(names, arrays, strict=True)))
        return torch.from_numpy(logits)

    def read_whole(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the logits of new rows read in one call."""
        self.start(len(input_ids))
        return self.read(input_ids, attention_mask)

    def read_by_token(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of one row of which the second half is read token by token."""
        mask, half = torch.ones_like(input_ids), max(1, input_ids.shape[1] // 2)
        outputs = [self.read_whole(input_ids[:, :half], mask[:, :half])]
        for stop in range(half + 1, input_ids.shape[1] + 1):
            outputs.append(self.read(input_ids[:, stop - 1 : stop], mask[:, :stop]))
        return torch.cat(outputs, dim=1)

    def write(self, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """Return the prompt `[1, tokens]` with greedy tokens behind it."""
        ids, logits = prompt, self.read_whole(prompt, torch.ones_like(prompt))
        for _ in range(new_tokens):
            token = logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], dim=1)
            logits = self.read(token, torch.ones_like(ids))
        return ids


def difference(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest difference over the largest value of `truth`."""
    return ((found.double() - truth).abs().max() / truth.abs().max()).item()


@torch.no_grad()
def compare(runner: Runner, model: AlibiForCausalLM, truth: AlibiForCausalLM, ids: torch.Tensor) -> list[float]:
    """Return how far logits of one row `[1, tokens]` are from float64: PyTorch's, and ONNX Runtime's in three ways."""
    right, half = truth(ids, use_cache=False).logits, ids.shape[1] // 2
    shorter = torch.cat([torch.zeros_like(ids[:, half:]), ids[:, :half]], dim=1)
    mask = torch.ones_like(ids).repeat(2, 1)
    mask[1, : ids.shape[1] - half] = 0
    padded = runner.read_whole(torch.cat([ids, shorter]), mask)
    alone = truth(ids[:, :half], use_cache=False).logits
    return [
        difference(model(ids, use_cache=False).logits, right),
        difference(runner.read_whole(ids, torch.ones_like(ids)), right),
        difference(runner.read_by_token(ids), right),
        max(difference(padded[:1], right), difference(padded[1:, -half:], alone)),
    ]


def run(options: Options) -> None:
    """Export, compare, and write a text.

    Raises:
        ValueError, OSError: no such checkpoint; a length below 2, or longer than the text.
        ImportError: where one of the three packages is missing.
    """
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    if min(options.lengths) < 2 or max(options.lengths) > ids.shape[1]:
        raise ValueError(f"--lengths {options.lengths} must be between 2 and the {ids.shape[1]} tokens of the text.")
    model = AlibiForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    truth = AlibiForCausalLM.from_pretrained(options.model, dtype=torch.float64, attn_implementation="eager").eval()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    export_onnx(model, output / "model.onnx")
    model.config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    runner = Runner(output / "model.onnx", model.config)
    print(f"{output / 'model.onnx'}: trained on {model.config.max_position_embeddings} tokens")
    print("\ndifference of logits from float64, over the largest")
    print(f"{'tokens':>8}{'PyTorch':>12}{'ONNX Runtime':>14}{'by token':>12}{'padded':>12}")
    for length in options.lengths:
        found = compare(runner, model, truth, ids[:, :length])
        print(f"{length:>8,}{found[0]:>12.1e}{found[1]:>14.1e}{found[2]:>12.1e}{found[3]:>12.1e}")
    prompt = tokenizer(options.prompt, return_tensors="pt")["input_ids"]
    written = runner.write(prompt, options.new_tokens)
    greedy = {"do_sample": False, "max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
    same = torch.equal(written, model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy))
    print(f"\n{tokenizer.decode(written[0])}\n({'the same' if same else 'NOT the same'} tokens as `generate`)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and return the exit status: 0 done, 2 bad input."""
    parser = HfArgumentParser(Options, description=(__doc__ or "").partition("\n")[0])
    (options,) = parser.parse_args_into_dataclasses(arguments)
    try:
        run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"export_onnx.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
