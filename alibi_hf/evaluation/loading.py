"""Which models are read: what the command line names, checked before anything long is computed, then loaded in turn.

A folder or Hub id runs in this package's decoder where it has this package's layout or is of one of its families, and
in Transformers' own class otherwise; with `upstream:` before it, in Transformers' own class always. Code of the source
is not run unless `trust_remote_code` is given, and then at a pinned commit.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alibi_hf.checkpoints.carried import require_own_tokenizer, tokenizer_code
from alibi_hf.checkpoints.fetch import fetch
from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.checkpoints.options import parse_dtype
from alibi_hf.checkpoints.own_config import require_no_adapter
from alibi_hf.checkpoints.reading import FileState
from alibi_hf.checkpoints.shards import load_pickle, require_files_beside
from alibi_hf.checkpoints.source import Checkpoint, locate
from alibi_hf.errors import (
    AlibiError,
    CheckpointFileError,
    ConfigFieldError,
    UnknownFamilyError,
    UnsafeSourceError,
    in_one_line,
)
from alibi_hf.families import find_family
from alibi_hf.model.configuration_alibi import AlibiConfig
from alibi_hf.model.modeling_alibi import AlibiForCausalLM
from alibi_hf.verification.memory import check_device
from alibi_hf.verification.text import TOKENIZER_FILES

logger = logging.getLogger(__name__)
UPSTREAM = "upstream:"
COMMIT = re.compile(r"[0-9a-f]{40}")
READ_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.py")


@dataclass(frozen=True)
class Options:
    """How models are loaded: see `evaluate`."""

    dtype: str | torch.dtype | None = None
    device: str = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    tokenizer: str | Path | None = None

    @property
    def load_dtype(self) -> torch.dtype | str:
        """What `from_pretrained` is given: if nothing was said float32 on CPU, and as stored on a GPU."""
        if self.dtype is None and torch.device(self.device).type == "cpu":
            return torch.float32
        return parse_dtype(self.dtype) or "auto"


@dataclass(frozen=True)
class Subject:
    """A model that will be read.

    Attributes:
        name: what the report calls it.
        given: what the caller named, `upstream:` included.
        folder: where its files are.
        revision: the commit of a Hub snapshot.
        upstream: whether Transformers' own class runs it.
        raw: its config.json.
        trusted: whether its own code may be run: it has some, and the caller allows it.
    """

    name: str
    given: str
    folder: Path
    revision: str | None
    upstream: bool
    raw: dict[str, Any]
    trusted: bool = False


def find_subjects(models: Sequence[str | Path], names: Sequence[str] | None, options: Options) -> list[Subject]:
    """Find out what each of `models` is, from config.json and the headers of its files.

    Raises:
        AlibiError: its subclasses: a folder that holds no model, or none that can be read; two of one name; options
            that do not fit.
    """
    if not models:
        raise AlibiError("no model was given; name one folder or Hub id at least.")
    if names and len(names) != len(models):
        raise AlibiError(f"{len(names)} names are given for {len(models)} models; give one for each, or none.")
    check_device(options.device)
    _ = options.load_dtype  # refuses a dtype that is none
    chosen = list(names) if names else _names([str(model) for model in models])
    if double := [name for name, count in Counter(chosen).items() if count > 1]:
        raise AlibiError(
            f"two models are called {double[0]!r}; give each a name of its own (--name, once a model), and none twice."
        )
    return [_find(str(model), name, options) for model, name in zip(models, chosen, strict=True)]


def file_states(folder: Path) -> list[FileState]:
    """Return the state of the files of a folder that decide what its model or tokenizer gives, by their whole path."""
    found = {path for pattern in READ_FILES for path in folder.glob(pattern) if path.is_file()}
    return [replace(FileState.of(path, with_header=True), name=str(path)) for path in sorted(found)]


def tokenizer_folder(subject: Subject, options: Options) -> Path:
    """Return where the tokenizer of a model is: in its own folder, unless the options name another."""
    return subject.folder if options.tokenizer is None else locate(options.tokenizer, None, False)[0]


def load_tokenizer(subject: Subject, options: Options) -> Any:
    """Return the tokenizer of a model's folder, or the one named by the options.

    Raises:
        CheckpointFileError: where there is none, or it cannot be loaded.
    """
    folder = tokenizer_folder(subject, options)
    remote = subject.trusted and options.tokenizer is None
    require_own_tokenizer(folder)
    if not remote and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointFileError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); put it there, or name another folder's "
            "(--tokenizer)."
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=remote)
    except Exception as error:  # the library raises many kinds; all mean that there is nothing to tokenise with
        raise CheckpointFileError(f"the tokenizer of {folder} cannot be loaded: {in_one_line(error)}") from error


def check_fit(given: str, largest: int, rows: int) -> None:
    """Refuse a text whose largest id is `largest` for a model of `rows` embeddings.

    Raises:
        AlibiError: with both numbers.
    """
    if largest >= rows:
        raise AlibiError(
            f"the tokenizer of {given} gives id {largest}, but the model has {rows} embeddings: they do not belong "
            "together. Put the model's own tokenizer beside the weights; `evaluate` takes another's (--tokenizer)."
        )


def load_model(subject: Subject, options: Options) -> Any:
    """Return the model in evaluation mode on its device.

    Raises:
        AlibiError: where weights are missing, or have other shapes than the config says.
        Exception: what Transformers raises.
    """
    kind = AutoModelForCausalLM if subject.upstream else AlibiForCausalLM
    trusted = {"trust_remote_code": subject.trusted} if subject.upstream else {}
    model, info = kind.from_pretrained(
        str(subject.folder),
        dtype=options.load_dtype,
        use_safetensors=any(subject.folder.glob("*.safetensors")),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # what Transformers raises otherwise names no tensor
        **trusted,
    )
    if wrong := sorted(info["mismatched_keys"]):
        name, stored, needed = wrong[0]
        raise AlibiError(
            f"{subject.given} has {len(wrong)} tensors of another shape than its config says, such as {name}: "
            f"{list(stored)} is stored, {list(needed)} needed. Weights and config belong to different checkpoints."
        )
    if missing := sorted(info["missing_keys"]):
        raise AlibiError(
            f"{subject.given} lacks {len(missing)} tensors that {type(model).__name__} needs, such as {missing[0]}: "
            "they would be random. Its weights are incomplete, or are not those of a language model."
        )
    return model.to(options.device).eval()


def _names(models: Sequence[str]) -> list[str]:
    """Return the last part of each path or id; the whole where two would be the same."""
    short = [_plain_name(model) for model in models]
    return [name if short.count(name) == 1 else _whole_name(model) for name, model in zip(short, models, strict=True)]


def _plain_name(model: str) -> str:
    bare = model.removeprefix(UPSTREAM)
    name = Path(bare).expanduser().resolve().name if Path(bare).expanduser().is_dir() else bare.rpartition("/")[2]
    return f"{name} (upstream)" if bare != model else name


def _whole_name(model: str) -> str:
    bare = model.removeprefix(UPSTREAM)
    return f"{bare} (upstream)" if bare != model else bare


def _find(model: str, name: str, options: Options) -> Subject:
    bare = model.removeprefix(UPSTREAM)
    if Path(bare).is_file():
        raise CheckpointFileError(f"{bare} is a file, not a model; a text is given with --text, each with its own.")
    folder, commit = locate(bare, options.revision, options.allow_pickle)
    raw = read_json(folder / "config.json")
    require_no_adapter(folder)
    require_files_beside(folder)
    subject = Subject(name, model, folder, commit, upstream=bare != model or not _is_ours(raw), raw=raw)
    if options.trust_remote_code and (code := own_code(subject)):
        _check_pinned(subject, code, options)
        logger.warning("%s: code of its own is run: %s, from %s.", model, ", ".join(code), folder)
        subject = replace(subject, trusted=True)
    if subject.upstream:
        _check_upstream(subject, options)
    else:
        _check_ours(subject, options)
    return subject


def _is_ours(raw: dict[str, Any]) -> bool:
    """True where this package's decoder is what runs a config."""
    if raw.get("model_type") == AlibiConfig.model_type:
        return True
    try:
        find_family(raw)
    except UnknownFamilyError:
        return False
    return True


