"""One model of an evaluation: its text in tokens, and its readings at every length."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from alibi_hf.checkpoints.options import Progress
from alibi_hf.checkpoints.resume import Journal
from alibi_hf.errors import AlibiError, in_one_line
from alibi_hf.evaluation.loading import (
    Options,
    Subject,
    check_fit,
    load_model,
    load_tokenizer,
    own_code,
)
from alibi_hf.evaluation.losses import LossReader
from alibi_hf.evaluation.perplexity import check_lengths, evaluating
from alibi_hf.evaluation.positions import describe_positions, find_position_table, trained_length
from alibi_hf.evaluation.reading import read
from alibi_hf.evaluation.report import PROTOCOLS, ModelEvaluation, Reading
from alibi_hf.evaluation.text import TextFile, Tokens, tokenize
from alibi_hf.evaluation.windows import Region, check_stride, make_region


@dataclass(frozen=True)
class Plan:
    """What every model is asked: see `evaluate`."""

    lengths: list[int]
    stride: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Job:
    """A model, the text in its tokens, and the lengths that fit into that.

    `vocabulary` is the size of the tokenizer's, `region` what of the text is read.
    """

    subject: Subject
    tokens: Tokens
    vocabulary: int
    lengths: list[int]
    region: Region
    notes: list[str]


def make_plan(lengths: Sequence[int], stride: int | None = None, max_tokens: int | None = None) -> Plan:
    """Return the plan, its lengths in ascending order, each once.

    Raises:
        AlibiError: for a length below two, a stride that does not fit, or lengths that `max_tokens` excludes.
    """
    wanted = sorted(set(lengths))
    if not wanted or wanted[0] < 2:
        raise AlibiError(f"lengths={list(lengths)}: a window predicts from its second token on; give lengths above 1.")
    check_stride(wanted, stride)
    if max_tokens is not None and max_tokens < wanted[0]:
        raise AlibiError(f"max_tokens={max_tokens} is less than the shortest length, {wanted[0]}; allow more tokens.")
    return Plan(wanted, stride, max_tokens)


def prepare(
    subject: Subject, files: Sequence[TextFile], plan: Plan, options: Options, progress: Progress | None
) -> Job:
    """Tokenise the text for a model.

    Raises:
        AlibiError: where the tokenizer does not fit the model, or no length fits into the text.
    """
    tokenizer = load_tokenizer(subject, options)
    total = sum(file.bytes for file in files)
    tell = None if progress is None else lambda done: progress(f"{subject.name}: tokenising", done, total)
    tokens = tokenize(tokenizer, files, plan.max_tokens, tell)
    fitting = [length for length in plan.lengths if length <= len(tokens)]
    if not fitting:
        raise AlibiError(
            f"the text has {len(tokens)} tokens for {subject.name}, fewer than one window of {plan.lengths[0]}; give "
            "more text, or a shorter length."
        )
    rows = subject.raw.get("vocab_size") or (subject.raw.get("text_config") or {}).get("vocab_size")
    if rows:  # as its config says, before anything is loaded
        check_fit(subject.given, int(tokens.ids.max()), int(rows))
    region = make_region(len(tokens), fitting, plan.stride)
    ran = [f"Code of its own was run: {', '.join(own_code(subject))}."] if subject.trusted else []
    notes = [*ran, *tokens.notes, *_text_notes(tokenizer, tokens, plan, fitting, region)]
    return Job(subject, tokens, len(tokenizer), fitting, region, notes)


def run(job: Job, plan: Plan, options: Options, journal: Journal | None, progress: Progress | None) -> ModelEvaluation:
    """Load a model, read the text at every length by both protocols, and let go of the model."""
    subject = job.subject
    about: dict[str, Any] = {
        "name": subject.name,
        "path_or_id": subject.given,
        "revision": subject.revision,
        "vocabulary": job.vocabulary,
        "tokens": len(job.tokens),
    }
    try:
        if progress is not None:
            progress(f"{subject.name}: loading", 0, 0)
        model = load_model(subject, options)
        check_fit(subject.given, int(job.tokens.ids.max()), model.get_input_embeddings().num_embeddings)
        reader = LossReader(model, job.tokens.ids)
    except Exception as error:  # the other models are read all the same
        return ModelEvaluation(**about, **_unknown(subject, options), failure=in_one_line(error), notes=job.notes)
    readings = []
    for length in job.lengths:
        for protocol in PROTOCOLS:
            key = f"{subject.name}, {protocol}, {length}"
            kept = journal.finished.get(key) if journal is not None else None
            if kept is not None:
                readings.append(Reading.from_dict(kept["reading"]))
                continue
            tell = None if progress is None else _windows_told(progress, key)
            readings.append(read(reader, job.tokens, length, protocol, job.region, plan.stride, tell))
            if journal is not None:
                journal.add({"name": key, "reading": asdict(readings[-1])})
    described = _describe(model)
    notes = [*job.notes, *reader.notes]
    del model, reader
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return ModelEvaluation(**about, **described, readings=readings, notes=notes)


def read_lengths(model: Any, tokens: torch.Tensor, lengths: Sequence[int], stride: int | None = None) -> list[Reading]:
    """Read a text at each length by both protocols with a model that is loaded already, such as one in training.

    Args:
        model: any causal language model of Transformers; it is evaluated without dropout and left as it was.
        tokens: `[tokens]`, ids of one long text.
        lengths: of windows, in tokens.
        stride: tokens from one sliding window to the next; None: half of each length.

    Returns:
        For each length, ascending, the reading of non-overlapping and that of sliding windows; bits per byte, which ids
        do not tell, are None.

    Raises:
        AlibiError: for lengths or a stride that cannot be read, or a text shorter than the longest length.
    """
    check_lengths(tokens, lengths)
    plan = make_plan(lengths, stride)
    text = Tokens(tokens.to("cpu", torch.int32), torch.zeros(len(tokens), dtype=torch.int32))
    region = make_region(len(tokens), plan.lengths, stride)
    with evaluating(model):
        reader = LossReader(model, text.ids)
        return [read(reader, text, length, p, region, stride) for length in plan.lengths for p in PROTOCOLS]


def _text_notes(tokenizer: Any, tokens: Tokens, plan: Plan, fitting: list[int], region: Region) -> list[str]:
    notes = []
    if left_out := [length for length in plan.lengths if length not in fitting]:
        notes.append(
            f"the text has {len(tokens):,} tokens: {', '.join(f'{length:,}' for length in left_out)} left out, which "
            "are longer"
        )
    notes.append(
        f"read were tokens 0 to {region.stop - 1:,}; the sliding protocol predicts those from {region.first:,} on"
    )
    plain, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    if len(framed) > len(plain) and framed[0] != plain[0]:
        token = tokenizer.convert_ids_to_tokens(framed[0])
        notes.append(f"its tokenizer puts {token} before a text; windows start without it, in the middle of the text")
    return notes


def _windows_told(progress: Progress, key: str) -> Callable[[int, int], None]:
    progress(key, 0, 1)
    return lambda done, total: progress(key, done, total)


def _describe(model: Any) -> dict[str, Any]:
    table = find_position_table(model)
    return {
        "model_class": type(model).__name__,
        "positions": describe_positions(model.config, table),
        "trained_length": trained_length(model.config),
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


def _unknown(subject: Subject, options: Options) -> dict[str, Any]:
    """Return what is said of a model that was not loaded."""
    return {
        "model_class": (subject.raw.get("architectures") or [""])[0],
        "positions": "",
        "trained_length": None,
        "parameters": 0,
        "dtype": str(options.load_dtype).removeprefix("torch."),
        "device": options.device,
    }


__all__ = ["Job", "Plan", "make_plan", "prepare", "read_lengths", "run"]
