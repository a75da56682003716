"""Cards of the checkpoints in `examples/checkpoints`, from their own files; `shipped.md` is the template."""

import json
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from alibi_hf.families import find_family
from alibi_hf.hub.card_text import table
from alibi_hf.model.bias_alibi import config_slopes
from alibi_hf.model.configuration_alibi import AlibiConfig
from model_cards.published import HERE, family_info, tidy

CHECKPOINTS = HERE.parent / "examples" / "checkpoints"
SHIPPED = {"sotu-bloom": "BLOOM", "sotu-mpt": "MPT"}


def shipped_card(name: str) -> str:
    """The card of a checkpoint in `examples/checkpoints`, from its own files."""
    folder = CHECKPOINTS / name
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = raw["model_type"]
    config, info = find_family(raw).config(raw), family_info(family)
    held_out = {int(length): value for length, value in training["held_out_perplexity"].items()}
    data = ModelCardData(
        license="apache-2.0",
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["alibi", family],
        metrics=["perplexity"],
        model_name=name,
        eval_results=[_result(length, value) for length, value in held_out.items()],
    )
    card = ModelCard.from_template(
        data,
        template_str=(HERE / "shipped.md").read_text(encoding="utf-8"),
        name=name,
        title=SHIPPED[name],
        family=family,
        folder=f"my-{family}",
        exports=info.exports,
        training=training,
        shape=_shape(config),
        dtype=raw["dtype"],
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        megabytes=f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
        table=_training(training, held_out, config.max_position_embeddings),
        lengths=_lengths(held_out, config.max_position_embeddings),
        sample="\n".join(f"> {line}".rstrip() for line in training["sample"].split("\n")),
    )
    return tidy(str(card))


def _result(length: int, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="sotu",
        dataset_name="State of the Union addresses, every tenth held out",
        dataset_split="held-out",
        metric_type="perplexity",
        metric_name=f"perplexity, windows of {length} tokens",
        metric_value=value,
    )


def _shape(config: AlibiConfig) -> str:
    heads = config.num_attention_heads
    extras = ["a norm after the embedding"] if config.embedding_norm else []
    extras += [] if config.mlp_bias else ["no biases"]
    extras += ["tied embeddings"] if config.tie_word_embeddings else []
    shape = f"width {config.hidden_size}, {config.num_hidden_layers} layers, {heads} heads, {', '.join(extras)}."
    exponents = [f"{torch.log2(slope).item():g}" for slope in config_slopes(config)]
    if heads & (heads - 1) == 0:
        return (
            f"{shape} {heads} is a power of two, so the slopes\nare the plain powers `2 ** {exponents[0]}` to "
            f"`2 ** {exponents[-1]}`."
        )
    return (
        f"{shape} {heads} is not a power of two, so the slopes\ncome from the set for more heads, out of order: 2 to "
        f"the powers {', '.join(exponents)}."
    )


def _training(training: dict[str, Any], held_out: dict[int, float], length: int) -> str:
    rows = {
        "steps x tokens a step": f"{training['steps']:,} x {training['tokens_per_step']:,} "
        f"({training['tokens_per_step'] // length} rows of {length})",
        "training text": f"{training['training_tokens']:,} tokens",
        "held-out text": f"{training['held_out_tokens']:,} tokens",
        "optimizer": "AdamW, learning rate 3e-3, cosine, 100 steps of warm-up, weight decay 0.1, bfloat16 autocast",
        "seed, threads": f"{training['seed']}, {training['threads']}",
        "time on one CPU thread": f"{training['seconds'] / 60:.0f} minutes",
        "mean training loss": f"{training['mean_training_loss']}",
        **{f"held-out perplexity, windows of {tokens} tokens": f"{value}" for tokens, value in held_out.items()},
        "torch, transformers": f"{training['versions']['torch'].split('+')[0]}, {training['versions']['transformers']}",
    }
    return table(["figure", "value"], [[name, value] for name, value in rows.items()])


def _lengths(held_out: dict[int, float], trained: int) -> str:
    longest = max(held_out)
    if longest == trained:
        return (
            f"Transformers' MPT\nclass stops at its training length, so upstream has no figure beyond {trained} tokens."
        )
    return (
        f"On windows {longest / trained:g} times as\nlong as the training texts it goes from {held_out[trained]} to "
        f"{held_out[longest]}."
    )