def _check_ours(subject: Subject, options: Options) -> None:
    if subject.raw.get("model_type") == AlibiConfig.model_type:
        _need_weights(subject, options)
        return
    try:
        Checkpoint.open(subject.folder, allow_pickle=options.allow_pickle)  # names every tensor that does not fit
    except ConfigFieldError as error:
        raise ConfigFieldError(f"{error} {UPSTREAM}{subject.given} runs Transformers' own class on it.") from error


def _check_upstream(subject: Subject, options: Options) -> None:
    if subject.raw.get("model_type") == AlibiConfig.model_type:
        raise AlibiError(
            f"{subject.given} has this package's own layout, which no class of upstream reads; name the upstream "
            "checkpoint that it was made of, or leave the prefix away."
        )
    try:
        config = AutoConfig.from_pretrained(str(subject.folder), trust_remote_code=subject.trusted)
    except Exception as error:  # many kinds: an unknown model_type, code that would have to be run, a wrong field
        raise _unreadable(subject, error) from error
    if type(config) not in AutoModelForCausalLM._model_mapping and not subject.trusted:
        raise AlibiError(
            f"{subject.given} is a {type(config).__name__}, of which Transformers has no causal language model; "
            "perplexity needs one."
        )
    _need_weights(subject, options)


def _unreadable(subject: Subject, error: Exception) -> AlibiError:
    if own_code(subject) and not subject.trusted:
        return UnsafeSourceError(
            f"{subject.given} (model_type {subject.raw.get('model_type')!r}) needs code of its own, which is not run "
            "unless --trust-remote-code is given; of a Hub id at a pinned --revision."
        )
    return CheckpointFileError(f"the config of {subject.given} cannot be read: {in_one_line(error)}")


