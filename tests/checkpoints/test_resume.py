"""Going on after a kill: any moment, the same bytes; another source, other options, damaged shards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alibi_hf.checkpoints import parallel
from alibi_hf.checkpoints.convert import convert
from alibi_hf.checkpoints.parallel import default_workers
from alibi_hf.errors import CheckpointFileError, ConfigFieldError, TensorError
from tests.builders import bloom, mpt

SHARD = 20_000


def run(source: Path, out: Path, **kwargs):
    return convert(source, out, verify=False, max_shard_size=SHARD, command="the command", **kwargs)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cut_off(source: Path, out: Path, share: float = 0.5, **kwargs) -> Path:
    """Stop a run by Ctrl-C after a share of its bytes; returns the working folder that it leaves."""

    def interrupt(what: str, done: int, total: int) -> None:
        if done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, progress=interrupt, **{"workers": 1, **kwargs})
    assert not out.exists()
    return out.parent / f".{out.name}.partial"


def shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every finished shard."""
    finished = json.loads((folder / ".resume.json").read_text())["finished"]
    stats = {file["name"]: (folder / file["name"]).stat() for file in finished}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def test_a_run_goes_on_where_it_stopped(tmp_path):
    source = mpt(tmp_path / "source")
    run(source, tmp_path / "straight")
    partial = cut_off(source, tmp_path / "out")
    kept = shards(partial)
    assert 2 <= len(kept) < len(list((tmp_path / "straight").glob("model-*")))
    with pytest.raises(CheckpointFileError, match=r"cut off; use --resume .* to go on, or --overwrite"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    for name, (inode, time) in kept.items():
        stat = (tmp_path / "out" / name).stat()
        assert (stat.st_ino, stat.st_mtime_ns) == (inode, time), f"{name} was written again"
    assert not list(tmp_path.glob(".*"))


def test_without_a_run_to_go_on_with_it_starts(tmp_path):
    source = mpt(tmp_path / "source")
    run(source, tmp_path / "out", resume=True)
    with pytest.raises(CheckpointFileError, match=r"not empty; --overwrite"):
        run(source, tmp_path / "out", resume=True)
    (tmp_path / ".other.partial").mkdir()  # killed before it wrote anything down; of an export there may be more
    (tmp_path / ".other.partial" / "model-f16.gguf").write_bytes(b"half a file")
    run(source, tmp_path / "other", resume=True)
    assert content(tmp_path / "other") == content(tmp_path / "out")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_written_again(damage, tmp_path):
    source = mpt(tmp_path / "source")
    run(source, tmp_path / "straight")
    partial = cut_off(source, tmp_path / "out")
    first, second = sorted(shards(partial))[:2]
    data, kept = bytearray((partial / first).read_bytes()), shards(partial)[second]
    data[-1] ^= 1
    if damage == "remove":
        (partial / first).unlink()
    else:
        (partial / first).write_bytes(data if damage == "flip" else data[:-5])
    run(source, tmp_path / "out", resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    assert (tmp_path / "out" / second).stat().st_ino == kept[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "bfloat16"}, r"dtype is not as .*: as stored then, torch.bfloat16 now.*--overwrite"),
        ({"allow_nonfinite": True}, r"allow_nonfinite is not as .*: False then, True now"),
        ({"max_shard_size": 30_000}, r"max_shard_size is not as .*: 20000 then, 30000 now"),
        ({"alibi_rounding": "bloom"}, r"alibi_rounding is not as .*: exact then, bloom now"),
    ],
)
def test_other_options_are_named(options, words, tmp_path):
    source = bloom(tmp_path / "source")
    partial = cut_off(source, tmp_path / "out")
    before = content(partial)
    with pytest.raises(CheckpointFileError, match=words):
        convert(source, tmp_path / "out", **{"verify": False, "resume": True, "max_shard_size": SHARD, **options})
    assert content(partial) == before


