"""Whether a folder is the one whose parity was proved: the verdict, and that nothing it is about changed since."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alibi_hf.checkpoints.conversion import FILE as CONVERSION
from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.checkpoints.shards import list_tensors, main_dtype
from alibi_hf.model import modeling_alibi
from alibi_hf.model.configuration_alibi import AlibiConfig

RETROFIT, VERIFICATION = "retrofit.json", "verification.json"
_CONFIG, _CODE = "config.json", "*_alibi.py"
_PACKAGE_CODE = Path(modeling_alibi.__file__).parent
# Fields that say nothing about the logits of given tokens.
_FREE = ("foreign_reader", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")


def why_not_proved(folder: Path, files: Sequence[dict[str, Any]]) -> str:
    """Why a folder is not the one whose parity was proved; "" where it is.

    It is where verification.json says so, and weights, config and code are those that the proof was about: by SHA-256
    the files that conversion.json lists, the config there, and the installed package's code.

    Args:
        folder: in this package's layout.
        files: name and sha256 of its weight files.
    """
    if not (folder / VERIFICATION).is_file():
        if (folder / RETROFIT).is_file():
            return "it was retrofitted, so that there is no parity to prove"
        return f"it holds no {VERIFICATION}; `alibi-hf verify SOURCE FOLDER` proves what was converted"
    if (verdict := read_json(folder / VERIFICATION).get("verdict")) != "proved":
        return f"{VERIFICATION} says {verdict!r}"
    if not (folder / CONVERSION).is_file():
        return f"it holds no {CONVERSION}, which names the files that were proved"
    record = read_json(folder / CONVERSION)
    return _changed_weights(files, record) or _changed_config(folder, record) or _changed_code(folder)


def _changed_weights(files: Sequence[dict[str, Any]], record: dict[str, Any]) -> str:
    """How the weight files differ from those that the conversion wrote."""
    try:
        proved = {str(file["name"]): str(file["sha256"]) for file in record["output"]["files"]}
    except (KeyError, TypeError):
        return f"{CONVERSION} lists no weight files with their SHA-256"
    found = {file["name"]: file["sha256"] for file in files}
    if set(proved) != set(found):
        return f"{CONVERSION} lists {', '.join(sorted(proved))}, but the weights are {', '.join(sorted(found))}"
    for name, wanted in proved.items():
        if found[name] != wanted:
            return (
                f"{name} changed since it was converted: SHA-256 {found[name][:12]}..., {CONVERSION} has "
                f"{wanted[:12]}..."
            )
    return ""


def _changed_config(folder: Path, record: dict[str, Any]) -> str:
    """Which field of the config is another than the conversion wrote, or than the weights are stored in."""
    raw, stored = read_json(folder / _CONFIG), str(main_dtype(list_tensors(folder).values())).removeprefix("torch.")
    if (dtype := raw.get("dtype", raw.get("torch_dtype"))) != stored:
        return f"config.json says dtype={dtype!r}, the weights are stored in {stored!r}"
    now = _meaning(read_own_config(folder))
    try:
        then = _meaning(AlibiConfig.from_dict(record["config"]["to"]))
    except Exception:  # whatever a record that was edited makes of it
        return f"{CONVERSION} does not hold the config that was proved"
    wrong = first_difference(now, then)
    return f"config.json changed since it was converted: {wrong}" if wrong else ""


def _meaning(config: AlibiConfig) -> dict[str, Any]:
    """The fields that decide what the model computes."""
    return {name: getattr(config, name) for name in AlibiConfig.__annotations__ if name not in _FREE}


def _changed_code(folder: Path) -> str:
    """Which code file is another than this package's, which the proof ran."""
    ours = {path.name: path.read_bytes() for path in _PACKAGE_CODE.glob(_CODE)}
    held = {path.name: path.read_bytes() for path in folder.glob(_CODE)}
    if wrong := sorted(name for name in ours.keys() | held.keys() if ours.get(name) != held.get(name)):
        return f"{', '.join(wrong)} differ from this package's code, which was what the proof ran; convert it again"
    return ""


def first_difference(found: Any, wanted: dict[str, Any]) -> str:
    """The first name whose values differ, with both; "" where none does."""
    found = found if isinstance(found, dict) else {}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            return f"{name} is {found.get(name)!r}, not {wanted.get(name)!r}"
    return ""


__all__ = ["CONVERSION", "RETROFIT", "VERIFICATION", "first_difference", "why_not_proved"]
