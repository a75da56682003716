"""Malicious pickles: each makes a file when it is unpickled as pickles usually are."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

Payload = Callable[[Path, Path], None]  # writes a file that makes the marker


class Calls:
    """Pickles as a call: unpickling makes it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.made = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


def touches(marker: Path) -> Calls:
    """Return what runs `touch` in a shell."""
    return Calls(os.system, f"touch {marker}")


def _saved(value: Callable[[Path], Any], zipped: bool = True) -> Payload:
    def write(path: Path, marker: Path) -> None:
        held = {"word_embeddings.weight": torch.ones(2, 2), "more": value(marker)}
        torch.save(held, path, _use_new_zipfile_serialization=zipped)

    return write


def _raw(make: Callable[[Path], bytes]) -> Payload:
    return lambda path, marker: path.write_bytes(make(marker)) and None


def _torch_zip(make: Callable[[Path], bytes]) -> Payload:
    """Return what writes an archive like torch.save's, with a pickle that no pickler made."""

    def write(path: Path, marker: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", make(marker))
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")

    return write


def _tar(path: Path, marker: Path) -> None:
    """Write the format of torch before 0.1.10."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(touches(marker) if name == "storages" else {"protocol_version": 1000})
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _ordered_with_state(marker: Path) -> Any:
    """Return a dict that is allowed, with attributes that are not: opcode BUILD."""
    return Calls(OrderedDict, state={"extra": touches(marker)})


def _inst(marker: Path) -> bytes:
    return b"(S'touch " + os.fsencode(marker) + b"'\niposix\nsystem\n."


def _obj(marker: Path) -> bytes:
    return b"(cposix\nsystem\nS'touch " + os.fsencode(marker) + b"'\no."


def _stack_global(marker: Path) -> bytes:
    return pickle.dumps(Calls(builtins.eval, f"open({str(marker)!r}, 'w').close()"), protocol=4)


PAYLOADS: dict[str, Payload] = {
    "os.system in a zip": _saved(touches),
    "os.system in torch's legacy format": _saved(touches, zipped=False),
    "open": _saved(lambda marker: Calls(builtins.open, str(marker), "w")),
    "exec": _saved(lambda marker: Calls(builtins.exec, f"open({str(marker)!r}, 'w').close()")),
    "a partial, made by BUILD and called": _saved(lambda m: Calls(partial(os.system, f"touch {m}"))),
    "in the attributes of an OrderedDict": _saved(_ordered_with_state),
    "in an array of numpy": _saved(lambda marker: numpy.array([touches(marker)], dtype=object)),
    "deep in lists": _saved(lambda marker: [[[{"a": (touches(marker),)}]]]),
    "as a key": _saved(lambda marker: {touches(marker): 1}),
    "through a function that torch allows": _saved(
        lambda m: Calls(torch._tensor._rebuild_from_type_v2, os.system, int, (f"touch {m}",), {})
    ),
    "INST": _raw(_inst),
    "INST in a zip": _torch_zip(_inst),
    "OBJ in a zip": _torch_zip(_obj),
    "STACK_GLOBAL": _raw(_stack_global),
    "STACK_GLOBAL in a zip": _torch_zip(_stack_global),
    "tar": _tar,
}

__all__ = ["PAYLOADS", "Payload", "touches"]
