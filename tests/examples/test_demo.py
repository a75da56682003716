"""`make demo` as a person runs it, and what it says when something is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_demo(*statements: str) -> subprocess.CompletedProcess:
    """Run `examples/demo.py` in a process of its own, after `statements` that change its module `demo`."""
    lines = ["import sys", f"sys.path.insert(0, {str(ROOT / 'examples')!r})", "import demo", *statements]
    program = "\n".join([*lines, "sys.exit(demo.main())"])
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_demo_proves_both_checkpoints(tmp_path: Path) -> None:
    result = run_demo(f"demo.OUTPUT = demo.Path({str(tmp_path / 'demo')!r})")
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("sotu-bloom", "sotu-mpt"):
        report = tmp_path / "demo" / name / "verification.html"
        assert report.is_file()
        assert f"Report: {report}" in result.stdout
    assert result.stdout.count("512 (trained on 256)") == 2


def test_demo_exits_2_where_a_checkpoint_is_missing(tmp_path: Path) -> None:
    missing = tmp_path / "no-such-checkpoint"
    result = run_demo(
        f"demo.OUTPUT = demo.Path({str(tmp_path / 'demo')!r})", f"demo.CHECKPOINTS = [demo.Path({str(missing)!r})]"
    )
    assert result.returncode == 2
    assert "no-such-checkpoint" in result.stdout


def test_generation_without_the_package_refuses_a_folder_that_needs_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "alibi"}')  # no auto_map: only the package knows this type
    script = ROOT / "examples" / "generate_without_package.py"
    result = subprocess.run([sys.executable, script, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "alibi" in result.stderr
