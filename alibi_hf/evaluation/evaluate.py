"""`evaluate`: perplexity against length, for any causal models and any text, by both protocols.

    alibi-hf evaluate my-bloom upstream:bigscience/bloom-560m gpt2 --text book.txt --lengths 256,512,1024 --output out

Everything that can be wrong with models and text is found before the first window is read. Each reading is kept in the
working folder as soon as it is done, so that a run that was killed goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from alibi_hf.checkpoints.conversion import own_command, versions
from alibi_hf.checkpoints.options import Progress, keep_apart
from alibi_hf.checkpoints.resume import Journal
from alibi_hf.checkpoints.writer import appearing, partial_of
from alibi_hf.errors import AlibiError
from alibi_hf.evaluation.jobs import Plan, make_plan, prepare, run
from alibi_hf.evaluation.loading import Options, Subject, file_states, find_subjects, tokenizer_folder
from alibi_hf.evaluation.machine import describe_machine
from alibi_hf.evaluation.report import Evaluation
from alibi_hf.evaluation.text import TextFile, open_texts
from alibi_hf.verification.subjects import quiet

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)

Paths = str | Path | Sequence[str | Path]


def evaluate(
    models: Paths,
    text: Paths,
    lengths: Sequence[int] | None = None,
    *,
    stride: int | None = None,
    max_tokens: int | None = None,
    names: Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Evaluation:
    """Return how well each model reads a text at each length.

    Args:
        models: folders or Hub ids of causal language models. One of this package's layout or families runs in its
            decoder; any other, and each with `upstream:` before it, in Transformers' own class.
        text: UTF-8 files, or folders of `*.txt`; they are read as one text.
        lengths: of windows, in tokens; default 256 to 8192, as far as the text is long enough.
        stride: tokens from one sliding window to the next, at every length; default: half of each length.
        max_tokens: read no more than the first so many tokens.
        names: what the report calls each model; default: the last part of its path.
        dtype: of weights and computation; default: float32 on CPU, as stored on a GPU.
        device: such as "cpu" or "cuda:0".
        revision: branch, tag or commit of the Hub ids.
        tokenizer: a folder or Hub id whose tokenizer all models take in place of their own.
        trust_remote_code: run code of the source, from a local folder or a Hub id at a commit given as `revision`.
        allow_pickle: read pickles where there are no safetensors, with weights_only=True.
        output: folder for the report and what belongs to it, which appears when all is done.
        overwrite: replace `output`. resume: go on with a run that was cut off, with the numbers it has.
        progress: called with what is being done, how much of it is done, and how much there is.
        command: what the report says was run.

    Raises:
        AlibiError: its subclasses, for models, texts or options that cannot be read. A model that fails at some length
            raises nothing: its reading says so.
    """
    if resume and output is None:
        raise AlibiError("resume=True goes on with a run in the working folder of its output; give the output.")
    started = time.monotonic()
    options = Options(dtype, device, revision, trust_remote_code, allow_pickle, tokenizer)
    plan = make_plan(LENGTHS if lengths is None else lengths, stride, max_tokens)
    with quiet():
        subjects = find_subjects(_as_list(models), names, options)
        files = open_texts(_as_list(text))
        settings = _settings(subjects, files, plan, options)
        folders = {read for each in subjects for read in (each.folder, tokenizer_folder(each, options))}
        with _working_folder(output, overwrite, resume, sorted(folders), files, settings) as (folder, journal):
            jobs = [prepare(subject, files, plan, options, progress) for subject in subjects]
            results = [run(job, plan, options, journal, progress) for job in jobs]
            if all(result.failure for result in results):
                said = "; ".join(f"{result.name}: {result.failure}" for result in results)
                raise AlibiError(f"no model could be loaded: {said}")
            evaluation = Evaluation(
                lengths=plan.lengths,
                text=[file.to_dict() for file in files],
                models=results,
                notes=_notes(plan, files),
                machine=describe_machine(device),
                versions=versions(),
                command=command or own_command(),
                seconds=time.monotonic() - started,
            )
            if folder is not None:
                evaluation.save(folder)
    return evaluation


def _as_list(value: Paths) -> list[str | Path]:
    return [value] if isinstance(value, (str, Path)) else list(value)


def _settings(subjects: Sequence[Subject], files: Sequence[TextFile], plan: Plan, options: Options) -> dict[str, Any]:
    """Return what decides the numbers, besides the files of the models."""
    return {
        "models": [[subject.name, subject.given, subject.revision] for subject in subjects],
        "text": [file.sha256 for file in files],
        "lengths": plan.lengths,
        "stride": plan.stride,
        "max_tokens": plan.max_tokens,
        "dtype": str(options.load_dtype),
        "device": options.device,
        "tokenizer": None if options.tokenizer is None else str(options.tokenizer),
        "versions": versions(),
    }


@contextmanager
def _working_folder(
    output: str | Path | None,
    overwrite: bool,
    resume: bool,
    folders: Sequence[Path],
    files: Sequence[TextFile],
    settings: dict[str, Any],
) -> Iterator[tuple[Path | None, Journal | None]]:
    """Yield the working folder of `output` and the journal of its finished readings; without output, neither.

    An error leaves it where readings are finished. The output must not replace what is read: `folders` of models and
    tokenizers, and `files`.
    """
    if output is None:
        yield None, None
        return
    out = Path(output).expanduser()
    for read in [*folders, *(file.path for file in files)]:
        keep_apart(read, out)
    journal = Journal(partial_of(out), [state for folder in folders for state in file_states(folder)], settings)
    if resume:
        journal.read()
    with appearing(out, overwrite, resume, keep=lambda: bool(journal.finished)) as folder:
        journal.write()
        yield folder, journal


def _notes(plan: Plan, files: Sequence[TextFile]) -> list[str]:
    stride = "half its length" if plan.stride is None else f"{plan.stride:,} tokens"
    notes = [
        "A token has a loss where its window holds one before it. A window starts in the middle of the text, without a "
        "start token.",
        "Non-overlapping windows: each token but a window's first is predicted, with what context its window gives it. "
        "Longer windows have fewer tokens near their start, so that their perplexity falls even where a model makes no "
        "use of more context.",
        f"Sliding windows: each moves on by {stride} and predicts the tokens that are new in it. All lengths predict "
        "the same tokens of the text: from the first that a window of the longest length can have as a new one.",
        "Both protocols read the same part of the text at every length: as many whole windows of the longest as there "
        "are.",
        "Perplexities of models with different tokenizers cannot be compared; bits per byte can.",
    ]
    if len(files) > 1:
        notes.append(f"{len(files)} files were joined by the tokenizer's end token, where it has one.")
    return notes


__all__ = ["LENGTHS", "evaluate"]
