"""How much memory a GPU needs to train the published models, for each config of this folder.

    python examples/accelerate/memory.py                          # the tables of README.md
    python examples/accelerate/memory.py --model MODEL --gpus 32  # any checkpoint, FSDP2 over another number of GPUs

Parameters are counted exactly, on torch's meta device; the rest follows from the shapes. Every process reads one packed
row of `tokens` tokens in bfloat16. README.md states the formulas.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from alibi_hf import AlibiConfig, AlibiForCausalLM, inspect_checkpoint

GIB = 2**30
CARDS = {"80 GB": 79, "141 GB": 139}  # GiB that a driver reports of an A100 or H100, and of an H200
USABLE = 0.92  # the rest is the context, communication buffers and fragments
LENGTHS = (2048, 8192)
STATES = {"float32": 16, "bfloat16": 8}  # bytes a parameter: weight, gradient, and the two averages of AdamW
LOGITS = 12  # bytes a logit: bfloat16, float32, log-softmax, its gradient; at most so many at once
CHUNK = 1.5 * 256 * 2**20  # the chunked loss: float32 logits of a chunk on a GPU, and their bfloat16 copy

BLOOM = {"embedding_norm": True, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True}
MODELS = {  # the config.json of bigscience/bloom-7b1, mosaicml/mpt-30b and bigscience/bloom on the Hub
    "BLOOM-7B1": AlibiConfig(
        vocab_size=250880, hidden_size=4096, num_hidden_layers=30, num_attention_heads=32, **BLOOM
    ),
    "MPT-30B": AlibiConfig(
        vocab_size=50432, hidden_size=7168, num_hidden_layers=48, num_attention_heads=64, norm_bias=False
    ),
    "BLOOM-176B": AlibiConfig(
        vocab_size=250880, hidden_size=14336, num_hidden_layers=70, num_attention_heads=112, **BLOOM
    ),
}


@dataclass(frozen=True)
class Setup:
    """How a model is spread: over `tensor` GPUs head by head, and that over `sharded` ones by FSDP2."""

    name: str
    sharded: int
    tensor: int = 1

    @property
    def gpus(self) -> int:
        """How many GPUs there are."""
        return self.sharded * self.tensor


SETUPS = (
    Setup("one_gpu", 1),
    Setup("fsdp2_8_gpus", 8),
    Setup("fsdp2_2_nodes", 16),
    Setup("tp_fsdp", 2, 8),
)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: of all, of one layer, and of the embedding or head."""

    total: int
    layer: int
    head: int


def count(config: AlibiConfig) -> Sizes:
    """Return the numbers of parameters of a model, tied ones once; nothing is allocated."""
    with torch.device("meta"):
        model = AlibiForCausalLM(config)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    return Sizes(model.num_parameters(), layer, model.lm_head.weight.numel())


def layer_elements(config: AlibiConfig, tensor: int = 1) -> float:
    """Return how many numbers a layer keeps for backward, a token: those of heads and MLP are shared by `tensor` GPUs.

    Inputs and outputs of both norms; query, key, value, and the output of attention twice; the MLP's inner states, of
    which only the inputs of the activation are kept where the weight of the last product is not sharded by heads.
    """
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    inner = (2 if config.mlp_type == "gated" else 1) * (2 if tensor > 1 else 1) * config.intermediate_size
    return 4 * config.hidden_size + (3 * queries + 2 * keys + inner) / tensor


def states(sizes: Sizes, setup: Setup, dtype: str) -> float:
    """Return the bytes of weights, gradients and optimizer on each GPU."""
    return STATES[dtype] * sizes.total / setup.gpus


def gathered(sizes: Sizes, setup: Setup, dtype: str) -> float:
    """Return the bytes of bfloat16 weights beside the states: what FSDP2 gathers, or autocast copies on one GPU."""
    if setup.gpus == 1:
        return 2 * sizes.total if dtype == "float32" else 0
    return (2 + 2) * (2 * sizes.layer + sizes.head) / setup.tensor  # with gradients; the next layer is on its way


def activations(config: AlibiConfig, setup: Setup, tokens: int, checkpointing: bool) -> float:
    """Return the bytes that forward keeps for backward in the layers."""
    layer = 2 * tokens * layer_elements(config, setup.tensor)
    if not checkpointing:
        return config.num_hidden_layers * layer
    return config.num_hidden_layers * 2 * tokens * config.hidden_size + layer


def loss(config: AlibiConfig, sizes: Sizes, setup: Setup, tokens: int) -> float:
    """Return the bytes around the loss: in chunks, but of all logits where tensor parallelism shards the head."""
    if setup.tensor == 1:
        return CHUNK + 4 * sizes.head  # with the gradient of the weight, which is summed in float32
    return LOGITS * tokens * config.vocab_size


