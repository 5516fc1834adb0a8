"""What the phases of every job share: tasks that leave marks, and pass 2, from spills to shards.

A kind of job says what its splits and shards are; its own phases do the rest. Called by pack.phases and
pack.reshard_phases, which are such jobs.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.progress import Progress
from scshards.pack import segments
from scshards.pack.executors_base import Executor
from scshards.pack.job import Job
from scshards.pack.lock import held
from scshards.pack.marks import Marked, perform, read_mark
from scshards.pack.options import PackOptions
from scshards.pack.writer import WriteTask, write_shard
from scshards.shards.manifest import ShardInfo, shard_from_json

SMALL_VALUES = 1 << 25
"""Below so many values, starting worker processes takes longer than the work."""


class JobPhases(ABC):
    """The phases that all jobs have.

    Attributes
    ----------
    options
        Of the set that is written.
    job, executor
        Where, and who does it.
    share
        (i, n): do only every n-th task from the i-th on, counted from 0.
    shown
        Show progress.
    """

    options: PackOptions
    job: Job
    executor: Executor
    share: tuple[int, int]
    shown: bool

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, in the order of their codes."""

    @property
    @abstractmethod
    def n_shards(self) -> tuple[int, ...]:
        """Shards that each split has room for."""

    @property
    @abstractmethod
    def label_kinds(self) -> tuple[str, ...]:
        """The kinds of the labels."""

    @property
    @abstractmethod
    def n_spills(self) -> int:
        """Tasks of pass 1."""

    def first_shard(self, split: str) -> int:
        """The number of the first shard that is written of a split."""
        return 0

    @property
    def folder(self) -> Path:
        return self.job.folder

    def write(self) -> None:
        """Write this share's shards."""
        works = [w for i, w in enumerate(self._write_works) if self._is_mine(i)]
        cells = {w.mark: int(self._shard_cells[w.task.shard]) for w in works}
        for _ in self._do("write", works, "cells", lambda w: cells[w.mark]):
            pass

    @property
    def written(self) -> tuple[int, int]:
        """How many shards are written, by whomever, and of how many."""
        works = self._write_works
        return sum(1 for w in works if Path(w.mark).exists()), len(works)

    def _merge_spills(self) -> list[int]:
        """Bring the directories of all spills together; the cells of each split come back."""
        with self._alone():
            self._shard_cells = segments.merge(self.folder, self.n_spills, sum(self.n_shards))
        bounds = np.append(0, np.cumsum(self.n_shards))
        return [
            int(self._shard_cells[bounds[i] : bounds[i + 1]].sum()) for i in range(len(self.splits))
        ]

    def _written_shards(self) -> dict[str, tuple[ShardInfo, ...]]:
        """What was written of each split; all of it is."""
        infos: dict[str, list[ShardInfo]] = {split: [] for split in self.splits}
        for work in self._write_works:
            tree = read_mark(Path(work.mark))
            assert tree is not None
            infos[work.task.name.partition("/")[0]].append(shard_from_json(tree["shard"]))
        return {split: tuple(found) for split, found in infos.items()}

    @cached_property
    def _write_works(self) -> list[Marked]:
        works, first = [], 0
        for split, n in zip(self.splits, self.n_shards, strict=True):
            # Shards that got no cell are left out, and the others numbered without gaps.
            used = np.flatnonzero(self._shard_cells[first : first + n]) + first
            for number, shard in enumerate(used.tolist(), self.first_shard(split)):
                task = WriteTask(
                    name=f"{split}/{number:06d}",
                    shard=shard,
                    root=self.job.storage.url,
                    options=self.options,
                    labels=self.label_kinds,
                    folder=str(self.folder),
                )
                mark = self.job.mark(f"{split}-{number:06d}")
                works.append(Marked(function=write_shard, task=task, mark=str(mark)))
            first += n
        return works

    @cached_property
    def _shard_cells(self) -> NDArray[np.int64]:
        raise AssertionError("the spills are merged first")

    def _is_mine(self, number: int) -> bool:
        return number % self.share[1] == self.share[0]

    def _do(
        self,
        label: str,
        works: Sequence[Marked],
        unit: str,
        size: Callable[[Marked], int],
        *,
        executor: Executor | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Do what is not marked as done, with progress."""
        missing = [w for w in works if not Path(w.mark).exists()]
        sizes = [size(w) for w in works]
        done = sum(sizes) - sum(size(w) for w in missing)
        with Progress(label, sum(sizes), unit, shown=self.shown, initial=done) as bar:
            left = {w.mark: size(w) for w in missing}
            for result in (executor or self.executor).run(perform, missing):
                bar.add(left[result["mark"]], bytes=result.get("bytes", 0))
                yield result

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Of the processes that share a job, one at a time."""
        folder = self.folder / "alone"
        folder.mkdir(exist_ok=True)
        with held(folder, wait=True, where=self.job.storage.at("")):
            yield
