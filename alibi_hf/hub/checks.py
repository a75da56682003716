"""What is checked in a folder before anything of it leaves: layout, secrets, paths. Nothing of it is run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers.dynamic_module_utils import get_relative_import_files

from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.errors import CheckpointFileError, ConfigFieldError, SecretError
from alibi_hf.hub.contents import CONFIG, Contents
from alibi_hf.hub.proof import CONVERSION, RETROFIT, VERIFICATION, first_difference
from alibi_hf.model.configuration_alibi import AUTO_MAP

_TOKEN = re.compile(rb"(?<![A-Za-z0-9_])hf_(?:[a-z]+_)?[A-Za-z0-9]{20,}")
_PATH = re.compile(r"(/|~/|\\\\|[A-Za-z]:[\\/]|file:).+", re.DOTALL)
_SAVE_AGAIN = "load it with this package and save it again (save_pretrained), which writes config and code"


def check_layout(folder: Path) -> str:
    """Check that a folder is one that loads with `trust_remote_code`; returns the class that it was saved from.

    Raises:
        CheckpointFileError: where it has another layout, or a code file is missing.
        ConfigFieldError: where architectures or auto_map do not name this package's classes, or a field holds a path of
            this machine.
    """
    read_own_config(folder)
    path = folder / CONFIG
    raw = read_json(path)
    classes = [reference.rpartition(".")[2] for reference in AUTO_MAP.values()][1:]
    saved = raw.get("architectures")
    if not (isinstance(saved, list) and len(saved) == 1 and saved[0] in classes):
        raise ConfigFieldError(f"{path} says architectures={saved!r}; expected one of {', '.join(classes)}.")
    if raw.get("auto_map") != AUTO_MAP:
        wrong = first_difference(raw.get("auto_map"), AUTO_MAP)
        raise ConfigFieldError(f"{path} has an auto_map in which {wrong}: {_SAVE_AGAIN}.")
    for name, value in _strings({field: value for field, value in raw.items() if field != "id2label"}):
        if _PATH.fullmatch(value):
            raise ConfigFieldError(f"{path} says {name}={value!r}, a path of this machine; remove the field.")
    _check_code(folder)
    return str(saved[0])


def _check_code(folder: Path) -> None:
    """Every file that the classes of the auto_map import, directly or not, must be there."""
    for module in sorted({reference.partition(".")[0] for reference in AUTO_MAP.values()}):
        try:
            get_relative_import_files(folder / f"{module}.py")
        except (OSError, UnicodeDecodeError) as error:
            missing = getattr(error, "filename", None) or f"{module}.py"
            raise CheckpointFileError(
                f"{folder} lacks the code file {Path(missing).name}, or it cannot be read: {_SAVE_AGAIN}."
            ) from error


def check_secrets(contents: Contents, token: str | bool | None) -> None:
    """Refuse a file that holds the token in use, or anything shaped like one; weights are not looked into.

    Raises:
        SecretError: naming the file and the place, never the token.
    """
    own = token if isinstance(token, str) else get_token()
    for name in sorted(contents.names - set(contents.weights)):
        data = contents.path(name).read_bytes()
        found = _TOKEN.search(data)
        place = found.start() if found else data.find(own.encode()) if own else -1
        if place >= 0:
            line = data.count(b"\n", 0, place) + 1
            raise SecretError(
                f"{contents.path(name)} holds what looks like a Hugging Face token, in line {line}. Remove it, and "
                f"revoke it if it is one: it may have been copied elsewhere. Nothing was uploaded."
            )


def local_paths(contents: Contents) -> list[str]:
    """The fields of the reports that name a path of this machine, which readers of the Hub will see."""
    found = []
    for name in (CONVERSION, VERIFICATION, RETROFIT):
        if name in contents.names:
            raw = read_json(contents.path(name))
            shown = {key: raw[key] for key in ("source", "output", "command") if key in raw}
            found += [f"{name}: {field}" for field, text in _strings(shown) if any(map(_PATH.fullmatch, text.split()))]
    return found


def _strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a JSON value, with the names that lead to it."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _strings(entry, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry, name)


__all__ = ["check_layout", "check_secrets", "local_paths"]
