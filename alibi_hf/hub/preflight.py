"""The preflight: what would be pushed is loaded by its own code alone, and must compute what this package computes.

* Bit for bit: same machine, threads and dtype (as stored), on CPU. Any difference is a difference in the code.
* The folder's code runs in a fresh process, with this package hidden, without network, and without the secrets of the
  environment. The two models are in memory one after the other, never at once.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from alibi_hf.checkpoints.own_config import read_own_config
from alibi_hf.errors import CheckpointFileError, NotProvedError
from alibi_hf.hub import running
from alibi_hf.model import modeling_alibi
from alibi_hf.model.configuration_alibi import AUTO_MAP, AlibiConfig
from alibi_hf.verification.subjects import quiet
from alibi_hf.verification.text import TOKENIZER_FILES

SHORT, LONG = 40, 1024  # tokens; a model trained on more than LONG is not run past them here: `verify` does that
_SECRET = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "ACCESS_KEY", "CREDENTIAL")


@dataclass(frozen=True)
class Agreement:
    """One comparison of the folder's own code with this package: name and shape of what both gave, bit for bit."""

    name: str
    shape: list[int]


def preflight(folder: Path, class_name: str, workspace: Path) -> list[Agreement]:
    """Load `folder` where this package is hidden, and compare with this package's `class_name`.

    Args:
        folder: what would be pushed and nothing else.
        class_name: the class that it was saved from.
        workspace: an empty folder for what the two leave.

    Returns:
        What was compared.

    Raises:
        CheckpointFileError: where it does not load by its own code, or the tokenizer does not.
        NotProvedError: where the two differ, with the largest difference.
    """
    lengths = _lengths(read_own_config(folder))
    theirs = _run_alone(folder, class_name, lengths, workspace)
    with quiet():
        model = getattr(modeling_alibi, class_name).from_pretrained(str(folder), dtype="auto")
        ours = running.compute(model, *lengths)
    if ours.keys() != theirs.keys():
        raise NotProvedError(f"the code in the folder gives {', '.join(theirs)}; this package, {', '.join(ours)}.")
    return [_compare(name, theirs[name], ours[name]) for name in ours]


def _lengths(config: AlibiConfig) -> tuple[int, int]:
    """Tokens of the short rows and of the long one; 0 where a long one is impossible, or takes too much time."""
    trained = config.max_position_embeddings
    if config.learned_positions:
        return min(SHORT, trained), 0
    return SHORT, trained + trained // 4 if trained <= LONG else 0


def _compare(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> Agreement:
    shapes = theirs.shape == ours.shape and theirs.dtype == ours.dtype
    if shapes and torch.equal(theirs.view(torch.uint8), ours.view(torch.uint8)):
        return Agreement(name, list(ours.shape))
    said = f"{list(theirs.shape)} of {theirs.dtype}, not {list(ours.shape)} of {ours.dtype}"
    if shapes:
        far = (theirs.double() - ours.double()).abs().max().item()
        said = f"off by up to {far:.2e}, where the largest value is {ours.double().abs().max().item():.2e}"
    raise NotProvedError(
        f"the code in the folder does not compute what this package computes ({name}: {said}). It was changed, or is "
        f"another version's; load the folder with this package and save it again. Nothing was uploaded."
    )


def _run_alone(folder: Path, class_name: str, lengths: tuple[int, int], workspace: Path) -> dict[str, torch.Tensor]:
    output, job = workspace / "found.safetensors", workspace / "job.json"
    heads = {reference.rpartition(".")[2]: auto for auto, reference in AUTO_MAP.items()}
    content: dict[str, Any] = {
        "folder": str(folder),
        "auto_class": heads.pop(class_name),
        "auto_classes": [auto for auto in heads.values() if auto != "AutoConfig"],
        "lengths": lengths,
        "threads": torch.get_num_threads(),
        "tokenizer": any((folder / name).is_file() for name in TOKENIZER_FILES),
        "output": str(output),
    }
    job.write_text(json.dumps(content), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", running.__file__, str(job)]
    done = subprocess.run(command, env=_environment(workspace), cwd=workspace, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"it ended with {done.returncode}"]
        killed = " (killed; is there enough memory?)" if done.returncode < 0 else ""
        raise CheckpointFileError(
            f"the folder does not load by its own code (trust_remote_code=True), with this package hidden: "
            f"{said[-1].strip()}{killed}. Nothing was uploaded."
        )
    return load_file(output)


def _environment(workspace: Path) -> dict[str, str]:
    """This process's environment without what looks secret, offline, and with caches in `workspace`."""
    kept = {name: value for name, value in os.environ.items() if not any(word in name.upper() for word in _SECRET)}
    return kept | {
        "HF_HOME": str(workspace / "home"),
        "HF_MODULES_CACHE": str(workspace / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


__all__ = ["Agreement", "preflight"]
