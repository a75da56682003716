"""What is checked in a folder before anything of it leaves: layout, proof, secrets, paths. Nothing of it is run."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers.dynamic_module_utils import get_relative_import_files

from alibi_hf.checkpoints.conversion import FILE as CONVERSION
from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.checkpoints.shards import describe_file, list_tensors, main_dtype, read_json
from alibi_hf.errors import CheckpointFileError, ConfigFieldError, SecretError
from alibi_hf.hub.contents import CODE, CONFIG, Contents
from alibi_hf.model import modeling_alibi
from alibi_hf.model.configuration_alibi import AUTO_MAP, AlibiConfig
from alibi_hf.retrofitting.report import FILE as RETROFIT

VERIFICATION = "verification.json"
PACKAGE_CODE = Path(modeling_alibi.__file__).parent
# Fields that say nothing about the logits of given tokens.
_FREE = ("foreign_reader", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")
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
        wrong = _first_difference(raw.get("auto_map"), AUTO_MAP)
        raise ConfigFieldError(f"{path} has an auto_map in which {wrong}: {_SAVE_AGAIN}.")
    for name, value in _strings(raw):
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


def why_not_proved(contents: Contents) -> str:
    """Why a folder is not the one whose parity was proved; "" where it is.

    It is where verification.json says so, and weights, config and code are those that the proof was about: by SHA-256
    the files that conversion.json lists, the config there, and the installed package's code.
    """
    folder = contents.folder
    if not (folder / VERIFICATION).is_file():
        if (folder / RETROFIT).is_file():
            return "it was retrofitted, so that there is no parity to prove"
        return f"it holds no {VERIFICATION}; `alibi-hf verify SOURCE {folder}` proves what was converted"
    if (verdict := read_json(folder / VERIFICATION).get("verdict")) != "proved":
        return f"{VERIFICATION} says {verdict!r}"
    if not (folder / CONVERSION).is_file():
        return f"it holds no {CONVERSION}, which names the files that were proved"
    record = read_json(folder / CONVERSION)
    return _changed_weights(contents, record) or _changed_config(folder, record) or _changed_code(folder)


def _changed_weights(contents: Contents, record: dict[str, Any]) -> str:
    """How the weight files differ from those that the conversion wrote."""
    try:
        proved = {str(file["name"]): str(file["sha256"]) for file in record["output"]["files"]}
    except (KeyError, TypeError):
        return f"{CONVERSION} lists no weight files with their SHA-256"
    if set(proved) != set(contents.weights):
        return f"{CONVERSION} lists {', '.join(sorted(proved))}, but the weights are {', '.join(contents.weights)}"
    for name, wanted in proved.items():
        if (found := describe_file(contents.path(name))["sha256"]) != wanted:
            return f"{name} changed since it was converted: SHA-256 {found[:12]}..., {CONVERSION} has {wanted[:12]}..."
    return ""


def _changed_config(folder: Path, record: dict[str, Any]) -> str:
    """Which field of the config is another than the conversion wrote, or than the weights are stored in."""
    raw, stored = read_json(folder / CONFIG), str(main_dtype(list_tensors(folder).values())).removeprefix("torch.")
    if (dtype := raw.get("dtype", raw.get("torch_dtype"))) != stored:
        return f"config.json says dtype={dtype!r}, the weights are stored in {stored!r}"
    now = _meaning(read_own_config(folder))
    try:
        then = _meaning(AlibiConfig.from_dict(record["config"]["to"]))
    except Exception:  # whatever a record that was edited makes of it
        return f"{CONVERSION} does not hold the config that was proved"
    wrong = _first_difference(now, then)
    return f"config.json changed since it was converted: {wrong}" if wrong else ""


def _meaning(config: AlibiConfig) -> dict[str, Any]:
    """The fields that decide what the model computes."""
    return {name: getattr(config, name) for name in AlibiConfig.__annotations__ if name not in _FREE}


def _changed_code(folder: Path) -> str:
    """Which code file is another than this package's, which the proof ran."""
    ours = {path.name: path.read_bytes() for path in PACKAGE_CODE.glob(CODE)}
    held = {path.name: path.read_bytes() for path in folder.glob(CODE)}
    if wrong := sorted(name for name in ours.keys() | held.keys() if ours.get(name) != held.get(name)):
        return f"{', '.join(wrong)} differ from this package's code, which was what the proof ran; convert it again"
    return ""


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


def _first_difference(found: Any, wanted: dict[str, Any]) -> str:
    """The first name whose values differ, with both; "" where none does."""
    found = found if isinstance(found, dict) else {}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            return f"{name} is {found.get(name)!r}, not {wanted.get(name)!r}"
    return ""


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


__all__ = ["check_layout", "check_secrets", "local_paths", "why_not_proved"]
