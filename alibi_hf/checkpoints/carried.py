"""The files that travel beside the weights, and what of them may be copied.

* A link may lead elsewhere in its folder, or to the blobs of the Hub's cache beside it; any other would copy a file of
  this machine into a folder that is made to be published, so it is refused.
* No code travels: a `.py` file beside the tokenizer would run as part of the converted folder.
* A tokenizer's settings keep neither references to code nor paths; both are upstream's, and mean nothing elsewhere.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alibi_hf.checkpoints.json_files import read_json
from alibi_hf.checkpoints.writer import write_json
from alibi_hf.errors import UnsafeSourceError

# Tokenizer, chat template, licence.
CARRIED = (
    "tokenizer*",
    "*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
)
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_KINDS = (".json", ".txt", ".model", ".jinja")
_NO_LICENCE = (".py", ".pyc", ".so", ".dll", ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf")


def carried_files(folder: Path, patterns: Iterable[str] = CARRIED) -> list[Path]:
    """The files of `folder` that are copied, relative to it, in order.

    Raises:
        UnsafeSourceError: where one is a link out of the folder.
    """
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and _travels(path)}
    for path in sorted(found):
        require_inside(folder, path)
    return sorted(path.relative_to(folder) for path in found)


def _travels(path: Path) -> bool:
    return path.suffix in _KINDS or (path.name.startswith("LICENSE") and path.suffix.lower() not in _NO_LICENCE)


def copy_carried(source: Path, files: Iterable[Path], folder: Path) -> None:
    """Copy `files` of `source` into `folder`, with the tokenizer's settings cleaned."""
    for relative in files:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, folder / relative)
        if relative.name in TOKENIZER_SETTINGS:
            _clean_settings(folder / relative)


def carried_bytes(folder: Path, files: Iterable[Path]) -> int:
    """The bytes that copying `files` of `folder` takes."""
    return sum((folder / file).stat().st_size for file in files)


def _clean_settings(path: Path) -> None:
    settings = read_json(path)
    dropped = {"auto_map", "init_inputs", *(name for name in settings if name.endswith("_file"))}
    dropped |= {name for name, value in _named_files(settings) if Path(value).name != value}
    kept = {name: value for name, value in settings.items() if name not in dropped}
    if kept != settings:
        write_json(path, kept)


def _named_files(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each file that a tokenizer's settings name: in vocab_file and the like, fast_tokenizer_files, and init_inputs."""
    for name, value in settings.items():
        if name == "init_inputs" or name.endswith(("_file", "_files")):
            listed = value if isinstance(value, list) else [value]
            yield from ((name, each) for each in listed if isinstance(each, str))


def tokenizer_code(folder: Path) -> str:
    """The class of its own that a folder's tokenizer names, "" where there is none."""
    path = folder / TOKENIZER_SETTINGS[0]
    named = read_json(path).get("auto_map") if path.is_file() else None
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    return ", ".join(str(name) for name in (named if isinstance(named, list) else [named]) if name)


def require_inside(folder: Path, path: Path) -> None:
    """`UnsafeSourceError` where `path`, followed through links, lies neither in `folder` nor in its Hub cache's blobs.

    That cache holds `snapshots/COMMIT/NAME`, links to `blobs/HASH` beside `snapshots`.
    """
    root, target = folder.resolve(), path.resolve()
    blobs = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise UnsafeSourceError(
            f"{path} is a link to {target}, outside the folder, and its content would be copied. Put the file itself "
            f"into the folder, or remove the link."
        )


def require_own_tokenizer(folder: Path) -> None:
    """Refuse tokenizer files that lead out of their folder: by links, or by paths in their settings.

    Raises:
        UnsafeSourceError: naming the file and where it leads.
    """
    carried_files(folder)
    for name in TOKENIZER_SETTINGS:
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        for setting, value in _named_files(settings):
            if _leads_out(folder, value):
                raise UnsafeSourceError(
                    f"{folder / name} names the file {value!r} ({setting}), outside the folder; remove the setting, "
                    f"the tokenizer's own files are found by their names."
                )


def _leads_out(folder: Path, path: str) -> bool:
    """Whether a setting names a file of this machine; paths of the one that it was made on are harmless here."""
    if ".." in Path(path).parts:
        return True
    named = os.path.expanduser(path)
    return os.path.isabs(named) and os.path.exists(named) and not Path(named).resolve().is_relative_to(folder.resolve())


__all__ = [
    "CARRIED",
    "carried_bytes",
    "carried_files",
    "copy_carried",
    "require_inside",
    "require_own_tokenizer",
    "tokenizer_code",
]
