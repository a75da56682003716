"""`retrofit`: an ALiBi model made of a checkpoint with learned or rotary positions, to be trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from alibi_hf.checkpoints.conversion import record
from alibi_hf.checkpoints.options import Progress
from alibi_hf.checkpoints.output import WriteOptions, Written, writing
from alibi_hf.checkpoints.source import Checkpoint
from alibi_hf.errors import AlibiError, UnknownFamilyError
from alibi_hf.families import find_family
from alibi_hf.hub.card import write_card
from alibi_hf.hub.card_facts import CardFacts
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.retrofitting import gpt2, llama, mistral
from alibi_hf.retrofitting.layout import Layout
from alibi_hf.retrofitting.report import STATEMENT, Retrofit
from alibi_hf.retrofitting.weights import WeightCheck, check_weights, why_not

LAYOUTS = cast(tuple[Layout, ...], (gpt2, llama, mistral))


def retrofit(
    source: str | Path,
    output: str | Path,
    *,
    bias_max: float = 8,
    length: int | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    workers: int | None = None,
    check: bool = True,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Retrofit:
    """Write an ALiBi model with the weights of a GPT-2, Llama or Mistral checkpoint; it must be trained on.

    What comes out computes something else than the source: positions are removed and ALiBi is in their place. The
    folder loads with `trust_remote_code=True`; `retrofit.json` and `retrofit.md` in it say what it is.

    Args:
        source: a folder, or a Hub id.
        output: the folder to write; must be absent or empty unless `overwrite`.
        bias_max: `alibi_bias_max` of the result: the slopes are `2 ** (-bias_max * i / heads)`.
        length: `max_position_embeddings` of the result, in tokens: the length it will be trained at. The source's if
            not given.
        dtype: of the written weights, "float32", "bfloat16", ...; None keeps each tensor's own.
        max_shard_size: the most bytes of one weight file, a number or "5GB".
        revision: branch, tag or commit of a Hub id.
        overwrite: replace what is in `output`.
        resume: go on where a run that was killed stopped, if there was one.
        workers: shards that are written at once.
        check: compare with the source's class on a short text, its positions removed, if memory allows.
        allow_pickle: read `pytorch_model*.bin` where there are no safetensors.
        allow_nonfinite: take NaN and Inf weights as they are.
        progress: called with what is being done, bytes done and bytes in all.
        command: what to write down as the command; the process's own if not given.

    Raises:
        UnknownFamilyError: where the source is none of these layouts, or has ALiBi already.
        ConfigFieldError: for a field that is not understood or cannot be expressed, such as a sliding window.
        NotProvedError: where the written weights give other logits than the source's.
        AlibiError: its other subclasses, about tensors, files and the disk. Nothing is left behind in any case.
    """
    out = Path(output).expanduser()
    options = WriteOptions(dtype, max_shard_size, overwrite, resume, workers, allow_nonfinite, progress)
    fields: dict[str, Any] = {"alibi_bias_max": bias_max}
    if length is not None:
        fields["max_position_embeddings"] = length
    checkpoint = Checkpoint.open(source, revision, allow_pickle, find=find_layout, **fields)
    layout = cast(Layout, checkpoint.family)
    notes = layout.notes(checkpoint.raw)
    with writing(checkpoint, out, options) as made:
        unchecked = why_not(checkpoint) if check else "that was not asked for"
        if not unchecked and progress is not None:
            progress("checking the weights", 0, 0)
        checks = [] if unchecked else check_weights(checkpoint, made.folder, options.target or checkpoint.dtype)
        if not checks:
            notes.append(f"the weights were not checked: {unchecked or 'the logits of the source are not finite'}")
        report = _report(checkpoint, out, made, checks, notes, command)
        report.save(made.folder)
        write_card(made.folder, facts=CardFacts.read(made.folder, written=True))
    return report


def find_layout(raw: dict[str, Any], tensor_names: Sequence[str] = ()) -> Layout:
    """The layout of a source, by its parsed config.json and its tensor names.

    Raises:
        UnknownFamilyError: with what was found, and what to do with it.
    """
    for layout in LAYOUTS:
        if layout.recognise(raw, tensor_names):
            return layout
    found = f"model_type={raw.get('model_type')!r} and tensors such as {list(tensor_names)[:3]}"
    known = ", ".join(layout.NAMES[0] for layout in LAYOUTS)
    if raw.get("model_type") == AlibiConfig.model_type or _has_alibi(raw, tensor_names):
        raise UnknownFamilyError(f"{found} has ALiBi already; load it as it is, or use `alibi-hf convert`.")
    raise UnknownFamilyError(f"{found} is none of the layouts that can be retrofitted: {known}.")


def _has_alibi(raw: dict[str, Any], tensor_names: Sequence[str]) -> bool:
    try:
        find_family(raw, tensor_names)
    except AlibiError:
        return False
    return True


def _report(
    checkpoint: Checkpoint, out: Path, made: Written, checks: list[WeightCheck], notes: list[str], command: str | None
) -> Retrofit:
    kept = record(checkpoint, out, made.files, command, made.threads)
    positions = cast(Layout, checkpoint.family).POSITIONS
    return Retrofit(
        output_path=out,
        source=kept.source,
        output=kept.output,
        tensors=kept.tensors,
        config=kept.config,
        statement=STATEMENT.format(positions=positions),
        notes=notes,
        checks=checks,
        versions=kept.versions,
        command=kept.command,
    )


__all__ = ["LAYOUTS", "find_layout", "retrofit"]