def own_code(subject: Subject) -> list[str]:
    """Return the classes of its own that a source names: for the model, unless it is ours, and for the tokenizer."""
    maps = subject.raw.get("auto_map") if subject.upstream else None
    named = [str(code) for code in (maps.values() if isinstance(maps, dict) else [maps]) if code]
    return named + [code for code in [tokenizer_code(subject.folder)] if code]


def _check_pinned(subject: Subject, code: Sequence[str], options: Options) -> None:
    """Code is run from a folder, or from a commit that the caller names: nothing that can change unseen."""
    if elsewhere := [name for name in code if "--" in name]:
        raise UnsafeSourceError(
            f"{subject.given} runs code of another repository ({elsewhere[0]}), which no revision of its own pins; "
            "put that code into a local folder beside the weights."
        )
    if subject.revision is None:
        return
    if not COMMIT.fullmatch(options.revision or "") or options.revision != subject.revision:  # a branch of such a name
        raise UnsafeSourceError(
            f"--trust-remote-code runs code of {subject.given} only at a commit: give its 40 digits as --revision "
            f"(now {subject.revision}), not {options.revision!r}."
        )
    fetch(subject.given.removeprefix(UPSTREAM), ["*.py"], revision=options.revision)


def _need_weights(subject: Subject, options: Options) -> None:
    if any(subject.folder.glob("*.safetensors")):
        return
    if any(subject.folder.glob("*.bin")):
        if options.allow_pickle:
            for path in sorted(subject.folder.glob("pytorch_model*.bin")):
                load_pickle(path, device="meta")  # names what is in it besides tensors
            return
        raise UnsafeSourceError(
            f"{subject.given} has its weights in pickles only; --allow-pickle (allow_pickle=True) reads them, with "
            "weights_only=True."
        )
    raise CheckpointFileError(f"{subject.given} has a config.json but no weights (*.safetensors).")


__all__ = [
    "UPSTREAM",
    "Options",
    "Subject",
    "check_fit",
    "file_states",
    "find_subjects",
    "load_model",
    "load_tokenizer",
    "own_code",
    "tokenizer_folder",
]
