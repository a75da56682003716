"""The wheel in an environment of its own: installed with its dependencies, it imports, converts, and has types."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.matrix.environments import HUB, OLDEST, ROOT, TORCH, make, pip, run

FOLDER = ROOT / ".venv-matrix-wheel"
SOURCE = ROOT / "examples" / "checkpoints" / "sotu-mpt"
IMPORT = """
import sys, alibi_hf
from importlib.metadata import version
assert alibi_hf.__file__.startswith(sys.prefix), alibi_hf.__file__
print(alibi_hf.__version__, version("transformers"))
"""
# What a person writes who uses the package from a typed program, and one mistake that only types can show.
TYPED = """
from pathlib import Path
import alibi_hf
report: alibi_hf.Conversion = alibi_hf.convert("a", Path("b"), verify=False)
reveal_type(alibi_hf.list_families())
alibi_hf.convert(1)
"""


def build(kind: str, source: Path, output: Path) -> Path:
    """Build a "wheel" or an "sdist" of the project in `source` with what is installed here, and return the file."""
    run([sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", output, source])
    (found,) = output.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return found


def install(scratch: Path) -> Path:
    """Install the wheel with the oldest Transformers, and return the Python that has it."""
    wheel = build("wheel", ROOT, scratch / "wheel")
    wanted = (f"torch=={TORCH}", f"transformers=={OLDEST}", f"huggingface_hub=={HUB[OLDEST]}")
    python = make(FOLDER, wanted, sys.executable)
    run([*pip(python), "install", "-q", "--force-reinstall", "--no-deps", wheel])
    run([*pip(python), "install", "-q", "-c", FOLDER / "constraints.txt", wheel])  # what it asks for and is not there
    run([*pip(python), "check"])
    return python


def check(python: Path, environment: Mapping[str, str], scratch: Path) -> None:
    """Import with warnings as errors, run the command line on a shipped checkpoint, and type-check a user's program."""
    given = {"env": dict(environment), "cwd": scratch}
    print("wheel:", run([python, "-I", "-W", "error", "-c", IMPORT], **given).strip())
    program, out = python.with_name("alibi-hf"), scratch / "converted"
    assert "convert" in run([program, "--help"], **given)
    assert "BLOOM" in run([program, "families"], **given)
    run([program, "convert", SOURCE, out, "--no-verify", "--quiet"], **given)
    run([program, "verify", SOURCE, out, "--lengths", "64,512", "--quiet"], **given)  # trained on 256
    assert json.loads((out / "verification.json").read_text())["verdict"] == "proved"
    check_types(python, scratch)


def check_types(python: Path, scratch: Path) -> None:
    """The types of the installed package are seen: they name a result, and refuse a wrong call, and only that."""
    program = scratch / "typed.py"
    program.write_text(TYPED)
    config = scratch / "mypy.ini"  # what the package stands on is large, and is not what is asked here
    config.write_text("[mypy]\n[mypy-torch.*,transformers.*,rich.*,huggingface_hub.*]\nfollow_imports = skip\n")
    mypy = [sys.executable, "-m", "mypy", "--python-executable", python, "--config-file", config, program.name]
    try:
        said = run(mypy, cwd=scratch)
    except SystemExit as error:  # the mistake
        said = str(error)
    lines = said.splitlines()
    assert any('Revealed type is "alibi_hf.checkpoints.listing.FamilyList"' in line for line in lines), said
    wrong = [line for line in lines if line.startswith("typed.py:") and ": error:" in line]
    assert wrong and all(line.startswith("typed.py:6:") for line in wrong), said