@pytest.mark.parametrize("file", ["config.json", "model-00002-of-00003.safetensors"])
def test_another_source_is_named(file, tmp_path):
    source = mpt(tmp_path / "source", shards=3)
    partial = cut_off(source, tmp_path / "out")
    before = content(partial)
    os.utime(source / file, ns=(0, 1))
    with pytest.raises(CheckpointFileError, match=rf"the source's {file} is not as .* modified at 0\.000000"):
        run(source, tmp_path / "out", resume=True)
    assert content(partial) == before
    run(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").exists() and not partial.exists()


def test_a_journal_that_is_none(tmp_path):
    source = mpt(tmp_path / "source")
    partial = cut_off(source, tmp_path / "out")
    (partial / ".resume.json").write_text("{}")
    with pytest.raises(CheckpointFileError, match=r"no journal of this version; --overwrite"):
        run(source, tmp_path / "out", resume=True)


def test_an_error_keeps_what_an_earlier_run_finished(tmp_path, monkeypatch):
    source = mpt(tmp_path / "source")
    partial = cut_off(source, tmp_path / "out")
    kept = shards(partial)
    monkeypatch.setattr(parallel.ShardFile, "add", lambda *_: (_ for _ in ()).throw(TensorError("bad")))
    with pytest.raises(TensorError):
        run(source, tmp_path / "out", resume=True)
    assert shards(partial) == kept
    monkeypatch.undo()
    run(source, tmp_path / "out", resume=True)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_changes_nothing(workers, tmp_path):
    source = bloom(tmp_path / "source", shards=3)
    run(source, tmp_path / "one", workers=1)
    seen: list[tuple[str, int, int]] = []
    run(source, tmp_path / "out", workers=workers, progress=lambda *step: seen.append(step))
    assert content(tmp_path / "out") == content(tmp_path / "one")
    assert [step[1] for step in seen] == sorted(step[1] for step in seen) and seen[-1][1] == seen[-1][2]


def test_an_error_in_one_worker_stops_all_and_leaves_nothing(tmp_path, monkeypatch):
    source = bloom(tmp_path / "source", layers=6)
    right, names = parallel.ShardFile.add, []

    def add(self, name, tensor):
        names.append(name)
        if "layers.1.mlp" in name:
            raise TensorError("bad values")
        right(self, name, tensor)

    monkeypatch.setattr(parallel.ShardFile, "add", add)
    with pytest.raises(TensorError, match="bad values"):
        run(source, tmp_path / "out", workers=3)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert not any("layers.5" in name for name in names)


def test_workers_that_are_none(tmp_path):
    with pytest.raises(ConfigFieldError, match=r"workers=0"):
        run(mpt(tmp_path / "source"), tmp_path / "out", workers=0)


def test_workers_fit_in_memory(monkeypatch):
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert default_workers([100] * 8, 10**6) == parallel.MOST_WORKERS
    assert default_workers([100] * 8, 2 * 3 * 200) == 2
    assert default_workers([1000, 1, 1], 100) == 1


def test_a_source_that_changes_meanwhile(tmp_path):
    """Whether it is read again or not: the end of the run sees it too."""
    source, out = mpt(tmp_path / "source", shards=2), tmp_path / "out"
    for share in (0.3, 1.0):

        def touch(what: str, done: int, total: int, share: float = share) -> None:
            if done >= share * total:
                os.utime(source / "model-00001-of-00002.safetensors", ns=(done, done))

        with pytest.raises(CheckpointFileError, match=r"model-00001.*changed while it was read: \d+ bytes"):
            run(source, out, progress=touch)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_a_kill_between_two_renames_leaves_comes_back(tmp_path):
    source, out = mpt(tmp_path / "source"), tmp_path / "out"
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "mine").write_text("old")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(CheckpointFileError, match="not empty"):
        run(source, out)
    assert content(out) == {"mine": b"old"}


KILLED = Path(__file__).with_name("killed_runs.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_any_moment(tmp_path):
    """kill -9 at each of many file operations, and at random times: untouched or resumable, and then the same bytes."""
    mpt(tmp_path / "source", heads=2, layers=1)
    command = [sys.executable, str(KILLED), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for line in ran.stdout.splitlines():  # into a new folder, and over an old one
        kills, resumed = map(int, line.split())
        assert kills >= 15 and resumed >= 3, ran.stdout
