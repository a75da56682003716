"""`verify`: does the output compute what its source computes? Checks, negative controls, verdict."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.checkpoints.source import Checkpoint, check_rounding
from alibi_hf.errors import AlibiError, ConfigFieldError
from alibi_hf.families._reference import Reference
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.verification.bias import BiasProbe, check_bias, sample_bias
from alibi_hf.verification.compare import Comparison, Progress, Runner
from alibi_hf.verification.inputs import Inputs, default_lengths, make_inputs
from alibi_hf.verification.layerwise import LOGITS, LayerRunner, layer_rows, steps_of
from alibi_hf.verification.memory import (
    available_memory,
    check_device,
    estimate_layer_memory,
    estimate_memory,
    require_memory,
)
from alibi_hf.verification.report import PARTS, Verification, is_enough
from alibi_hf.verification.subjects import depends_on_call, longer_fields, quiet
from alibi_hf.verification.tensors import check_tensors, stored_dtype
from alibi_hf.verification.text import make_tokens

# What a part of the model, built by itself, would not notice.
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)
LONGEST_BIAS = 12288  # capturing it costs upstream's causal mask, one number a pair of tokens


def verify(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    revision: str | None = None,
    lengths: Sequence[int] | None = None,
    text: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    allow_pickle: bool = False,
    only: Sequence[str] = PARTS,
) -> Verification:
    """Compare the converted folder `output` with the upstream checkpoint `source` that it was made from.

    Args:
        source: folder or Hub id of the checkpoint as it was published; `revision` pins a Hub id.
        output: folder that `convert` wrote; it is loaded through the installed package.
        lengths: tokens a row; default: a quarter of the training length, the training length, and beyond.
        text: text to run on, if the source has a tokenizer; default: the text that ships with the package.
        device: where the models run.
        progress: called before each step with what comes, steps done and steps in all.
        allow_pickle: open a source that has pickles only.
        only: a choice of "bias", "tensors", "layers" and "model"; "proved" needs the first two, and one of the others:
            without "model", one layer is in memory at a time.

    Raises:
        NotEnoughMemoryError: if the model, or without "model" one layer, is too big for float64 on `device`.
        ConfigFieldError: if the output's sizes are not the source's.
        AlibiError: if source or output cannot be read.
    """
    started = time.monotonic()
    check_device(device)
    if unknown := set(only) - set(PARTS):
        raise AlibiError(f"only={sorted(unknown)} is not known; choose from {', '.join(PARTS)}.")
    checkpoint = Checkpoint.open(str(source), revision=revision, allow_pickle=allow_pickle)
    folder = Path(output)
    config = read_own_config(folder)
    _require_same_model(checkpoint, config, folder)
    reference = checkpoint.family.reference(checkpoint.config)
    tokens = make_tokens(checkpoint.path, config.vocab_size, text)
    inputs = make_inputs(tokens, checkpoint.config, lengths, device)
    rows = layer_rows(inputs.rows, config.num_attention_heads, asked=lengths is not None)
    _require_memory(checkpoint, inputs, rows, only, device)
    runner = Runner(checkpoint, folder, reference, inputs, stored_dtype(folder), device, progress)
    with quiet():
        _run(runner, rows, only)
    return Verification(
        source=checkpoint.source,
        output=str(output),
        family=checkpoint.family_name,
        reference=_describe(checkpoint, reference, inputs, runner.stored),
        text=tokens.origin,
        checks=runner.checks,
        negative_controls=runner.controls,
        bias=runner.bias,
        versions=_versions(),
        seconds=time.monotonic() - started,
        notes=_notes(checkpoint, reference, inputs, lengths, only) + _layer_notes(inputs, rows, only),
        parts=tuple(part for part in PARTS if part in only),
    )


def _require_same_model(checkpoint: Checkpoint, config: AlibiConfig, folder: Path) -> None:
    """`ConfigFieldError` with both values where sizes, or the rounding of the bias, are none of this source's."""
    for name in SIZES:
        ours, theirs = getattr(config, name), getattr(checkpoint.config, name)
        if ours != theirs:
            raise ConfigFieldError(
                f"{folder / 'config.json'} says {name}={ours}, the source has {theirs}: the folder was not made of "
                f"{checkpoint.source}, or was changed. Convert it again."
            )
    check_rounding(checkpoint.family, config)


