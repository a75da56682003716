"""The README's examples run, in the order in which a reader meets them, and its tables say what the tests show."""

import re
from pathlib import Path

import pytest

README = Path("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=[block.split("\n")[0] for block in BLOCKS])
def test_python_block_runs(code, tmp_path, monkeypatch):
    examples = str(Path("examples").resolve())
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("examples/", f"{examples}/"), "README.md", "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) >= 2


def test_command_lines_name_real_verbs():
    from alibi_hf.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"^alibi-hf (\w+)", README, re.MULTILINE))
    assert named and named <= verbs
