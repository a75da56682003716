"""`reach`: what each head of an ALiBi model looks at, measured on a text.

    alibi-hf reach bigscience/bloom-560m --text book.txt --lengths 256,1024,4096 --output reach

The model reads the first tokens of the text, once a length. Its attention is computed by `attend_and_sum`, which sums
up the weights as it goes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from alibi_hf.checkpoints.conversion import own_command, versions
from alibi_hf.checkpoints.options import Progress, keep_apart
from alibi_hf.checkpoints.writer import appearing
from alibi_hf.errors import AlibiError, ConfigFieldError, UnknownFamilyError
from alibi_hf.evaluation.loading import Options, Subject, check_fit, find_subjects, load_model, load_tokenizer
from alibi_hf.evaluation.machine import describe_machine
from alibi_hf.evaluation.measure_reach import measure_reach
from alibi_hf.evaluation.reach_report import Reach
from alibi_hf.evaluation.text import open_texts, tokenize
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from alibi_hf.verification.subjects import quiet

LENGTHS = (256, 1024, 4096)
FIELDS = ("alibi_distance", "alibi_scaling", "alibi_rounding", "rope_parameters", "attention_window")


def reach(
    source: str | os.PathLike,
    text: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    *,
    lengths: Sequence[int] | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    output: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Reach:
    """Measure what each head of a model looks at, in the first tokens of a text.

    Args:
        source: a folder in this package's layout or an upstream one, or a Hub id; `revision` pins an id.
        text: UTF-8 files, or folders of `*.txt`, read as one text; default: the text that ships with the package.
        lengths: in tokens, 2 or more; default: those of 256, 1024 and 4096 that the text has.
        dtype: of weights and computation, and of the rounding that windows are proved for; default: float32 on CPU, as
            stored on a GPU.
        device: such as "cpu" or "cuda:0".
        allow_pickle: read pickles where there are no safetensors, with weights_only=True.
        output: folder for the files of [`Reach.save`], which appears when all is done; `overwrite` replaces it.
        progress: called with what is being done, how much of it is done, and how much there is.
        command: what the report says was run.

    Raises:
        CheckpointFileError: source, text or tokenizer cannot be read, or the output is in the way.
        UnknownFamilyError, ConfigFieldError: the source is no ALiBi model.
        AlibiError: a tokenizer that does not fit the model, a text shorter than all lengths, a length below 2, or heads
            whose attention is not finite.
    """
    started = time.monotonic()
    wanted = sorted(set(LENGTHS if lengths is None else lengths))
    if not wanted or wanted[0] < 2:
        raise AlibiError(f"lengths={wanted} must be numbers of at least 2: one token has none before it.")
    options = Options(dtype=dtype, device=device, revision=revision, allow_pickle=allow_pickle)
    texts = open_texts(_paths(text))
    with quiet():
        subject = _find(source, options)
        with _folder(output, overwrite, [subject.folder, *(file.path for file in texts)]) as folder:
            tokens = tokenize(load_tokenizer(subject, options), texts, most=wanted[-1])
            kept, notes = _lengths_of(len(tokens), wanted, asked=lengths is not None)
            model = _load(subject, options)
            check_fit(str(source), int(tokens.ids.max()), model.get_input_embeddings().num_embeddings)
            report = Reach(
                path_or_id=str(source),
                revision=subject.revision,
                model=_describe(model),
                dtype=str(model.dtype).removeprefix("torch."),
                device=device,
                text=[file.to_dict() for file in texts],
                lengths=measure_reach(model, tokens.ids, kept, progress),
                notes=[*tokens.notes, *notes],
                machine=describe_machine(device),
                versions=versions(),
                command=command or own_command(),
                seconds=time.monotonic() - started,
            )
            if folder is not None:
                report.save(folder)
    return report


def _folder(
    output: str | os.PathLike | None, overwrite: bool, read: Sequence[Path]
) -> AbstractContextManager[Path | None]:
    """Return the working folder that becomes `output`, which must not replace what is `read`; None without output."""
    if output is None:
        return nullcontext()
    for path in read:
        keep_apart(path, Path(output).expanduser())
    return appearing(Path(output).expanduser(), overwrite)


def _paths(text: str | os.PathLike | Sequence[str | os.PathLike] | None) -> list[Path]:
    if text is None:
        return [Path(str(files("alibi_hf.verification") / "sotu.txt"))]
    return [Path(path) for path in ([text] if isinstance(text, (str, os.PathLike)) else text)]


def _find(source: str | os.PathLike, options: Options) -> Subject:
    subject = find_subjects([str(source)], None, options)[0]
    if not subject.upstream:
        return subject
    raise UnknownFamilyError(
        f"{source} (model_type {subject.raw.get('model_type')!r}) is no ALiBi model that this package runs; "
        "`alibi-hf families` lists those."
    )


def _lengths_of(tokens: int, wanted: list[int], asked: bool) -> tuple[list[int], list[str]]:
    """Return the lengths that the text has, and what to say about those that it does not have."""
    kept = [length for length in wanted if length <= tokens]
    missing = ", ".join(str(length) for length in wanted if length > tokens)
    if not kept and not asked and tokens >= 2:
        return [tokens], [f"The text has {tokens} tokens, and was read whole."]
    if not kept:
        raise AlibiError(f"the text has {tokens} tokens, and {missing} are asked for; give more text, or --lengths.")
    return kept, [f"Left out: {missing} tokens; the text has {tokens}."] if missing else []


def _load(subject: Subject, options: Options) -> AlibiForCausalLM:
    model: AlibiForCausalLM = load_model(subject, options)
    if not model.config.alibi:
        raise ConfigFieldError(f"alibi=False in the config of {subject.given}: its heads have no slopes to measure.")
    return model


def _describe(model: AlibiForCausalLM) -> dict[str, Any]:
    config = model.config
    return {
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "trained_length": config.max_position_embeddings,
        **{name: getattr(config, name) for name in FIELDS},
    }


__all__ = ["LENGTHS", "reach"]