def _run(runner: Runner, rows: list[torch.Tensor], only: Sequence[str]) -> None:
    """Run the parts asked for, the layers on `rows`; results gather in the runner."""
    checkpoint, reference = runner.checkpoint, runner.reference
    trained = checkpoint.config.max_position_embeddings
    longest = max(runner.inputs.rows[-1].shape[1], min(trained + trained // 4, LONGEST_BIAS))
    probe = BiasProbe(checkpoint, read_own_config(runner.output), reference, longest)
    comparisons = _comparisons(checkpoint, reference, probe.rounds()) if {"layers", "model"} & set(only) else []
    runner.steps = len({"bias", "tensors"} & set(only))
    runner.steps += sum(comparison.steps for comparison in comparisons) if "model" in only else 0
    runner.steps += steps_of(checkpoint.config) * len(comparisons) if "layers" in only else 0
    if "tensors" in only:
        runner.say("tensors")
        runner.checks.append(check_tensors(checkpoint, runner.output))
    if "bias" in only:
        runner.say("bias")
        runner.checks += check_bias(probe, sorted({min(trained, longest), longest}), _own_rounding(checkpoint))
        runner.bias = sample_bias(probe, longest)
    if "layers" in only:
        for comparison in comparisons:
            LayerRunner(runner, comparison, rows).run()
    if "model" in only:
        for comparison in comparisons:
            runner.run(comparison)
    runner.say("done")


def _own_rounding(checkpoint: Checkpoint) -> str:
    """Return the `alibi_rounding` that is the family's own, "" if it has none."""
    return next((rounding for rounding in checkpoint.family.ROUNDINGS if rounding != "exact"), "")


def _comparisons(checkpoint: Checkpoint, reference: Reference, rounds: bool) -> list[Comparison]:
    """Return what has to be compared with which truth.

    Where the family's own bias is a rounding of ALiBi (`rounds`), our model is proved with that rounding, and once more
    exactly: there upstream, too, is given the exact bias, so that the gate is as narrow as elsewhere.
    """
    if not rounds:
        return [Comparison(reference.truth, controls=True)]
    family = checkpoint.family_name
    return [
        Comparison(reference.truth, rounding=family, suffix=f", {family} bias"),
        Comparison(
            reference.exact_truth, reference.exact_truth, rounding="exact", suffix=", exact bias", controls=True
        ),
    ]


def _require_memory(
    checkpoint: Checkpoint, inputs: Inputs, rows: list[torch.Tensor], only: Sequence[str], device: str
) -> None:
    config = checkpoint.config
    if "model" in only:
        training = (len(inputs.training), inputs.training.shape[1])
        kept = inputs.kept(config.vocab_size)
        needed = estimate_memory(config, checkpoint.parameters, inputs.batches, training, kept)
    elif "layers" in only:
        used = [group for group in checkpoint.groups if group.fate == "used" and group.rule.per_layer]
        layer = [checkpoint.tensors[group.source] for group in used if group.layer == 0]
        largest = max(info.bytes for info in checkpoint.tensors.values())
        batches = [(len(row), row.shape[1]) for row in rows]
        needed = estimate_layer_memory(config, layer, largest, batches, LOGITS)
    else:
        return
    require_memory(needed, available_memory(device), device)


def _describe(checkpoint: Checkpoint, reference: Reference, inputs: Inputs, stored: torch.dtype) -> dict[str, str]:
    """Return what the output was compared with, in words."""
    weights = str(stored).removeprefix("torch.")
    cast = "as published" if stored == checkpoint.dtype else f"rounded to {weights}, the dtype of the output"
    decode = "upstream's own in float64" if depends_on_call(checkpoint.config) else "the whole row"
    described = {
        "class": reference.class_name,
        "attn_implementation": reference.attn_implementation,
        "truth": "the same class in float64, with its bias from the closed form in float64 and its softmax in float64; "
        f"padded input: the same rows unpadded; cached decode: {decode}",
        "weights": cast,
    }
    if longer := longer_fields(reference, inputs.longest):
        name, value = next(iter(longer.items()))
        described["length"] = (
            f"{reference.class_name} refuses more than {name}={reference.max_length} tokens; it was built with "
            f"{name}={value}, which changes nothing else"
        )
    return described | ({"reason": reference.reason} if reference.reason else {})


def _notes(
    checkpoint: Checkpoint, reference: Reference, inputs: Inputs, lengths: Sequence[int] | None, only: Sequence[str]
) -> list[str]:
    notes = list(checkpoint.notes)
    trained = checkpoint.config.max_position_embeddings
    if inputs.rows[-1].shape[1] <= trained:
        chosen = "as asked for" if lengths else f"by default {default_lengths(trained)} are run"
        notes.append(f"nothing beyond the training length of {trained} tokens was run ({chosen}); give lengths= for it")
    if depends_on_call(checkpoint.config):
        notes.append(
            "alibi_scaling divides the slopes by the length of the text: padded rows, to upstream as long "
            "as their batch, are not run, and the truth of cached decode is upstream's own cached decode in float64"
        )
    if not reference.has_cache:
        notes.append("the reference has no cache: upstream's decoding and generation are its whole rows")
    if not is_enough(only):
        missing = ", ".join(sorted(set(PARTS) - set(only)))
        notes.append(f"not checked: {missing}; without bias, tensors, and layers or model nothing is proved")
    return notes


def _layer_notes(inputs: Inputs, rows: list[torch.Tensor], only: Sequence[str]) -> list[str]:
    notes = []
    longest, cut = inputs.rows[-1].shape[1], max(row.shape[1] for row in rows)
    if "layers" in only and cut < longest:
        notes.append(f"layers were run on rows of {cut} tokens at most, to bound memory; give lengths= for longer ones")
    if "layers" in only and "model" not in only:
        notes.append(
            "layer by layer: every layer was given the same states as upstream's; the model as a whole, its cache, "
            "padded batches, gradients and generation were not run (the bias was, padded and past the training length)"
        )
    return notes


def _versions() -> dict[str, str]:
    from alibi_hf import __version__

    return {
        "alibi_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
