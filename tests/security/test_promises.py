"""SECURITY.md names tests that exist, and the package calls nothing that runs what it reads."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import alibi_hf

ROOT = Path(alibi_hf.__file__).parents[1]
PACKAGE = Path(alibi_hf.__file__).parent
POLICY = ROOT / "SECURITY.md"
UNPICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code")
CALLS = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.spawnl", "yaml.load")
CALLS += ("yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter")
# Who else loads what has a name: families by their file, and the package of a backend.
IMPORTERS = {
    "families/__init__.py": "import_module(f'{__name__}.{name}')",
    "model/flash_alibi.py": "import_module('flash_attn')",
}
# Where code of a source may be run, when that is asked for.
TRUSTING = ("evaluation/loading.py", "cli/measurements.py", "hub/")


def dangers(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and code of what could run data: unpickling, evaluating, shells, code of a repository."""
    for node in ast.walk(ast.parse(text)):
        said = ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)) else ""
        if isinstance(node, ast.Import) and {name.name.split(".")[0] for name in node.names} & {*UNPICKLERS}:
            yield node.lineno, said
        if (
            isinstance(node, ast.ImportFrom)
            and node.module in UNPICKLERS
            and said != "from pickle import UnpicklingError"
        ):
            yield node.lineno, said
        if isinstance(node, ast.Call) and _runs(node):
            yield node.lineno, said


def _runs(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return (
        name in CALLS
        or name.endswith("import_module")
        or (name in ("torch.load", "load_state_dict_from_url") and given.get("weights_only") != "True")
        or given.get("weights_only") == "False"
        or (name in ("numpy.load", "np.load") and given.get("allow_pickle", "False") != "False")
        or given.get("shell", "False") != "False"
        or given.get("trust_remote_code", "False") != "False"
        or (re.match(r"Auto\w+\.from_(pretrained|config)$", name) is not None and "trust_remote_code" not in given)
    )


@pytest.mark.parametrize(
    "text",
    [
        *(
            "import pickle",
            "import os, marshal",
            "from pickle import loads",
            "from pickle import load, UnpicklingError",
        ),
        *("eval(x)", "exec(x)", "__import__(x)", "os.system(x)", "yaml.load(x)", "importlib.import_module(x)"),
        *("torch.load(x)", "torch.load(x, weights_only=False)", "torch.load(x, weights_only=flag)"),
        *("subprocess.run(x, shell=True)", "numpy.load(x, allow_pickle=True)", "f(trust_remote_code=True)"),
        *("f(trust_remote_code=None)", "AutoModel.from_pretrained(x)", "AutoModelForCausalLM.from_config(x)"),
    ],
)
def test_each_danger_is_seen(text: str) -> None:
    assert list(dangers(text)) == [(1, text)]


def test_the_package_calls_nothing_that_runs_data() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for line, said in dangers(path.read_text(encoding="utf-8")):
            allowed = said.endswith(IMPORTERS.get(name, "\0")) or (
                "trust_remote_code" in said and name.startswith(TRUSTING)
            )
            if not allowed:
                found[f"{name}:{line}"] = said
    assert found == {}


def test_each_promise_names_a_test_that_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", POLICY.read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, test in named:
        functions = [
            node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
        ]
        assert test in functions, f"{file}::{test}"


def test_each_paragraph_of_promises_names_its_test() -> None:
    promised = POLICY.read_text(encoding="utf-8").split("## What is promised")[1].split("## Fuzzing")[0]
    for promise in promised.split("\n* ")[1:]:
        assert "::test_" in promise, promise
