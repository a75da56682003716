"""What README and docs show runs, and what they link to is there."""

import re
from pathlib import Path

import pytest

TEXTS = {path.as_posix(): path.read_text(encoding="utf-8") for path in [Path("README.md"), *Path("docs").glob("*.md")]}
BLOCKS = [
    pytest.param(code, id=f"{name}: {code.splitlines()[0]}")
    for name, text in TEXTS.items()
    for code in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_block_runs(code, tmp_path, monkeypatch):
    examples = str(Path("examples").resolve())
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("examples/", f"{examples}/"), "README.md", "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) >= 3


def test_command_lines_name_real_verbs():
    from alibi_hf.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    for name, text in TEXTS.items():
        named = set(re.findall(r"^(?:\| `)?alibi-hf (\w+)", text, re.MULTILINE))
        assert named <= verbs, name
        assert named or name != "README.md"


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    """Files beside the text, and headings of it."""
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[name])
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", TEXTS[name], re.M)
    }
    for target in targets:
        path, _, heading = target.partition("#")
        assert not path or (Path(name).parent / path).exists(), target
        assert path or heading in headings, target
