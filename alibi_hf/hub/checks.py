"""What is checked in a folder before anything of it leaves: layout, secrets, card, paths. Nothing of it is run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, get_token
from transformers.dynamic_module_utils import get_relative_import_files
from yaml import YAMLError  # type: ignore[import-untyped]

from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.errors import TOKEN, CheckpointFileError, ConfigFieldError, SecretError, in_one_line
from alibi_hf.hub.card import CARD
from alibi_hf.hub.contents import CONFIG, Contents
from alibi_hf.hub.proof import CONVERSION, RETROFIT, VERIFICATION, first_difference
from alibi_hf.model.configuration_alibi import AUTO_MAP

_TOKEN = re.compile(TOKEN.pattern.encode())
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
    """Refuse a file that holds the token in use, or anything shaped like one; of weights their header is looked into.

    Raises:
        SecretError: naming the file and the place, never the token.
    """
    own = token if isinstance(token, str) else get_token()
    for name in sorted(contents.names):
        data = _header(contents.path(name)) if name in contents.weights else contents.path(name).read_bytes()
        found = _TOKEN.search(data)
        place = found.start() if found else data.find(own.encode()) if own else -1
        if place >= 0:
            line = data.count(b"\n", 0, place) + 1
            raise SecretError(
                f"{contents.path(name)} holds what looks like a Hugging Face token, in line {line}. Remove it, and "
                f"revoke it if it is one: it may have been copied elsewhere. Nothing was uploaded."
            )


def _header(path: Path) -> bytes:
    """The header of a safetensors file, which holds what its writer noted beside the tensors; it was read before."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def check_card(contents: Contents) -> None:
    """Refuse a card whose metadata cannot be read: the Hub would, when the model is there already.

    Raises:
        CheckpointFileError: saying what is wrong in it.
    """
    if CARD in contents.names:
        try:
            ModelCard(contents.path(CARD).read_text(encoding="utf-8"))
        except (ValueError, TypeError, YAMLError) as error:
            raise CheckpointFileError(
                f"the metadata of {contents.path(CARD)} cannot be read ({in_one_line(error)}). Correct what is between "
                f"its --- lines, or take the card away, and it is made again. Nothing was uploaded."
            ) from error


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


__all__ = ["check_card", "check_layout", "check_secrets", "local_paths"]
