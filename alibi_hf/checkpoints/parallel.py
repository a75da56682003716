"""Writing the shards of a conversion: several at once, each by one thread that holds one tensor at a time.

What is written does not depend on the number of threads. Reading, casting, hashing and writing all release the
interpreter's lock.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

from torch import Tensor

from alibi_hf.checkpoints.options import Progress
from alibi_hf.checkpoints.plan import Group
from alibi_hf.checkpoints.resume import Journal
from alibi_hf.checkpoints.writer import Entry, ShardFile, shard_names

Convert = Callable[[Group], tuple[Tensor, ...]]
MOST_WORKERS = 4  # past it disks, not processors, are the limit
COPIES = 3  # of a tensor that are held at most: as read, cast, and rearranged


def default_workers(largest: list[int], available: int) -> int:
    """How many threads to use: as many as processors, up to `MOST_WORKERS`, while their tensors fit in half the memory.

    Args:
        largest: bytes of the source's tensors.
        available: bytes of memory that are free.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ordered, workers = sorted(largest, reverse=True), 1
    while workers < min(processors, MOST_WORKERS) and COPIES * sum(ordered[: workers + 1]) <= available // 2:
        workers += 1
    return workers


@dataclass
class ShardJobs:
    """The shards of one conversion.

    Args:
        folder: where they go.
        shards: the tensors of each, in order.
        groups: the source's tensors that are used, in the same order.
        convert: the tensors that a group becomes.
        journal: what is finished already, and where finished shards are written down.
        progress: called with what is being done, bytes done and bytes in all.
    """

    folder: Path
    shards: list[list[Entry]]
    groups: list[Group]
    convert: Convert
    journal: Journal
    progress: Progress | None = None
    _done: int = 0
    _lock: Lock = field(default_factory=Lock)
    _stop: Event = field(default_factory=Event)

    def run(self, workers: int) -> list[dict[str, Any]]:
        """Write what is not finished; returns name, SHA-256 and bytes of every file, in order.

        Raises:
            Whatever the first shard to fail raised; the others are given up.
        """
        names = shard_names(len(self.shards))
        with ThreadPoolExecutor(workers) as pool:
            try:
                jobs = [pool.submit(self._shard, *job) for job in zip(names, self.shards, strict=True)]
                return self._results(jobs)
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)

    def _results(self, jobs: list[Future[dict[str, Any]]]) -> list[dict[str, Any]]:
        finished, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in jobs:
            if job in finished and (error := job.exception()) is not None:
                raise error
        return [job.result() for job in jobs]

    def _shard(self, name: str, entries: list[Entry]) -> dict[str, Any]:
        if (intact := self.journal.intact(name)) is not None:
            self._advance(sum(entry.bytes for entry in entries))
            return intact
        file = ShardFile(self.folder / name, entries)
        try:
            for target, tensor in self._tensors({entry.name for entry in entries}):
                file.add(target, tensor)
                self._advance(tensor.nbytes)
            finished = file.finish()
        finally:
            file.close()
        self.journal.add(finished)
        return finished

    def _tensors(self, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one shard; a group that two shards share is converted for each."""
        for group in self.groups:
            if self._stop.is_set():
                raise InterruptedError("another shard failed")
            if wanted.intersection(group.targets):
                for name, tensor in zip(group.targets, self.convert(group), strict=True):
                    if name in wanted:
                        yield name, tensor

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self.progress is not None:
                self.progress("converting", self._done, sum(entry.bytes for shard in self.shards for entry in shard))


__all__ = ["ShardJobs", "default_workers"]
