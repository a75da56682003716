"""`convert`: an upstream checkpoint to a folder that anyone loads with `trust_remote_code=True`."""

from pathlib import Path
from typing import Any

import torch

from alibi_hf.checkpoints.conversion import Conversion, record
from alibi_hf.checkpoints.options import Progress
from alibi_hf.checkpoints.output import WriteOptions, writing
from alibi_hf.checkpoints.source import Checkpoint


def convert(
    source: str | Path,
    output: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    workers: int | None = None,
    verify: bool = True,
    layerwise: bool = False,
    allow_pickle: bool = False,
    allow_nonfinite: bool = False,
    alibi_rounding: str = "exact",
    device: str = "cpu",
    progress: Progress | None = None,
    command: str | None = None,
) -> Conversion:
    """Convert a checkpoint and, unless told otherwise, prove the result.

    Args:
        source: a folder, or a Hub id.
        output: the folder to write; must be absent or empty unless `overwrite`.
        dtype: of the written weights, "float32", "bfloat16", ...; None keeps each tensor's own.
        max_shard_size: the most bytes of one weight file, a number or "5GB".
        revision: branch, tag or commit of a Hub id.
        overwrite: replace what is in `output`.
        resume: go on where a run that was killed stopped, if there was one; the shards that it finished are checked by
            their SHA-256, and what is damaged is written again.
        workers: shards that are written at once; each thread holds one tensor, up to three times. The default depends
            on processors and free memory; pickles are read by one.
        verify: run `alibi_hf.verify` afterwards; the folder stays either way, marked.
        layerwise: verify layer by layer, which holds one layer in memory.
        allow_pickle: read `pytorch_model*.bin` where there are no safetensors.
        allow_nonfinite: take NaN and Inf weights as they are.
        alibi_rounding: "exact", or the family's own rounding where it has one.
        device: where the verification computes.
        progress: called with what is being done, bytes done and bytes in all.
        command: what to write down as the command; the process's own if not given.

    Raises:
        AlibiError: its subclasses, about the source, the target folder, or the disk; nothing is left behind then.
    """
    out = Path(output).expanduser()
    write_options = WriteOptions(dtype, max_shard_size, overwrite, resume, workers, allow_nonfinite, progress)
    checkpoint = Checkpoint.open(source, revision, allow_pickle, alibi_rounding=alibi_rounding)
    if verify:
        _check_device(device)  # before anything is written
    with writing(checkpoint, out, write_options) as made:
        conversion = record(checkpoint, out, made.files, command, made.threads)
        conversion.save(made.folder)
        _write_card(made.folder)
    if verify:
        options = {"revision": revision, "allow_pickle": allow_pickle, "device": device, "progress": progress}
        _verify(conversion, source, layerwise, options)
    return conversion


def _check_device(device: str) -> None:
    from alibi_hf.verification.memory import check_device  # verification reads checkpoints, so not at import

    check_device(device)


def _write_card(folder: Path) -> None:
    from alibi_hf.hub.card import write_card  # cards tell of verifications
    from alibi_hf.hub.card_facts import CardFacts

    write_card(folder, facts=CardFacts.read(folder, written=True))


def _verify(conversion: Conversion, source: str | Path, layerwise: bool, options: dict[str, Any]) -> None:
    from alibi_hf.verification import LAYERWISE, PARTS, verify

    out = conversion.output_path
    result = verify(source, out, only=LAYERWISE if layerwise else PARTS, **options)
    result.save(out)
    conversion.verification = result
    conversion.verified = bool(result.proved)
    conversion.save(out)
    _write_card(out)


__all__ = ["convert"]