def total(
    config: AlibiConfig, sizes: Sizes, setup: Setup, dtype: str, tokens: int, checkpointing: bool = True
) -> float:
    """Return the bytes that a GPU needs at its peak: at the loss, or in the backward of a layer, whichever is more."""
    kept = states(sizes, setup, dtype) + gathered(sizes, setup, dtype)
    return kept + activations(config, setup, tokens, checkpointing) + loss(config, sizes, setup, tokens)


def verdict(needed: float) -> str:
    """Return the smallest card that holds so many bytes."""
    return next((card for card, size in CARDS.items() if needed <= USABLE * size * GIB), "none")


def least_gpus(config: AlibiConfig, sizes: Sizes, dtype: str, tokens: int, card: str) -> int | None:
    """Return how many machines of 8 GPUs FSDP2 needs with checkpointing, as a number of GPUs; None beyond 1024."""
    room = USABLE * CARDS[card] * GIB
    needs = ((gpus, total(config, sizes, Setup("", gpus), dtype, tokens)) for gpus in range(8, 1025, 8))
    return next((gpus for gpus, needed in needs if needed <= room), None)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gib(*values: float) -> str:
    """Return numbers of bytes in GiB, divided by slashes."""
    return " / ".join(f"{value / GIB:.0f}" if value >= 10 * GIB else f"{value / GIB:.1f}" for value in values)


def parts_table(models: dict[str, AlibiConfig], setups: tuple[Setup, ...]) -> str:
    """Return the parts, a row a model and setup."""
    rows = []
    for name, config in models.items():
        sizes = count(config)
        for setup in setups:
            kept = [[activations(config, setup, n, on) for n in LENGTHS] for on in (False, True)]
            rows.append(
                [
                    name,
                    f"`{setup.name}`, {setup.gpus}",
                    gib(*(states(sizes, setup, dtype) for dtype in STATES)),
                    gib(*(gathered(sizes, setup, dtype) for dtype in STATES)),
                    *(gib(*values) for values in kept),
                    gib(*(loss(config, sizes, setup, n) for n in LENGTHS)),
                ]
            )
    head = ["GiB a GPU", "config, GPUs", "states, float32 / bfloat16", "gathered or copied, likewise"]
    return table([*head, "layers at 2k / 8k", "checkpointed, 2k / 8k", "loss at 2k / 8k"], rows)


def totals_table(models: dict[str, AlibiConfig], setups: tuple[Setup, ...]) -> str:
    """Return the sums with checkpointing, and the card that holds each."""
    rows = []
    for name, config in models.items():
        sizes = count(config)
        for setup in setups:
            sums = [total(config, sizes, setup, dtype, tokens) for dtype in STATES for tokens in LENGTHS]
            cells = [f"{gib(needed)}, {verdict(needed)}" for needed in sums]
            rows.append([f"{name}, {sizes.total / 1e9:.1f}B", f"`{setup.name}`, {setup.gpus}", *cells])
    columns = [f"{dtype} states, {tokens // 1024}k" for dtype in STATES for tokens in LENGTHS]
    return table(["GiB a GPU with checkpointing, card", "config, GPUs", *columns], rows)


def least_table(models: dict[str, AlibiConfig]) -> str:
    """Return how many GPUs FSDP2 needs, in whole machines of eight."""
    rows = []
    for name, config in models.items():
        sizes = count(config)
        cases = ((card, dtype, tokens) for card in CARDS for dtype in STATES for tokens in LENGTHS)
        found = [least_gpus(config, sizes, dtype, tokens, card) for card, dtype, tokens in cases]
        rows.append([name, *("none" if gpus is None else str(gpus) for gpus in found)])
    cases = [f"{card}, {dtype}, {tokens // 1024}k" for card in CARDS for dtype in STATES for tokens in LENGTHS]
    return table(["least GPUs, FSDP2 in machines of 8", *cases], rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of an ALiBi checkpoint; default: three published ones")
    parser.add_argument("--gpus", type=int, help="how many GPUs FSDP2 shards over; default: the configs of this folder")
    options = parser.parse_args()
    models = MODELS
    if options.model is not None:
        models = {options.model: AlibiConfig.from_dict(inspect_checkpoint(options.model).config)}
    if options.gpus is not None and options.gpus < 1:
        parser.error(f"--gpus {options.gpus}: at least one is needed.")
    setups = SETUPS if options.gpus is None else (Setup("fsdp2", options.gpus),)
    print(totals_table(models, setups), parts_table(models, setups), least_table(models), sep="\n\n")


if __name__ == "__main__":
    main()
