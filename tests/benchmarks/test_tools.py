"""Rounds, memory and pictures: what the two benchmarks stand on. The clock of these tests is a fake."""

import os

import pytest
import torch

from benchmarks import timing
from benchmarks.memory import ChildDiedError, in_fresh_process, peak_bytes
from benchmarks.plot import draw

MIB = 2**20


class Clock:
    """Time that passes only where a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def contender(self, name: str, *seconds: float):
        """Return a call that takes the given times in turn, the last one from then on."""
        left = list(seconds)

        def call() -> None:
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", fake.perf_counter)
    return fake


def test_contenders_take_turns_and_ratios_are_within_a_round(clock):
    slow = (9.0, 2.0, 20.0, 2.0)  # a long first call to warm up, then a round in which the machine is busy
    calls = {"a": clock.contender("a", *slow), "b": clock.contender("b", *(3 * t for t in slow))}
    found = timing.interleave(calls, 3, 1000.0, "cpu")
    assert clock.order == [*"ab", *"ab", *"ba", *"ab"]
    assert (found["a"].median_ms, found["a"].min_ms, found["a"].rounds) == (2000, 2000, 3)
    assert found["a"].ratio == 1 and found["b"].ratio == pytest.approx(3)
    assert found["b"].median_ms == 6000 and found["b"].iqr_ms == pytest.approx(27000)


def test_rounds_end_with_the_time(clock):
    assert timing.interleave({"a": clock.contender("a", 2.0)}, 9, 1.0, "cpu")["a"].rounds == timing.MIN_ROUNDS
    assert timing.interleave({"a": clock.contender("a", 99.0)}, 9, 1.0, "cpu")["a"].rounds == 1
    assert timing.interleave({"a": clock.contender("a", 2.0)}, 9, 100.0, "cpu")["a"].rounds == 9


def test_fast_calls_are_repeated_within_a_sample(clock):
    found = timing.interleave({"a": clock.contender("a", 0.5, 0.001)}, 2, 1.0, "cpu")["a"]
    assert found.calls == 20 and found.median_ms == pytest.approx(1.0)


def test_thread_count_is_put_back():
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_peak_counts_what_is_freed_again():
    peak = peak_bytes(lambda: torch.ones(64 * MIB // 4).sum(), "cpu")
    if peak is None:
        pytest.skip("this system does not count the peak anew")
    assert 60 * MIB < peak < 90 * MIB


def test_a_fresh_process_answers_or_its_death_is_named():
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ChildDiedError, match="killed"):
        in_fresh_process(os._exit, 1)


def row(**values):
    return {"inputs": "normal", "dtype": "float32", "heads": 2, "head_dim": 8, "threads": 1, **values}


def test_pictures_are_drawn(tmp_path):
    about = {"machine": {"name": "a machine"}, "versions": {"torch": "2"}, "started": "2026-01-01T00:00:00Z"}
    attention = [
        row(**{"pass": "forward", "contender": name, "length": length, "median_ms": 1.0})
        for name in ("ours", "sdpa-no-alibi")
        for length in (8, 16)
    ]
    model = [
        row(model="bloom", task="decode", length=8, contender=name, times_faster=faster)
        for name, faster in (("upstream", 1.0), ("ours", 2.0), ("ours-dense", None))
    ]
    training = [
        row(model="bloom", way=way, tokens=8, contender="ours", tokens_per_second=9.0, peak_bytes=peak)
        for way, peak in (("plain", 2**20), ("packed", None))
    ]
    drawn = {"attention": attention, "model": model, "training": training}
    for benchmark, rows in drawn.items():
        draw({"benchmark": benchmark, "results": rows, **about}, tmp_path / f"{benchmark}.png")
        assert (tmp_path / f"{benchmark}.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="'other' results have no picture"):
        draw({"benchmark": "other", "results": [], **about}, tmp_path / "other.png")
