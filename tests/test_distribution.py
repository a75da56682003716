"""Wheel and sdist hold what they must and nothing else, and the sdist makes the same wheel."""

import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.matrix.wheel import ROOT, build

pytestmark = pytest.mark.slow
PACKAGE = ROOT / "alibi_hf"
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (found,) = (folder / "unpacked").iterdir()
    return found


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files(folder: Path) -> set[str]:
    """Every file under a folder that belongs to the sources, from the root of the project."""
    return {
        path.relative_to(folder.parent).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    held = set(contents(wheel))
    assert {name for name in held if not name.split("/")[0].endswith(".dist-info")} == files(PACKAGE)
    assert {"alibi_hf/py.typed", "alibi_hf/verification/sotu.txt", "alibi_hf/pages/page.css"} <= held
    assert {f"alibi_hf/model/{path.name}" for path in (PACKAGE / "model").glob("*_alibi.py")} <= held
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)
    assert wheel.name == f"alibi_hf-{VERSION}-py3-none-any.whl"
    entry = next(text for name, text in contents(wheel).items() if name.endswith("entry_points.txt"))
    assert b"alibi-hf = alibi_hf.cli:app" in entry


def test_the_sdist_makes_the_same_wheel(wheel, sdist, tmp_path):
    again = build("wheel", sdist, tmp_path)
    assert again.name == wheel.name and contents(again) == contents(wheel)


def test_the_sdist_holds_the_tests_and_what_they_read(sdist):
    for name in ("tests", "benchmarks", "model_cards", "docs", "examples"):
        assert files(sdist / name) == {file for file in tracked() if file.startswith(f"{name}/")}, name
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "Makefile", "constraints.txt", ".ci/run"):
        assert (sdist / name).is_file() == (ROOT / name).is_file(), name


def tracked() -> set[str]:
    """The files of the repository, and those that could be added to it."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("this is no checkout of the repository")
    return set(listed.stdout.splitlines())
